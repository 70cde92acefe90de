// The encoder's CPU kernels: float32, packed rows, no padding. One table of functions per instruction set.
//
// Matrices are row-major. `stride` is the distance between rows in elements; the last dimension is contiguous.
// `threads` is the number of OpenMP threads. Results do not depend on it: work is split by the data alone.
#pragma once

#include <cstdint>

#include "../masking.h"

namespace bert_fast::cpu {

struct Rows {
    float* data;
    int64_t stride;
    float* row(int64_t index) const { return data + index * stride; }
};

struct ConstRows {
    const float* data;
    int64_t stride;
    const float* row(int64_t index) const { return data + index * stride; }
};

// Dropout of attention's probabilities, or of a row's features, drawn as kernels/_random.py says.
struct Dropout {
    static constexpr int kRounds = 7;

    uint64_t key = 0;        // the seed, with the stream's number in its upper half
    uint32_t threshold = 0;  // of 2^16: a number below it drops; 0 means no dropout
    float scale = 1.0f;      // of what is kept

    bool is_on() const { return threshold > 0; }
};

// Added to the scores: that of query i and key j of a sequence gets values[head * (2 * reach + 1) + j - i + reach], the
// rows being numbered from the sequence's first (Raffel et al. 2020, section 2.1). `reach` is at least the longest
// sequence's rows less one.
struct RelativeBias {
    const float* values = nullptr;  // null: none
    int64_t reach = 0;

    bool is_on() const { return values != nullptr; }
    int64_t width() const { return 2 * reach + 1; }
    // That of key 0 for a query; those of keys 1, 2, ... follow.
    const float* line(int64_t head, int64_t query) const { return values + head * width() + reach - query; }
};

// Keys of a sequence, first to last - 1.
struct KeyRange {
    int64_t first;
    int64_t last;

    bool is_empty() const { return first >= last; }
};

// Scaled dot-product attention within each sequence (Vaswani et al. 2017, equation 1), no mask but the number of keys and,
// if it is not negative, the window: how many rows from a query its farthest key may be. No bias with a window.
// q, k, v, out and their gradients are (tokens, heads * head_size); log_sum_exp is (heads, tokens), natural logarithm,
// -inf where a query has no key; such a query's output is zero.
struct AttentionShape {
    const Tile* tiles;
    int64_t num_tiles;
    int64_t tile_size;
    int64_t tokens;
    int64_t heads;
    int64_t head_size;
    float scale;
    Dropout dropout;
    RelativeBias bias;
    int64_t window = -1;

    bool has_window() const { return window >= 0; }

    // What some queries, from one row to another, see of a sequence's keys.
    KeyRange visible(int64_t first_query, int64_t last_query, int64_t keys) const {
        if (!has_window()) return {0, keys};
        const int64_t last = last_query + window + 1;
        return {first_query > window ? first_query - window : 0, last < keys ? last : keys};
    }
};

struct AttentionGradients {
    Rows q, k, v;
    float* bias;  // (heads, 2 * reach + 1), or null where it is not wanted
};

enum class Gelu { erf, tanh };

// Between the two linear maps of a feed-forward layer.
enum class Nonlinearity { gelu_erf, gelu_tanh, relu };

struct Norm {
    const float* weight;
    const float* bias;
    float eps;
};

struct LayerNormGradients {
    float* x;       // (rows, width)
    float* sum;     // (rows, width), of what was normalised, and so of the residual; null without dropout, where it is x's
    float* weight;  // (width)
    float* bias;    // (width)
};

// (entries, width) each; token_type may be null.
struct EmbeddingTables {
    const float* word;
    const float* position;
    const float* token_type;
};

// A weight in 8 bits, as Kernels::quantise_weight leaves it.
struct Quantised {
    const int8_t* weight;
    const float* scales;
    const int32_t* offsets;
};

// What the factors of a product may be rounded to.
enum class Narrow { none, bfloat16, int8 };

// y = x W^T + b with the weight packed, in one of three ways; the others are null.
struct Linear {
    const float* weight;
    const uint16_t* halves;  // bfloat16
    Quantised quantised;
    const float* bias;

    bool is_narrow() const { return weight == nullptr; }
};

// Rotary positions (Su et al. 2021, section 3.2.2): of each token the cosines and sines of its angles, (tokens,
// head_size / 2) each. Features i and i + head_size / 2 of a head are turned by angle i.
struct Rotation {
    const float* cosines;
    const float* sines;
};

// Where norms come first, the attention norm's weight may be null: there is none. The gate, if the encoder has gates, is
// multiplied with the activation (Shazeer 2020). `rotation` is a number in EncoderShape::rotations, or -1.
struct EncoderLayer {
    Linear query, key, value, attention_output, intermediate, gate, output;
    Norm attention_norm, output_norm;
    int64_t window;  // of the attention
    int64_t rotation;
};

// Layer i reads (tokens, hidden_size) from outputs[i - 1], the first one from input, and writes outputs[i], all dense;
// neighbours may be the same array. `workspace` holds encoder_workspace floats.
struct EncoderShape {
    AttentionShape attention;  // tokens, heads, head_size
    const int64_t* rows;       // ascending: the last layer's result is wanted for these alone; null: for all
    int64_t num_rows;
    int64_t num_layers;
    int64_t hidden_size;
    int64_t intermediate_size;
    Nonlinearity nonlinearity;
    bool norm_first;         // norms before attention and feed-forward (Xiong et al. 2020), not after
    bool has_gates;
    const Rotation* rotations;
    Narrow narrow;           // what linear layers without a `weight` have
    bool is_mostly_narrow;  // most of them
};

// Element (i, j) is data[i * row + j * column].
struct Matrix {
    const float* data;
    int64_t row, column;
    const float* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

struct Kernels {
    const char* instruction_set;

    void (*attention)(const AttentionShape&, ConstRows q, ConstRows k, ConstRows v, Rows out, float* log_sum_exp,
                      int threads);

    void (*attention_backward)(const AttentionShape&, ConstRows q, ConstRows k, ConstRows v, ConstRows out,
                               ConstRows grad_out, const AttentionGradients& grads, int threads);

    // y = LayerNorm(dropout(x) + residual) * weight + bias (Ba et al. 2016); residual may be null. mean and rstd (rows) may
    // be null.
    void (*layer_norm)(int64_t rows, int64_t width, const float* x, const float* residual, const Dropout&, const Norm&,
                       float* y, float* mean, float* rstd, int threads);

    void (*layer_norm_backward)(int64_t rows, int64_t width, const float* grad_y, const float* x, const float* residual,
                                const Dropout&, const float* weight, const float* mean, const float* rstd,
                                const LayerNormGradients&, int threads);

    // y (tokens, width) = LayerNorm(word[ids] + position[positions] + token_type[token_types]) (Devlin et al. 2018, figure
    // 2), or of the first two; token_types null: all 0. Indices are checked by the caller.
    void (*embedding)(const EmbeddingTables&, int64_t width, int64_t tokens, const int64_t* ids, const int64_t* positions,
                      const int64_t* token_types, const Norm&, float* y, int threads);

    // y = GELU(x + bias) (Hendrycks and Gimpel 2016); bias may be null.
    void (*gelu)(int64_t rows, int64_t width, const float* x, const float* bias, Gelu kind, float* y, int threads);

    // grad_bias may be null.
    void (*gelu_backward)(int64_t rows, int64_t width, const float* grad_y, const float* x, const float* bias,
                               Gelu kind, float* grad_x, float* grad_bias, int threads);

    // C (rows, columns), dense, = A (rows, depth) B (depth, columns) + bias (columns), which may be null; depth is at least
    // 1. `workspace` holds matrix_product_workspace floats.
    int64_t (*matrix_product_workspace)(int64_t depth, int64_t columns, int threads);
    void (*matrix_product)(const Matrix& a, const Matrix& b, int64_t rows, int64_t depth, int64_t columns,
                           const float* bias, float* c, float* workspace, int threads);

    // Elements of a packed weight matrix.
    int64_t (*packed_size)(int64_t outputs, int64_t inputs);

    // The weight (outputs, inputs) of a linear layer, in the order in which `encoder` reads it.
    void (*pack_weight)(const float* weight, int64_t outputs, int64_t inputs, float* packed, int threads);

    // The same in bfloat16, packed_halves_size elements; `encoder` takes it where the machine has_bfloat16.
    bool (*has_bfloat16)();
    int64_t (*packed_halves_size)(int64_t outputs, int64_t inputs);
    void (*pack_halves)(const float* weight, int64_t outputs, int64_t inputs, uint16_t* halves, int threads);

    // The same in 8 bits: quantised_size bytes; scales (padded_outputs); offsets (quantised_groups, padded_outputs).
    int64_t (*quantised_size)(int64_t outputs, int64_t inputs);
    void (*quantise_weight)(const float* weight, int64_t outputs, int64_t inputs, int8_t* bytes, float* scales,
                            int32_t* offsets, int threads);
    int64_t (*padded_outputs)(int64_t outputs);
    int64_t (*quantised_groups)(int64_t inputs);

    // Encoder layers (Devlin et al. 2018; Vaswani et al. 2017, section 3.1), without dropout.
    int64_t (*encoder_workspace)(const EncoderShape&, int threads);
    void (*encoder)(const EncoderShape&, const EncoderLayer* layers, const float* input, float* const* outputs,
                    float* workspace, int threads);

    // ---- the inner loops of masking.cpp, on one thread ----

    // For each row of a mask: its leading values that are not zero, if all that follow are zero; -1 otherwise, and
    // always for masks of floats.
    void (*prefix_lengths)(const MaskView& mask, int64_t first_row, int64_t last_row, int32_t* lengths);

    // indices = first, first + 1, ...; positions = 0, 1, ...
    void (*fill_sequence)(int64_t first, int64_t count, int64_t* indices, int32_t* positions);

    // masked_ids = ids, labels = kIgnoredLabel; returns whether all ids lie in [0, limit).
    bool (*copy_ids)(const int64_t* ids, int64_t count, int64_t limit, int64_t* masked_ids, int64_t* labels);

    // Bit c % 64 of bits[c / 64]: whether column c's word of selection (mask_tokens in masking.h) is at most `last`.
    // Bits beyond the last column may be set too.
    void (*select_columns)(uint64_t seed, uint64_t row, int64_t columns, uint32_t last, uint64_t* bits);

    // Words 0 of the replacement draws of mask_tokens, for the tokens at (first_row + rows[i], columns[i]), and the ids
    // that words 1 draw. special_ids ascend, each once.
    void (*draw_replacements)(uint64_t seed, uint64_t first_row, const uint32_t* columns, const uint32_t* rows,
                              int64_t count, uint32_t vocab_size, const uint32_t* special_ids, int64_t num_special,
                              uint32_t* actions, uint32_t* random_ids);
};

// The best table for this machine, chosen once; BERT_FAST_ISA=portable|avx2|avx512 in the environment chooses another.
// Throws std::invalid_argument for a name that is unknown or that the machine lacks.
const Kernels& kernels();

extern const Kernels portable_kernels;
#if defined(__x86_64__) && defined(__GNUC__)
#define BERT_FAST_X86 1
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace bert_fast::cpu
