// The Python module bert_fast._C: checks arguments, releases the interpreter's lock, calls. No work is done here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "cpu/kernels.h"
#include "encoder.h"
#include "guard.h"
#include "masking.h"
#include "pool.h"

namespace py = pybind11;
using namespace bert_fast;

namespace {

static_assert(sizeof(Tile) == 4 * sizeof(int32_t), "tiles cross into Python as rows of four int32");

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

std::string shape_text(const py::array& array) {
    std::string text = "(";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(array.shape(i));
    return text + ")";
}

template <typename T>
void check_dtype(const py::array& array, const char* name) {
    if (!py::isinstance<py::array_t<T>>(array))
        fail(std::string(name) + " has dtype " + py::str(array.dtype()).cast<std::string>() + "; " +
             py::str(py::dtype::of<T>()).cast<std::string>() + " is needed");
}

// A C-contiguous array of exactly this dtype and shape.
template <typename T>
const T* input(const py::array& array, const char* name, std::initializer_list<int64_t> shape) {
    check_dtype<T>(array, name);
    bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
    std::string wanted;
    py::ssize_t axis = 0;
    for (int64_t size : shape) {
        fits = fits && array.shape(axis) == size;
        wanted += (axis > 0 ? ", " : "") + std::to_string(size);
        ++axis;
    }
    if (!fits) fail(std::string(name) + " has shape " + shape_text(array) + "; (" + wanted + ") is needed");
    if (array.size() > 0 && (array.flags() & py::array::c_style) == 0) fail(std::string(name) + " must be contiguous");
    return static_cast<const T*>(array.data());
}

template <typename T>
const T* optional_input(const std::optional<py::array>& array, const char* name, std::initializer_list<int64_t> shape) {
    return array ? input<T>(*array, name, shape) : nullptr;
}

template <typename T>
T* output(py::array& array, const char* name, std::initializer_list<int64_t> shape) {
    input<T>(array, name, shape);
    return static_cast<T*>(array.mutable_data());
}

void check_rank(const py::array& array, const char* name, py::ssize_t rank) {
    if (array.ndim() != rank)
        fail(std::string(name) + " has shape " + shape_text(array) + "; " + std::to_string(rank) + " dimensions are needed");
}

int checked_threads(int threads) {
    if (threads < 1) fail("threads is " + std::to_string(threads) + "; it must be at least 1");
    return threads;
}

void check_tile_size(int64_t tile_size) {
    if (tile_size < 1) fail("tile_size is " + std::to_string(tile_size) + "; it must be at least 1");
}

// The buffer as an array of this shape; the memory goes back to the pool with the array.
template <typename T>
py::array_t<T> to_array(Buffer<T> buffer, std::vector<py::ssize_t> shape) {
    auto* held = new Buffer<T>(std::move(buffer));
    const py::capsule owner(held, [](void* data) { delete static_cast<Buffer<T>*>(data); });
    return py::array_t<T>(std::move(shape), held->data(), owner);
}

template <typename T>
py::array_t<T> to_array(Buffer<T> buffer) {
    const auto size = static_cast<py::ssize_t>(buffer.size());
    return to_array(std::move(buffer), {size});
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// ---- masking -------------------------------------------------------------------------------------------------------

MaskType mask_type(const py::array& mask) {
    const py::dtype dtype = mask.dtype();
    const char kind = dtype.byteorder() == '>' ? '?' : dtype.kind();
    switch (dtype.itemsize()) {
        case 1:
            if (kind == 'b' || kind == 'u' || kind == 'i') return MaskType::uint8;
            break;
        case 2:
            if (kind == 'i') return MaskType::int16;
            break;
        case 4:
            if (kind == 'i') return MaskType::int32;
            if (kind == 'f') return MaskType::float32;
            break;
        case 8:
            if (kind == 'i') return MaskType::int64;
            if (kind == 'f') return MaskType::float64;
            break;
        default: break;
    }
    fail("mask has dtype " + py::str(mask.dtype()).cast<std::string>() +
         "; bool, uint8, int8, int16, int32, int64, float32 or float64 is needed");
}

py::array_t<int32_t> tiles_array(const std::vector<Tile>& tiles) {
    py::array_t<int32_t> result({static_cast<py::ssize_t>(tiles.size()), py::ssize_t{4}});
    if (!tiles.empty()) std::memcpy(result.mutable_data(), tiles.data(), tiles.size() * sizeof(Tile));
    return result;
}

py::tuple unpad_mask(const py::array& mask, const std::optional<py::array>& keep, bool keep_first, int64_t tile_size,
                int threads) {
    check_rank(mask, "mask", 2);
    const MaskView view{mask.data(), mask_type(mask), mask.shape(0), mask.shape(1)};
    if (mask.size() > 0 && (mask.flags() & py::array::c_style) == 0) fail("mask must be contiguous");
    const bool* keep_data = optional_input<bool>(keep, "keep", {view.rows, view.columns});
    const auto* keep_bytes = reinterpret_cast<const uint8_t*>(keep_data);
    check_tile_size(tile_size);
    checked_threads(threads);
    Packing packing;
    {
        py::gil_scoped_release release;
        packing = unpad(view, keep_bytes, keep_first, tile_size, threads);
    }
    return py::make_tuple(to_array(std::move(packing.indices)), to_array(std::move(packing.positions)),
                          to_array(packing.cu_seqlens), to_array(packing.num_keys), tiles_array(packing.tiles),
                          packing.max_seqlen, packing.is_whole, packing.is_plain);
}

py::array_t<int32_t> tiles(const py::array& cu_seqlens, const std::optional<py::array>& num_keys, int64_t tile_size) {
    check_rank(cu_seqlens, "cu_seqlens", 1);
    if (cu_seqlens.shape(0) < 1) fail("cu_seqlens is empty; it holds one entry more than there are sequences");
    check_tile_size(tile_size);
    const int64_t sequences = cu_seqlens.shape(0) - 1;
    const int32_t* bounds = input<int32_t>(cu_seqlens, "cu_seqlens", {sequences + 1});
    const int32_t* keys = optional_input<int32_t>(num_keys, "num_keys", {sequences});
    std::vector<Tile> list;
    {
        py::gil_scoped_release release;
        list = make_tiles(bounds, keys, sequences, tile_size);
    }
    return tiles_array(list);
}

void pad(const py::array& packed, const py::array& indices, py::array& out, int threads) {
    check_rank(packed, "packed", 2);
    check_rank(out, "out", 2);
    const int64_t rows = packed.shape(0);
    const int64_t row_bytes = packed.shape(1);
    const int64_t out_rows = out.shape(0);
    const uint8_t* from = input<uint8_t>(packed, "packed", {rows, row_bytes});
    const int64_t* places = input<int64_t>(indices, "indices", {rows});
    uint8_t* to = output<uint8_t>(out, "out", {out_rows, row_bytes});
    checked_threads(threads);
    py::gil_scoped_release release;
    pad_rows(reinterpret_cast<const std::byte*>(from), places, rows, row_bytes, out_rows, threads,
             reinterpret_cast<std::byte*>(to));
}

py::tuple pack_sequences(const py::array& lengths, int64_t capacity) {
    check_rank(lengths, "lengths", 1);
    const int64_t count = lengths.shape(0);
    const int64_t* data = input<int64_t>(lengths, "lengths", {count});
    Bins bins;
    {
        py::gil_scoped_release release;
        bins = pack(data, count, capacity);
    }
    return py::make_tuple(to_array(bins.order), to_array(bins.offsets));
}

py::tuple mask_token_ids(const py::array& ids, const std::optional<py::array>& word_ids,
                                    const std::vector<int64_t>& special_ids, const std::string& unit,
                                    double probability, double mask_probability, double random_probability,
                                    int64_t mask_id, int64_t vocab_size, int64_t max_span, uint64_t seed,
                                    uint64_t first_row, int threads) {
    check_rank(ids, "ids", 2);
    const int64_t rows = ids.shape(0);
    const int64_t columns = ids.shape(1);
    MaskingRule rule;
    if (unit == "token") {
        rule.unit = MaskUnit::token;
    } else if (unit == "word") {
        rule.unit = MaskUnit::word;
    } else if (unit == "span") {
        rule.unit = MaskUnit::span;
    } else {
        fail("unit is \"" + unit + "\"; it must be token, word or span");
    }
    rule.probability = probability;
    rule.mask_probability = mask_probability;
    rule.random_probability = random_probability;
    rule.mask_id = mask_id;
    rule.vocab_size = vocab_size;
    rule.max_span = max_span;
    rule.seed = seed;
    rule.first_row = first_row;
    const int64_t* ids_data = input<int64_t>(ids, "ids", {rows, columns});
    const int32_t* words = optional_input<int32_t>(word_ids, "word_ids", {rows, columns});
    Buffer<int64_t> masked_ids(rows * columns);
    Buffer<int64_t> labels(rows * columns);
    checked_threads(threads);
    std::vector<std::vector<int64_t>> parts;
    {
        py::gil_scoped_release release;
        parts = mask_tokens(ids_data, words, rows, columns, special_ids, rule, threads, masked_ids.data(),
                            labels.data());
    }
    size_t count = 0;
    for (const auto& part : parts) count += part.size();
    Buffer<int64_t> places(count);
    int64_t* next = places.data();
    for (const auto& part : parts) next = std::copy(part.begin(), part.end(), next);
    return py::make_tuple(to_array(std::move(masked_ids), {rows, columns}), to_array(std::move(labels), {rows, columns}),
                          to_array(std::move(places)));
}

// ---- CPU kernels ---------------------------------------------------------------------------------------------------

// (tokens, heads, head_size) with any distance between tokens, heads side by side.
cpu::ConstRows heads_view(const py::array& array, const char* name, int64_t tokens, int64_t heads, int64_t head_size) {
    check_dtype<float>(array, name);
    check_rank(array, name, 3);
    if (array.shape(0) != tokens || array.shape(1) != heads || array.shape(2) != head_size)
        fail(std::string(name) + " has shape " + shape_text(array) + "; (" + std::to_string(tokens) + ", " +
             std::to_string(heads) + ", " + std::to_string(head_size) + ") is needed");
    constexpr int64_t item = sizeof(float);
    const bool is_dense = (head_size == 1 || array.strides(2) == item) &&
                          (heads == 1 || array.strides(1) == head_size * item) && array.strides(0) % item == 0;
    if (array.size() > 0 && !is_dense) fail(std::string(name) + " must be contiguous within a token");
    return {static_cast<const float*>(array.data()), array.strides(0) / item};
}

cpu::Rows heads_output(py::array& array, const char* name, int64_t tokens, int64_t heads, int64_t head_size) {
    const cpu::ConstRows rows = heads_view(array, name, tokens, heads, head_size);
    return {static_cast<float*>(array.mutable_data()), rows.stride};
}

// kernels/_random.py has the same rounding: to the nearest 2^-16, halves to even, below 1.
cpu::Dropout make_dropout(int64_t seed, int64_t stream, double rate) {
    constexpr double kNumbers = 65536.0;
    if (!(rate >= 0.0 && rate < 1.0)) fail("dropout_p is " + std::to_string(rate) + "; it must lie in [0, 1)");
    const double threshold = std::min(std::nearbyint(rate * kNumbers), kNumbers - 1.0);
    return {static_cast<uint64_t>(seed) ^ (static_cast<uint64_t>(stream) << 32), static_cast<uint32_t>(threshold),
            static_cast<float>(kNumbers / (kNumbers - threshold))};
}

const Tile* checked_tiles(const py::array& tiles, int64_t tile_size, int64_t tokens) {
    check_rank(tiles, "tiles", 2);
    check_tile_size(tile_size);
    const auto* list = reinterpret_cast<const Tile*>(input<int32_t>(tiles, "tiles", {tiles.shape(0), 4}));
    int64_t covered = 0;
    for (int64_t i = 0; i < tiles.shape(0); ++i) {
        const Tile& tile = list[i];
        const bool fits = tile.sequence_start >= 0 && tile.num_rows >= 1 &&
                          int64_t{tile.sequence_start} + tile.num_rows <= tokens && tile.num_keys >= 0 &&
                          tile.num_keys <= tile.num_rows && tile.first_row >= 0 && tile.first_row < tile.num_rows &&
                          tile.first_row % tile_size == 0;
        if (!fits)
            fail("tiles[" + std::to_string(i) + "] is (" + std::to_string(tile.sequence_start) + ", " +
                 std::to_string(tile.num_rows) + ", " + std::to_string(tile.num_keys) + ", " +
                 std::to_string(tile.first_row) + "), which does not fit " + std::to_string(tokens) +
                 " tokens in tiles of " + std::to_string(tile_size));
        covered += std::min<int64_t>(tile_size, tile.num_rows - tile.first_row);
    }
    if (covered != tokens)
        fail("the sequences hold " + std::to_string(covered) + " tokens and the activations " + std::to_string(tokens));
    return list;
}

// (heads, 2 * reach + 1), wide enough for the sequences of the tiles.
cpu::RelativeBias relative_bias(const std::optional<py::array>& bias, int64_t heads, const Tile* tiles, int64_t num_tiles) {
    if (!bias) return {};
    check_rank(*bias, "bias", 2);
    const int64_t width = bias->shape(1);
    const cpu::RelativeBias result{input<float>(*bias, "bias", {heads, width}), width / 2};
    int64_t longest = 1;
    for (int64_t i = 0; i < num_tiles; ++i) longest = std::max<int64_t>(longest, tiles[i].num_rows);
    if (width % 2 == 0 || result.reach < longest - 1)
        fail("bias has shape " + shape_text(*bias) + "; (" + std::to_string(heads) + ", 2 * reach + 1) with reach at least " +
             std::to_string(longest - 1) + " is needed");
    return result;
}

cpu::AttentionShape attention_shape(const py::array& q, const py::array& tiles, int64_t tile_size, float scale,
                                    const cpu::Dropout& dropout, const std::optional<py::array>& bias, int64_t window) {
    check_rank(q, "q", 3);
    if (window >= 0 && bias) fail("window is " + std::to_string(window) + "; with a bias there can be none");
    const Tile* list = checked_tiles(tiles, tile_size, q.shape(0));
    return {list, tiles.shape(0), tile_size, q.shape(0), q.shape(1), q.shape(2), scale, dropout,
            relative_bias(bias, q.shape(1), list, tiles.shape(0)), window};
}

void attention(const py::array& q, const py::array& k, const py::array& v, const py::array& tiles, int64_t tile_size,
               float scale, int64_t seed, int64_t stream, double dropout_p, const std::optional<py::array>& bias,
               int64_t window, py::array& out, py::array& log_sum_exp, int threads) {
    const cpu::AttentionShape shape =
        attention_shape(q, tiles, tile_size, scale, make_dropout(seed, stream, dropout_p), bias, window);
    const auto view = [&](const py::array& a, const char* name) {
        return heads_view(a, name, shape.tokens, shape.heads, shape.head_size);
    };
    const cpu::ConstRows q_rows = view(q, "q"), k_rows = view(k, "k"), v_rows = view(v, "v");
    const cpu::Rows out_rows = heads_output(out, "out", shape.tokens, shape.heads, shape.head_size);
    float* lse = output<float>(log_sum_exp, "log_sum_exp", {shape.heads, shape.tokens});
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().attention(shape, q_rows, k_rows, v_rows, out_rows, lse, threads);
}

void attention_backward(const py::array& grad_out, const py::array& q, const py::array& k, const py::array& v,
                        const py::array& out, const py::array& tiles, int64_t tile_size,
                        float scale, int64_t seed, int64_t stream, double dropout_p,
                        const std::optional<py::array>& bias, int64_t window, py::array& grad_q, py::array& grad_k,
                        py::array& grad_v, std::optional<py::array>& grad_bias, int threads) {
    const cpu::AttentionShape shape =
        attention_shape(q, tiles, tile_size, scale, make_dropout(seed, stream, dropout_p), bias, window);
    if (grad_bias && !bias) fail("grad_bias is given without bias");
    const auto view = [&](const py::array& a, const char* name) {
        return heads_view(a, name, shape.tokens, shape.heads, shape.head_size);
    };
    const auto view_output = [&](py::array& a, const char* name) {
        return heads_output(a, name, shape.tokens, shape.heads, shape.head_size);
    };
    const cpu::ConstRows q_rows = view(q, "q"), k_rows = view(k, "k"), v_rows = view(v, "v"), out_rows = view(out, "out"),
                         grad_out_rows = view(grad_out, "grad_out");
    const cpu::AttentionGradients grads{view_output(grad_q, "grad_q"), view_output(grad_k, "grad_k"),
                                        view_output(grad_v, "grad_v"),
                                        grad_bias ? output<float>(*grad_bias, "grad_bias", {shape.heads, shape.bias.width()})
                                                  : nullptr};
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().attention_backward(shape, q_rows, k_rows, v_rows, out_rows, grad_out_rows, grads, threads);
}

void layer_norm(const py::array& x, const std::optional<py::array>& residual, const py::array& weight,
                const py::array& bias, float eps, int64_t seed, int64_t stream, double dropout_p, py::array& y,
                std::optional<py::array>& mean, std::optional<py::array>& rstd, int threads) {
    check_rank(x, "x", 2);
    const int64_t rows = x.shape(0);
    const int64_t width = x.shape(1);
    const float* x_data = input<float>(x, "x", {rows, width});
    const float* residual_data = optional_input<float>(residual, "residual", {rows, width});
    const cpu::Norm norm{input<float>(weight, "weight", {width}), input<float>(bias, "bias", {width}), eps};
    const cpu::Dropout dropout = make_dropout(seed, stream, dropout_p);
    float* y_data = output<float>(y, "y", {rows, width});
    float* mean_data = mean ? output<float>(*mean, "mean", {rows}) : nullptr;
    float* rstd_data = rstd ? output<float>(*rstd, "rstd", {rows}) : nullptr;
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().layer_norm(rows, width, x_data, residual_data, dropout, norm, y_data, mean_data, rstd_data, threads);
}

void layer_norm_backward(const py::array& grad_y, const py::array& x, const std::optional<py::array>& residual,
                         const py::array& weight, const py::array& mean, const py::array& rstd, int64_t seed,
                         int64_t stream, double dropout_p, py::array& grad_x, std::optional<py::array>& grad_residual,
                         py::array& grad_weight, py::array& grad_bias, int threads) {
    check_rank(x, "x", 2);
    const int64_t rows = x.shape(0);
    const int64_t width = x.shape(1);
    const float* grad_data = input<float>(grad_y, "grad_y", {rows, width});
    const float* x_data = input<float>(x, "x", {rows, width});
    const float* residual_data = optional_input<float>(residual, "residual", {rows, width});
    const float* weight_data = input<float>(weight, "weight", {width});
    const float* mean_data = input<float>(mean, "mean", {rows});
    const float* rstd_data = input<float>(rstd, "rstd", {rows});
    const cpu::Dropout dropout = make_dropout(seed, stream, dropout_p);
    if ((dropout_p > 0.0) != grad_residual.has_value()) fail("grad_residual is given with dropout, and only then");
    const cpu::LayerNormGradients grads{output<float>(grad_x, "grad_x", {rows, width}),
                                        grad_residual ? output<float>(*grad_residual, "grad_residual", {rows, width}) : nullptr,
                                        output<float>(grad_weight, "grad_weight", {width}),
                                        output<float>(grad_bias, "grad_bias", {width})};
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().layer_norm_backward(rows, width, grad_data, x_data, residual_data, dropout, weight_data, mean_data,
                                       rstd_data, grads, threads);
}

// The indices (tokens), each of which has an entry in the table.
const int64_t* indices_into(const py::array& indices, const char* name, int64_t tokens, int64_t entries) {
    const int64_t* data = input<int64_t>(indices, name, {tokens});
    for (int64_t i = 0; i < tokens; ++i)
        if (data[i] < 0 || data[i] >= entries)
            throw py::index_error(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(data[i]) +
                                  "; its table has " + std::to_string(entries) + " entries");
    return data;
}

void embedding(const py::array& word, const py::array& position, const std::optional<py::array>& token_type,
               const py::array& ids, const py::array& positions, const std::optional<py::array>& token_types,
               const py::array& weight, const py::array& bias, float eps, py::array& out, int threads) {
    check_rank(word, "word", 2);
    check_rank(position, "position", 2);
    if (token_type) check_rank(*token_type, "token_type", 2);
    if (token_types && !token_type) fail("token_types is given without token_type");
    check_rank(ids, "ids", 1);
    const int64_t tokens = ids.shape(0);
    const int64_t width = word.shape(1);
    const int64_t types = token_type ? token_type->shape(0) : 0;
    const cpu::EmbeddingTables tables{input<float>(word, "word", {word.shape(0), width}),
                                      input<float>(position, "position", {position.shape(0), width}),
                                      optional_input<float>(token_type, "token_type", {types, width})};
    if (token_type && !token_types && types == 0) fail("token_type has no entries");
    const int64_t* id_data = indices_into(ids, "ids", tokens, word.shape(0));
    const int64_t* position_data = indices_into(positions, "positions", tokens, position.shape(0));
    const int64_t* type_data =
        token_types ? indices_into(*token_types, "token_types", tokens, types) : nullptr;
    const cpu::Norm norm{input<float>(weight, "weight", {width}), input<float>(bias, "bias", {width}), eps};
    float* out_data = output<float>(out, "out", {tokens, width});
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().embedding(tables, width, tokens, id_data, position_data, type_data, norm, out_data, threads);
}

// out (rows, columns) = a b + bias. a and b are matrices one of whose dimensions is contiguous, such as transposes.
cpu::Matrix matrix(const py::array& array, const char* name) {
    check_dtype<float>(array, name);
    check_rank(array, name, 2);
    constexpr int64_t item = sizeof(float);
    const int64_t row = array.strides(0), column = array.strides(1);
    if (array.size() > 0 && (row % item != 0 || column % item != 0 || (row != item && column != item)))
        fail(std::string(name) + " must be contiguous in one dimension");
    return {static_cast<const float*>(array.data()), row / item, column / item};
}

void matrix_product(const py::array& a, const py::array& b, const std::optional<py::array>& bias, py::array& out,
                    int threads) {
    const cpu::Matrix left = matrix(a, "a");
    const cpu::Matrix right = matrix(b, "b");
    const int64_t rows = a.shape(0), depth = a.shape(1), columns = b.shape(1);
    if (b.shape(0) != depth || depth == 0)
        fail("a has shape " + shape_text(a) + " and b " + shape_text(b) + "; (m, k) and (k, n) with k > 0 are needed");
    const float* bias_data = optional_input<float>(bias, "bias", {columns});
    float* out_data = output<float>(out, "out", {rows, columns});
    checked_threads(threads);
    if (rows == 0 || columns == 0) return;
    py::gil_scoped_release release;
    const Buffer<float> workspace(cpu::kernels().matrix_product_workspace(depth, columns, threads));
    cpu::kernels().matrix_product(left, right, rows, depth, columns, bias_data, out_data, workspace.data(), threads);
}

cpu::Gelu gelu_kind(const std::string& approximate) {
    if (approximate == "none") return cpu::Gelu::erf;
    if (approximate == "tanh") return cpu::Gelu::tanh;
    fail("approximate is \"" + approximate + "\"; it must be none or tanh");
}

void gelu(const py::array& x, const std::optional<py::array>& bias, const std::string& approximate, py::array& y,
               int threads) {
    check_rank(x, "x", 2);
    const int64_t rows = x.shape(0);
    const int64_t width = x.shape(1);
    const float* x_data = input<float>(x, "x", {rows, width});
    const float* bias_data = optional_input<float>(bias, "bias", {width});
    const cpu::Gelu kind = gelu_kind(approximate);
    float* y_data = output<float>(y, "y", {rows, width});
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().gelu(rows, width, x_data, bias_data, kind, y_data, threads);
}

void gelu_backward(const py::array& grad_y, const py::array& x, const std::optional<py::array>& bias,
                        const std::string& approximate, py::array& grad_x, std::optional<py::array>& grad_bias,
                        int threads) {
    check_rank(x, "x", 2);
    const int64_t rows = x.shape(0);
    const int64_t width = x.shape(1);
    const float* grad_data = input<float>(grad_y, "grad_y", {rows, width});
    const float* x_data = input<float>(x, "x", {rows, width});
    const float* bias_data = optional_input<float>(bias, "bias", {width});
    const cpu::Gelu kind = gelu_kind(approximate);
    float* grad_x_data = output<float>(grad_x, "grad_x", {rows, width});
    float* grad_bias_data = grad_bias ? output<float>(*grad_bias, "grad_bias", {width}) : nullptr;
    checked_threads(threads);
    py::gil_scoped_release release;
    cpu::kernels().gelu_backward(rows, width, grad_data, x_data, bias_data, kind, grad_x_data, grad_bias_data,
                                      threads);
}

cpu::Narrow narrow_kind(const std::string& name) {
    if (name == "float32") return cpu::Narrow::none;
    if (name == "int8") return cpu::Narrow::int8;
    if (name == "bfloat16" && cpu::kernels().has_bfloat16()) return cpu::Narrow::bfloat16;
    fail("products is \"" + name + "\"; " + (cpu::kernels().has_bfloat16() ? "\"bfloat16\", " : "") +
         "\"float32\" or \"int8\" is allowed here");
}

cpu::Nonlinearity nonlinearity(const std::string& activation) {
    if (activation == "none") return cpu::Nonlinearity::gelu_erf;
    if (activation == "tanh") return cpu::Nonlinearity::gelu_tanh;
    if (activation == "relu") return cpu::Nonlinearity::relu;
    fail("activation is \"" + activation + "\"; it must be none, tanh or relu");
}

Encoder make_encoder(int64_t hidden_size, int64_t num_heads, int64_t intermediate_size, const std::string& activation,
                     const std::string& products, bool norm_first, bool has_gates) {
    if (hidden_size < 1 || num_heads < 1 || intermediate_size < 1 || hidden_size % num_heads != 0)
        fail("hidden_size is " + std::to_string(hidden_size) + ", num_heads " + std::to_string(num_heads) +
             ", intermediate_size " + std::to_string(intermediate_size) +
             "; all must be positive and num_heads must divide hidden_size");
    return {hidden_size, num_heads, intermediate_size, nonlinearity(activation), narrow_kind(products), norm_first, has_gates};
}

// arrays: weight and bias of query, key, value, attention output, intermediate, gate, output, attention norm, output norm;
// None for the bias of a linear layer without one, for both of a gate that is not there, and for both of the attention
// norm where norms come first and there is none. The caller keeps those of `watched` and all but the weights of linear
// layers for as long as the encoder.
void add_encoder_layer(Encoder& encoder, const std::vector<std::optional<py::array>>& arrays, float attention_eps,
                       float output_eps, const std::array<bool, Encoder::kLinears>& are_narrow,
                       const std::vector<py::array>& watched, int threads, int64_t window, int64_t rotation) {
    constexpr size_t kArrays = 2 * (Encoder::kLinears + 2);
    if (arrays.size() != kArrays)
        fail("arrays has " + std::to_string(arrays.size()) + " entries; " + std::to_string(kArrays) + " are needed");
    const int64_t hidden = encoder.hidden_size();
    const int64_t inner = encoder.intermediate_size();
    const auto required = [&](size_t at, const char* name) -> const py::array& {
        if (!arrays[at]) fail(std::string(name) + " is None; an array is needed");
        return *arrays[at];
    };
    const auto linear = [&](size_t at, const char* name, int64_t outputs, int64_t inputs) -> Encoder::LinearArrays {
        return {input<float>(required(at, name), name, {outputs, inputs}),
                optional_input<float>(arrays[at + 1], name, {outputs})};
    };
    const auto norm = [&](size_t at, const char* name, float eps) -> cpu::Norm {
        return {input<float>(required(at, name), name, {hidden}), input<float>(required(at + 1, name), name, {hidden}), eps};
    };
    const bool has_attention_norm = !encoder.is_norm_first() || arrays[14] || arrays[15];
    if (rotation < -1 || (rotation >= 0 && encoder.head_size() % 2 != 0))
        fail("rotation is " + std::to_string(rotation) + " and head_size " + std::to_string(encoder.head_size()) +
             "; -1 or, for an even head_size, a number from 0 on is needed");
    const Encoder::LayerArrays layer{linear(0, "query", hidden, hidden),
                                     linear(2, "key", hidden, hidden),
                                     linear(4, "value", hidden, hidden),
                                     linear(6, "attention_output", hidden, hidden),
                                     linear(8, "intermediate", inner, hidden),
                                     encoder.has_gates() ? linear(10, "gate", inner, hidden) : Encoder::LinearArrays{},
                                     linear(12, "output", hidden, inner),
                                     has_attention_norm ? norm(14, "attention_norm", attention_eps) : cpu::Norm{},
                                     norm(16, "output_norm", output_eps),
                                     window,
                                     rotation};
    if (!encoder.has_narrow() && are_narrow != std::array<bool, Encoder::kLinears>{})
        fail("are_narrow names a linear layer, but the encoder's products are \"float32\"");
    std::vector<Encoder::Watched> places;
    for (const py::array& array : watched) {
        const auto size = static_cast<size_t>(array.itemsize());
        if (size > sizeof(uint32_t) || (array.flags() & py::array::c_style) == 0)
            fail("watched holds an array of " + std::to_string(size) + " bytes an element; dense ones of at most " +
                 std::to_string(sizeof(uint32_t)) + " are needed");
        places.push_back({static_cast<const std::byte*>(array.data()), array.size(), size});
    }
    checked_threads(threads);
    py::gil_scoped_release release;
    encoder.add_layer(layer, are_narrow, places, threads);
}

void run_encoder(const Encoder& encoder, const py::array& x, const py::array& tiles, int64_t tile_size,
                 const std::optional<py::array>& rows, std::vector<py::array>& outputs, int threads,
                 const std::optional<py::array>& bias, const std::vector<std::pair<py::array, py::array>>& rotations) {
    check_rank(x, "x", 2);
    const int64_t tokens = x.shape(0);
    const float* x_data = input<float>(x, "x", {tokens, encoder.hidden_size()});
    const Tile* list = checked_tiles(tiles, tile_size, tokens);
    Encoder::Batch batch{list, tiles.shape(0), tile_size, tokens, nullptr, 0,
                         relative_bias(bias, encoder.num_heads(), list, tiles.shape(0)), nullptr};
    if (bias && encoder.has_windows()) fail("bias is given, but layers have windows; both at once are not served");
    if (static_cast<int64_t>(rotations.size()) < encoder.num_rotations())
        fail("rotations has " + std::to_string(rotations.size()) + " entries; the layers name " +
             std::to_string(encoder.num_rotations()));
    std::vector<cpu::Rotation> angles;
    for (const auto& [cosines, sines] : rotations) {
        const int64_t half = encoder.head_size() / 2;
        angles.push_back({input<float>(cosines, "rotations", {tokens, half}), input<float>(sines, "rotations", {tokens, half})});
    }
    batch.rotations = angles.data();
    if (rows) {
        check_rank(*rows, "rows", 1);
        batch.num_rows = rows->shape(0);
        batch.rows = input<int64_t>(*rows, "rows", {batch.num_rows});
        for (int64_t i = 0; i < batch.num_rows; ++i) {
            const int64_t row = batch.rows[i];
            if (row < 0 || row >= tokens || (i > 0 && row < batch.rows[i - 1]))
                fail("rows[" + std::to_string(i) + "] is " + std::to_string(row) + "; ascending rows in [0, " +
                     std::to_string(tokens) + ") are needed");
        }
    }
    if (encoder.num_layers() == 0) fail("the encoder has no layers");
    if (static_cast<int64_t>(outputs.size()) != encoder.num_layers())
        fail("outputs has " + std::to_string(outputs.size()) + " entries; " + std::to_string(encoder.num_layers()) +
             " are needed, one for each layer");
    std::vector<float*> results;
    for (size_t i = 0; i < outputs.size(); ++i) {
        const int64_t wanted = rows && i + 1 == outputs.size() ? batch.num_rows : tokens;
        results.push_back(output<float>(outputs[i], "outputs", {wanted, encoder.hidden_size()}));
    }
    checked_threads(threads);
    py::gil_scoped_release release;
    encoder.run(batch, x_data, results, threads);
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Masking and CPU kernels of bert_fast; use them through bert_fast.masking and bert_fast.functional.";
    module.def("unpad", &unpad_mask, py::arg("mask"), py::arg("keep"), py::arg("keep_first"), py::arg("tile_size"),
               py::arg("threads"));
    module.def("tiles", &tiles, py::arg("cu_seqlens"), py::arg("num_keys"), py::arg("tile_size"));
    module.def("pad", &pad, py::arg("packed"), py::arg("indices"), py::arg("out"), py::arg("threads"));
    module.def("pack", &pack_sequences, py::arg("lengths"), py::arg("capacity"));
    module.def("mask_tokens", &mask_token_ids, py::arg("ids"), py::arg("word_ids"), py::arg("special_ids"),
               py::arg("unit"), py::arg("probability"), py::arg("mask_probability"), py::arg("random_probability"),
               py::arg("mask_id"), py::arg("vocab_size"), py::arg("max_span"), py::arg("seed"), py::arg("first_row"),
               py::arg("threads"));
    module.def("attention", &attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("tiles"),
               py::arg("tile_size"), py::arg("scale"), py::arg("seed"), py::arg("stream"), py::arg("dropout_p"),
               py::arg("bias"), py::arg("window"), py::arg("out"), py::arg("log_sum_exp"), py::arg("threads"));
    module.def("attention_backward", &attention_backward, py::arg("grad_out"), py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("out"), py::arg("tiles"), py::arg("tile_size"), py::arg("scale"), py::arg("seed"), py::arg("stream"),
               py::arg("dropout_p"), py::arg("bias"), py::arg("window"), py::arg("grad_q"), py::arg("grad_k"),
               py::arg("grad_v"), py::arg("grad_bias"), py::arg("threads"));
    module.def("layer_norm", &layer_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
               py::arg("eps"), py::arg("seed"), py::arg("stream"), py::arg("dropout_p"), py::arg("y"), py::arg("mean"),
               py::arg("rstd"), py::arg("threads"));
    module.def("layer_norm_backward", &layer_norm_backward, py::arg("grad_y"), py::arg("x"),
               py::arg("residual"), py::arg("weight"), py::arg("mean"), py::arg("rstd"), py::arg("seed"),
               py::arg("stream"), py::arg("dropout_p"), py::arg("grad_x"), py::arg("grad_residual"),
               py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"));
    module.def("embedding", &embedding, py::arg("word"), py::arg("position"), py::arg("token_type"), py::arg("ids"),
               py::arg("positions"), py::arg("token_types"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
               py::arg("out"), py::arg("threads"));
    module.def("matrix_product", &matrix_product, py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("out"),
               py::arg("threads"));
    module.def("gelu", &gelu, py::arg("x"), py::arg("bias"), py::arg("approximate"), py::arg("y"),
               py::arg("threads"));
    module.def("gelu_backward", &gelu_backward, py::arg("grad_y"), py::arg("x"), py::arg("bias"),
               py::arg("approximate"), py::arg("grad_x"), py::arg("grad_bias"), py::arg("threads"));
    py::class_<Encoder>(module, "Encoder")
        .def(py::init(&make_encoder), py::arg("hidden_size"), py::arg("num_heads"), py::arg("intermediate_size"),
             py::arg("activation"), py::arg("products"), py::arg("norm_first") = false, py::arg("has_gates") = false)
        .def("add_layer", &add_encoder_layer, py::arg("arrays"), py::arg("attention_eps"), py::arg("output_eps"),
             py::arg("are_narrow"), py::arg("watched"), py::arg("threads"), py::arg("window") = -1,
             py::arg("rotation") = -1)
        .def("is_current", &Encoder::is_current)
        .def("run", &run_encoder, py::arg("x"), py::arg("tiles"), py::arg("tile_size"), py::arg("rows"),
             py::arg("outputs"), py::arg("threads"), py::arg("bias") = py::none(),
             py::arg("rotations") = std::vector<std::pair<py::array, py::array>>());
    py::class_<Guard>(module, "Guard")
        .def(py::init<>())
        .def("expect_type", &Guard::expect_type, py::arg("instance"))
        .def("expect_size", &Guard::expect_size, py::arg("mapping"))
        .def("expect_item", &Guard::expect_item, py::arg("mapping"), py::arg("key"))
        .def("holds", &Guard::holds);
    module.def("has_bfloat16", [] { return cpu::kernels().has_bfloat16(); });
    module.def("instruction_set", [] { return std::string(cpu::kernels().instruction_set); });
    module.def("has_openmp", &has_openmp);
}
