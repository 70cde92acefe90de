// Matrix products of bfloat16 factors with float32 sums, where the machine has an instruction for them. Two values of a row
// of A meet two rows of B in a step; factors below 2^-126 count as zero.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kPair = 2;

#if defined(__x86_64__) && BERT_FAST_LANES == 16
#define BERT_FAST_BFLOAT16 1
#endif

bool has_bfloat16() {
#ifdef BERT_FAST_BFLOAT16
    static const bool result = has_instructions(kAvx512Bfloat16);
    return result;
#else
    return false;
#endif
}

// To the nearest, ties to even.
BERT_FAST_INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// halves (rows x depth, row by row half_row), a zero behind an odd depth.
inline void round_rows(const float* x, int64_t x_row, int64_t rows, int64_t depth, uint16_t* halves, int64_t half_row) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * x_row;
        uint16_t* to = halves + row * half_row;
        int64_t i = 0;
#ifdef BERT_FAST_BFLOAT16
        for (; i + kLanes <= depth; i += kLanes) {
            Vec value;
            load(from + i, value);
            __m256i half;
            asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(value));
            std::memcpy(to + i, &half, sizeof(half));
        }
#endif
        for (; i < depth; ++i) to[i] = to_bfloat16(from[i]);
        if (depth % kPair != 0) to[depth] = 0;
    }
}

int64_t packed_halves_size(int64_t outputs, int64_t inputs) {
    return round_up(outputs, kLanes) * round_up(inputs, kPair);
}

// weight (outputs, inputs); halves: panels of pairs.
void pack_halves(const float* weight, int64_t outputs, int64_t inputs, uint16_t* halves, int threads) {
    const int64_t depth = round_up(inputs, kPair);
    const int64_t panels = num_panels(outputs);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = panel * kPanel;
        const int64_t width = panel_vectors(outputs, panel) * kLanes;
        uint16_t* to = halves + first * depth;
        std::memset(to, 0, width * depth * sizeof(uint16_t));
        for (int64_t column = 0; column < std::min(width, outputs - first); ++column) {
            const float* row = weight + (first + column) * inputs;
            for (int64_t k = 0; k < inputs; ++k) to[(k / kPair * width + column) * kPair + k % kPair] = to_bfloat16(row[k]);
        }
    }
}

struct HalfStrips {
    struct Strip {
        const uint16_t* a;
        int64_t a_row;
        const uint16_t* b;
        int64_t steps;
    };

    template <int kRows, int kVectors>
    static void multiply([[maybe_unused]] const Strip& s, [[maybe_unused]] const StripTarget& target) {
#ifdef BERT_FAST_BFLOAT16
        Vec sum[kRows][kVectors] = {};
        const auto add = [](const IntVec& left, const IntVec& right, Vec& to) BERT_FAST_LAMBDA {
            asm("vdpbf16ps %2, %1, %0" : "+v"(to) : "v"(left), "v"(right));
        };
        accumulate_words(s.a, s.a_row * static_cast<int64_t>(sizeof(uint16_t)), s.b, s.steps, target.ahead, sum, add);
        finish_strip(target, sum);
#endif
    }
};

// A is (rows x depth), rounded; of B the `depth` rows from first_depth on, which is even.
struct HalfFactors {
    const uint16_t* a;
    int64_t a_row;
    const uint16_t* panels;
    int64_t panel_steps;
    int64_t first_depth;
    int64_t depth;

    const StripKernels<HalfStrips>& kernels() const { return kStripKernels<HalfStrips>; }
    int64_t num_parts() const { return (depth + kDepthBlock - 1) / kDepthBlock; }
    int64_t first_step(int64_t part) const {
        return first_depth / kPair + (depth + kPair - 1) / kPair * part / num_parts();
    }

    HalfStrips::Strip strip(int64_t row, int64_t, int64_t part, const char* b, int64_t steps) const {
        return {a + row * a_row + (first_step(part) - first_depth / kPair) * kPair, a_row,
                reinterpret_cast<const uint16_t*>(b), steps};
    }
};

}  // namespace bert_fast::cpu::BERT_FAST_ISA
