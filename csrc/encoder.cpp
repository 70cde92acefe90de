#include "encoder.h"

#include <cmath>
#include <cstring>

#include "pool.h"

namespace bert_fast {
namespace {

constexpr int64_t kSamples = 64;  // of each weight
constexpr size_t kAlignment = 64 / sizeof(float);

float* aligned(std::vector<float>& storage, int64_t size) {
    storage.resize(size + kAlignment);
    const auto address = reinterpret_cast<uintptr_t>(storage.data());
    return storage.data() + (64 - address % 64) % 64 / sizeof(float);
}

}  // namespace

Encoder::Encoder(int64_t hidden_size, int64_t num_heads, int64_t intermediate_size, cpu::Gelu gelu) {
    shape_.hidden_size = hidden_size;
    shape_.intermediate_size = intermediate_size;
    shape_.gelu = gelu;
    shape_.attention.heads = num_heads;
    shape_.attention.head_size = hidden_size / num_heads;
    shape_.attention.scale = 1.0f / std::sqrt(static_cast<float>(shape_.attention.head_size));
}

cpu::Linear Encoder::pack(const LinearArrays& linear, int64_t outputs, int64_t inputs, int threads) {
    storage_.emplace_back();
    float* packed = aligned(storage_.back(), cpu::kernels().packed_size(outputs, inputs));
    cpu::kernels().pack_weight(linear.weight, outputs, inputs, packed, threads);
    const int64_t size = outputs * inputs;
    for (int64_t i = 0; i < std::min(kSamples, size); ++i) {
        const float* place = linear.weight + size * i / std::min(kSamples, size);
        samples_.push_back({place, *place});
    }
    return {packed, linear.bias};
}

void Encoder::add_layer(const LayerArrays& arrays, int threads) {
    const int64_t hidden = shape_.hidden_size;
    const int64_t inner = shape_.intermediate_size;
    layers_.push_back({pack(arrays.query, hidden, hidden, threads), pack(arrays.key, hidden, hidden, threads),
                       pack(arrays.value, hidden, hidden, threads),
                       pack(arrays.attention_output, hidden, hidden, threads),
                       pack(arrays.intermediate, inner, hidden, threads), pack(arrays.output, hidden, inner, threads),
                       arrays.attention_norm, arrays.output_norm});
    shape_.num_layers = num_layers();
}

bool Encoder::is_current() const {
    for (const Sample& sample : samples_)
        if (std::memcmp(sample.place, &sample.value, sizeof(float)) != 0) return false;
    return true;
}

void Encoder::run(const Tile* tiles, int64_t num_tiles, int64_t tile_size, int64_t tokens, const float* input,
                  const std::vector<float*>& outputs, int threads) const {
    cpu::EncoderShape shape = shape_;
    shape.attention.tiles = tiles;
    shape.attention.num_tiles = num_tiles;
    shape.attention.tile_size = tile_size;
    shape.attention.tokens = tokens;
    const Buffer<float> workspace(cpu::kernels().encoder_workspace(shape, threads));
    cpu::kernels().encoder(shape, layers_.data(), input, outputs.data(), workspace.data(), threads);
}

}  // namespace bert_fast
