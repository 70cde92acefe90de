// A stack of encoder layers whose weights are packed for the CPU kernels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arena.h"
#include "cpu/kernels.h"

namespace bert_fast {

class Encoder {
  public:
    // One linear layer as it was handed over: weight (outputs, inputs) dense, bias (outputs).
    struct LinearArrays {
        const float* weight;
        const float* bias;
    };

    struct LayerArrays {
        LinearArrays query, key, value, attention_output, intermediate, gate, output;
        cpu::Norm attention_norm, output_norm;
        int64_t window;
        int64_t rotation;
    };

    // Memory whose contents tell whether a weight is still what was packed: any plain array.
    struct Watched {
        const std::byte* data;
        int64_t elements;
        size_t element_size;  // at most that of Sample::bits
    };

    Encoder(int64_t hidden_size, int64_t num_heads, int64_t intermediate_size, cpu::Nonlinearity nonlinearity,
            cpu::Narrow narrow, bool norm_first, bool has_gates);
    Encoder(Encoder&&) = default;  // and no copy: the layers point into storage_

    static constexpr size_t kLinears = 7;  // in the order of LayerArrays; the gate is among them even where there is none

    // Packs the weights, those of the linear layers that `are_narrow` names as `narrow` says. Biases, norms and what is
    // watched are read where they lie: they must outlive this.
    void add_layer(const LayerArrays& arrays, const std::array<bool, kLinears>& are_narrow,
                   const std::vector<Watched>& watched, int threads);

    // Whether what is watched holds what it did, as far as some elements of each array show.
    bool is_current() const;

    bool is_norm_first() const { return shape_.norm_first; }
    bool has_gates() const { return shape_.has_gates; }
    bool has_windows() const { return has_windows_; }
    int64_t num_rotations() const { return num_rotations_; }
    bool has_narrow() const { return shape_.narrow != cpu::Narrow::none; }
    int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
    int64_t hidden_size() const { return shape_.hidden_size; }
    int64_t head_size() const { return shape_.attention.head_size; }
    int64_t num_heads() const { return shape_.attention.heads; }
    int64_t intermediate_size() const { return shape_.intermediate_size; }

    struct Batch {
        const Tile* tiles;
        int64_t num_tiles;
        int64_t tile_size;
        int64_t tokens;
        const int64_t* rows;  // of the last layer, see cpu::EncoderShape; null: all
        int64_t num_rows;
        cpu::RelativeBias bias;
        const cpu::Rotation* rotations;  // num_rotations
    };

    // outputs: one array (tokens, hidden_size) a layer, the last one (num_rows, hidden_size) where rows are given.
    void run(const Batch& batch, const float* input, const std::vector<float*>& outputs, int threads) const;

  private:
    struct Sample {
        const std::byte* place;
        size_t size;
        uint32_t bits;

        uint32_t now() const {
            uint32_t result = 0;
            std::memcpy(&result, place, size);
            return result;
        }
    };

    cpu::Linear pack(const LinearArrays& linear, int64_t outputs, int64_t inputs, bool is_narrow, int threads);
    void watch(const Watched& array);

    cpu::EncoderShape shape_{};
    std::vector<cpu::EncoderLayer> layers_;
    int64_t num_narrow_ = 0;
    int64_t num_rotations_ = 0;
    bool has_windows_ = false;
    Arena storage_;
    std::vector<Sample> samples_;
};

}  // namespace bert_fast
