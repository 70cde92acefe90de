#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace bert_fast {
namespace {

constexpr int64_t kSamples = 8;  // of each weight

}  // namespace

Encoder::Encoder(int64_t hidden_size, int64_t num_heads, int64_t intermediate_size, cpu::Gelu gelu) {
    shape_.hidden_size = hidden_size;
    shape_.intermediate_size = intermediate_size;
    shape_.gelu = gelu;
    shape_.attention.heads = num_heads;
    shape_.attention.head_size = hidden_size / num_heads;
    shape_.attention.scale = 1.0f / std::sqrt(static_cast<float>(shape_.attention.head_size));
}

cpu::Linear Encoder::pack(const LinearArrays& linear, int64_t outputs, int64_t inputs, bool in_8_bits, int threads) {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t size = outputs * inputs;
    for (int64_t i = 0; i < std::min(kSamples, size); ++i) {
        const float* place = linear.weight + size * i / std::min(kSamples, size);
        uint32_t bits;
        std::memcpy(&bits, place, sizeof(bits));
        samples_.push_back({place, bits});
    }
    if (in_8_bits) {
        const int64_t columns = kernels.padded_outputs(outputs);
        auto* bytes = storage_.take<int8_t>(kernels.quantised_size(outputs, inputs));
        auto* scales = storage_.take<float>(columns);
        auto* offsets = storage_.take<int32_t>(kernels.quantised_groups(inputs) * columns);
        kernels.quantise_weight(linear.weight, outputs, inputs, bytes, scales, offsets, threads);
        return {nullptr, {bytes, scales, offsets}, linear.bias};
    }
    auto* packed = storage_.take<float>(kernels.packed_size(outputs, inputs));
    kernels.pack_weight(linear.weight, outputs, inputs, packed, threads);
    return {packed, {}, linear.bias};
}

void Encoder::add_layer(const LayerArrays& arrays, const std::array<bool, kLinears>& in_8_bits, int threads) {
    const int64_t hidden = shape_.hidden_size;
    const int64_t inner = shape_.intermediate_size;
    layers_.push_back({pack(arrays.query, hidden, hidden, in_8_bits[0], threads),
                       pack(arrays.key, hidden, hidden, in_8_bits[1], threads),
                       pack(arrays.value, hidden, hidden, in_8_bits[2], threads),
                       pack(arrays.attention_output, hidden, hidden, in_8_bits[3], threads),
                       pack(arrays.intermediate, inner, hidden, in_8_bits[4], threads),
                       pack(arrays.output, hidden, inner, in_8_bits[5], threads), arrays.attention_norm,
                       arrays.output_norm});
    shape_.num_layers = num_layers();
    count_in_8_bits_ += std::count(in_8_bits.begin(), in_8_bits.end(), true);
    shape_.is_in_8_bits = 2 * count_in_8_bits_ > num_layers() * static_cast<int64_t>(kLinears);
}

bool Encoder::is_current() const {
    uint32_t difference = 0;  // no early end: the reads miss the cache, and so wait for memory together
    for (const Sample& sample : samples_) {
        uint32_t now;
        std::memcpy(&now, sample.place, sizeof(now));
        difference |= now ^ sample.bits;
    }
    return difference == 0;
}

void Encoder::run(const Batch& batch, const float* input, const std::vector<float*>& outputs, int threads) const {
    cpu::EncoderShape shape = shape_;
    shape.attention.tiles = batch.tiles;
    shape.attention.num_tiles = batch.num_tiles;
    shape.attention.tile_size = batch.tile_size;
    shape.attention.tokens = batch.tokens;
    shape.rows = batch.rows;
    shape.num_rows = batch.num_rows;
    const Buffer<float> workspace(cpu::kernels().encoder_workspace(shape, threads));
    cpu::kernels().encoder(shape, layers_.data(), input, outputs.data(), workspace.data(), threads);
}

}  // namespace bert_fast
