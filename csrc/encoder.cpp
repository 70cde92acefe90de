#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace bert_fast {
namespace {

constexpr int64_t kSamples = 8;  // of each array

}  // namespace

Encoder::Encoder(int64_t hidden_size, int64_t num_heads, int64_t intermediate_size, cpu::Nonlinearity nonlinearity,
                 cpu::Narrow narrow, bool norm_first, bool has_gates) {
    shape_.hidden_size = hidden_size;
    shape_.intermediate_size = intermediate_size;
    shape_.nonlinearity = nonlinearity;
    shape_.norm_first = norm_first;
    shape_.has_gates = has_gates;
    shape_.narrow = narrow;
    shape_.attention.heads = num_heads;
    shape_.attention.head_size = hidden_size / num_heads;
    shape_.attention.scale = 1.0f / std::sqrt(static_cast<float>(shape_.attention.head_size));
}

void Encoder::watch(const Watched& array) {
    const int64_t count = std::min(kSamples, array.elements);
    for (int64_t i = 0; i < count; ++i) {
        const auto element = static_cast<size_t>(array.elements * i / count);
        samples_.push_back({array.data + element * array.element_size, array.element_size, 0});
        samples_.back().bits = samples_.back().now();
    }
}

cpu::Linear Encoder::pack(const LinearArrays& linear, int64_t outputs, int64_t inputs, bool is_narrow, int threads) {
    const cpu::Kernels& kernels = cpu::kernels();
    if (!is_narrow) {
        auto* packed = storage_.take<float>(kernels.packed_size(outputs, inputs));
        kernels.pack_weight(linear.weight, outputs, inputs, packed, threads);
        return {packed, nullptr, {}, linear.bias};
    }
    if (shape_.narrow == cpu::Narrow::bfloat16) {
        auto* halves = storage_.take<uint16_t>(kernels.packed_halves_size(outputs, inputs));
        kernels.pack_halves(linear.weight, outputs, inputs, halves, threads);
        return {nullptr, halves, {}, linear.bias};
    }
    const int64_t columns = kernels.padded_outputs(outputs);
    auto* bytes = storage_.take<int8_t>(kernels.quantised_size(outputs, inputs));
    auto* scales = storage_.take<float>(columns);
    auto* offsets = storage_.take<int32_t>(kernels.quantised_groups(inputs) * columns);
    kernels.quantise_weight(linear.weight, outputs, inputs, bytes, scales, offsets, threads);
    return {nullptr, nullptr, {bytes, scales, offsets}, linear.bias};
}

void Encoder::add_layer(const LayerArrays& arrays, const std::array<bool, kLinears>& are_narrow,
                        const std::vector<Watched>& watched, int threads) {
    const int64_t hidden = shape_.hidden_size;
    const int64_t inner = shape_.intermediate_size;
    layers_.push_back({pack(arrays.query, hidden, hidden, are_narrow[0], threads),
                       pack(arrays.key, hidden, hidden, are_narrow[1], threads),
                       pack(arrays.value, hidden, hidden, are_narrow[2], threads),
                       pack(arrays.attention_output, hidden, hidden, are_narrow[3], threads),
                       pack(arrays.intermediate, inner, hidden, are_narrow[4], threads),
                       shape_.has_gates ? pack(arrays.gate, inner, hidden, are_narrow[5], threads) : cpu::Linear{},
                       pack(arrays.output, hidden, inner, are_narrow[6], threads), arrays.attention_norm,
                       arrays.output_norm, arrays.window, arrays.rotation});
    has_windows_ = has_windows_ || arrays.window >= 0;
    num_rotations_ = std::max(num_rotations_, arrays.rotation + 1);
    for (const Watched& array : watched) watch(array);
    shape_.num_layers = num_layers();
    num_narrow_ += std::count(are_narrow.begin(), are_narrow.end(), true);
    shape_.is_mostly_narrow = 2 * num_narrow_ > num_layers() * static_cast<int64_t>(kLinears);
}

bool Encoder::is_current() const {
    uint32_t difference = 0;  // no early end: the reads miss the cache, and so wait for memory together
    for (const Sample& sample : samples_) difference |= sample.now() ^ sample.bits;
    return difference == 0;
}

void Encoder::run(const Batch& batch, const float* input, const std::vector<float*>& outputs, int threads) const {
    cpu::EncoderShape shape = shape_;
    shape.attention.tiles = batch.tiles;
    shape.attention.num_tiles = batch.num_tiles;
    shape.attention.tile_size = batch.tile_size;
    shape.attention.tokens = batch.tokens;
    shape.attention.bias = batch.bias;
    shape.rotations = batch.rotations;
    shape.rows = batch.rows;
    shape.num_rows = batch.num_rows;
    const Buffer<float> workspace(cpu::kernels().encoder_workspace(shape, threads));
    cpu::kernels().encoder(shape, layers_.data(), input, outputs.data(), workspace.data(), threads);
}

}  // namespace bert_fast
