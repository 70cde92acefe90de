// Matrix products in 8 bits: a scale for every column of the weight, and one for every kGroup values of a row of the
// activations, found when they are quantised. Activations are stored with kZero added, since the instruction takes an
// unsigned and a signed factor; what that adds to a column's sum is taken off again.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kGroup = 384;
constexpr int64_t kQuad = 4;  // values whose products an instruction adds up
constexpr int32_t kZero = 128;
constexpr float kLargestByte = 127.0f;

static_assert(kGroup % kPanel == 0 && kGroup % kQuad == 0, "a group is made of whole panels and whole quads");

inline int64_t num_groups(int64_t depth) { return (depth + kGroup - 1) / kGroup; }

// Not finite if any value is not. As integers, magnitudes have the order that they have as numbers, and NaN is the largest.
BERT_FAST_INLINE float largest_magnitude(const float* values, int64_t count) {
    IntVec largest{};
    by_vectors(count, [&](int64_t at, const auto& get, const auto&) BERT_FAST_LAMBDA {
        Vec value;
        get(values + at, value);
        const IntVec magnitude = bits_of(value) & kMagnitudeBits;
#if defined(__x86_64__) && BERT_FAST_LANES == 16
        largest = (IntVec)_mm512_max_epi32((__m512i)magnitude, (__m512i)largest);
#else
        largest = magnitude > largest ? magnitude : largest;
#endif
    });
    const auto larger_bits = [](const IntVec& a, const IntVec& b) BERT_FAST_LAMBDA { return a > b ? a : b; };
    const int32_t bits = fold<kLanes / 2>(largest, larger_bits);
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

BERT_FAST_INLINE void store_low_bytes(const IntVec& values, int64_t count, uint8_t* to) {
#if defined(__x86_64__) && BERT_FAST_LANES == 16
    const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)values);
    if (count == kLanes) {
        std::memcpy(to, &bytes, kLanes);
    } else {
        std::memcpy(to, &bytes, count);
    }
#else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(values[i]);
#endif
}

// bytes (rows x depth, row by row byte_row) and scales (rows x groups). What is not finite makes the scale NaN.
inline void quantise_rows(const float* x, int64_t x_row, int64_t rows, int64_t depth, uint8_t* bytes, int64_t byte_row,
                          float* scales) {
    const int64_t groups = num_groups(depth);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = x + row * x_row + group * kGroup;
            uint8_t* to = bytes + row * byte_row + group * kGroup;
            const int64_t size = std::min(kGroup, depth - group * kGroup);
            const float largest = largest_magnitude(from, size);
            const bool is_finite = largest <= std::numeric_limits<float>::max();
            scales[row * groups + group] =
                is_finite ? largest / kLargestByte : std::numeric_limits<float>::quiet_NaN();
            const float inverse = largest > 0.0f && is_finite ? kLargestByte / largest : 0.0f;
            by_vectors(size, [&](int64_t at, const auto& get, const auto&) BERT_FAST_LAMBDA {
                Vec value;
                get(from + at, value);
                store_low_bytes(bits_of(value * inverse + (kRounding + kZero)), std::min<int64_t>(kLanes, size - at), to + at);
            });
            if (group + 1 == groups) std::fill(to + size, to + round_up(size, kQuad), uint8_t{kZero});
        }
    }
}

int64_t padded_outputs(int64_t outputs) { return round_up(outputs, kLanes); }

int64_t quantised_size(int64_t outputs, int64_t inputs) {
    return round_up(outputs, kLanes) * round_up(inputs, kQuad);
}

// bytes: panels of quads; scales (outputs, rounded up to vectors); offsets (groups x the same): kZero times the sums of
// the weights.
void quantise_weight(const float* weight, int64_t outputs, int64_t inputs, int8_t* bytes, float* scales, int32_t* offsets,
                     int threads) {
    const int64_t depth = round_up(inputs, kQuad);
    const int64_t padded = round_up(outputs, kLanes);
    const int64_t groups = num_groups(inputs);
    std::memset(bytes, 0, quantised_size(outputs, inputs));
    std::fill_n(scales, padded, 0.0f);
    std::fill_n(offsets, groups * padded, 0);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t column = 0; column < outputs; ++column) {
        const float* row = weight + column * inputs;
        float largest = 0.0f;
        float nan = 0.0f;
        for (int64_t k = 0; k < inputs; ++k) {
            largest = std::max(largest, std::fabs(row[k]));
            nan += row[k] * 0.0f;
        }
        scales[column] = largest / kLargestByte + nan;
        const float inverse = largest > 0.0f && nan == 0.0f ? kLargestByte / largest : 0.0f;
        const int64_t panel = column / kPanel;
        const int64_t width = panel_vectors(outputs, panel) * kLanes;
        int8_t* to = bytes + panel * kPanel * depth + (column - panel * kPanel) * kQuad;
        for (int64_t k = 0; k < inputs; ++k) {
            const auto value = static_cast<int8_t>(nan == 0.0f ? std::nearbyint(row[k] * inverse) : 0.0f);
            to[k / kQuad * width * kQuad + k % kQuad] = value;
            offsets[k / kGroup * padded + column] += kZero * value;
        }
    }
}

// One group deep.
struct ByteStrip {
    const uint8_t* a;
    int64_t a_row;
    const float* a_scales;
    int64_t a_scale_row;
    const int8_t* b;
    int64_t steps;
    const float* b_scales;
    const int32_t* offsets;
};

template <int kRows, int kVectors>
BERT_FAST_INLINE void finish_byte_strip(const ByteStrip& s, const StripTarget& target,
                                        const IntVec (&sum)[kRows][kVectors]) {
    IntVec offsets[kVectors];
    Vec scales[kVectors];
    for (int j = 0; j < kVectors; ++j) {
        std::memcpy(&offsets[j], s.offsets + j * kLanes, sizeof(IntVec));
        load(s.b_scales + j * kLanes, scales[j]);
    }
    finish_strip<kRows, kVectors>(target, [&](int i, int j, const Vec& bias) BERT_FAST_LAMBDA {
        const Vec factor = s.a_scales[i * s.a_scale_row] * scales[j];
        return multiply_add(__builtin_convertvector(sum[i][j] - offsets[j], Vec), factor, bias);
    });
}

// In assembly, since GCC copies registers around the intrinsic, which costs half of the speed.
#if defined(__x86_64__) && BERT_FAST_LANES == 16
#define BERT_FAST_VNNI 1
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }
BERT_FAST_INLINE void add_quads_vnni(const IntVec& left, const IntVec& right, IntVec& sum) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
}
#elif defined(__x86_64__) && BERT_FAST_LANES == 8
#define BERT_FAST_VNNI 1
inline bool has_vnni() { return has_instructions(kAvxVnni); }
BERT_FAST_INLINE void add_quads_vnni(const IntVec& left, const IntVec& right, IntVec& sum) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
}
#endif

#ifdef BERT_FAST_VNNI
struct VnniStrips {
    using Strip = ByteStrip;

    template <int kRows, int kVectors>
    static void multiply(const Strip& s, const StripTarget& target) {
        IntVec sum[kRows][kVectors] = {};
        const auto add = [](const IntVec& left, const IntVec& right, IntVec& to) BERT_FAST_LAMBDA {
            add_quads_vnni(left, right, to);
        };
        accumulate_words(s.a, s.a_row, s.b, s.steps, target.ahead, sum, add);
        finish_byte_strip(s, target, sum);
    }
};
#endif

// sum[lane] += left[0] * right[lane][0] + ... + left[3] * right[lane][3], by way of 16 bits, which hold every factor.
BERT_FAST_INLINE void add_quads(uint32_t left, const IntVec& even, const IntVec& odd, IntVec& sum) {
    const auto left_even = static_cast<int32_t>(left & 0x00ff00ffu);
    const auto left_odd = static_cast<int32_t>((left >> 8) & 0x00ff00ffu);
#if defined(__x86_64__) && BERT_FAST_LANES == 16
    sum += (IntVec)_mm512_madd_epi16(_mm512_set1_epi32(left_even), (__m512i)even) +
           (IntVec)_mm512_madd_epi16(_mm512_set1_epi32(left_odd), (__m512i)odd);
#elif defined(__x86_64__) && BERT_FAST_LANES == 8
    sum += (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(left_even), (__m256i)even) +
           (IntVec)_mm256_madd_epi16(_mm256_set1_epi32(left_odd), (__m256i)odd);
#elif defined(__x86_64__)
    sum += (IntVec)_mm_madd_epi16(_mm_set1_epi32(left_even), (__m128i)even) +
           (IntVec)_mm_madd_epi16(_mm_set1_epi32(left_odd), (__m128i)odd);
#else
    sum += ((even << 16) >> 16) * (left_even & 0xffff) + (even >> 16) * (left_even >> 16) +
           ((odd << 16) >> 16) * (left_odd & 0xffff) + (odd >> 16) * (left_odd >> 16);
#endif
}

struct ByteStrips {
    using Strip = ByteStrip;

    template <int kRows, int kVectors>
    static void multiply(const Strip& s, const StripTarget& target) {
        typedef int16_t ShortVec __attribute__((vector_size(sizeof(IntVec))));
        IntVec sum[kRows][kVectors] = {};
        const int8_t* b = s.b;
        for (int64_t p = 0; p < s.steps; ++p, b += kVectors * kLanes * kQuad) {
            IntVec even[kVectors];
            IntVec odd[kVectors];
            for (int j = 0; j < kVectors; ++j) {
                ShortVec pairs;
                std::memcpy(&pairs, b + j * kLanes * kQuad, sizeof(pairs));
                even[j] = (IntVec)((pairs << 8) >> 8);
                odd[j] = (IntVec)(pairs >> 8);
            }
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                uint32_t quad;
                std::memcpy(&quad, s.a + i * s.a_row + p * kQuad, sizeof(quad));
#pragma GCC unroll 8
                for (int j = 0; j < kVectors; ++j) add_quads(quad, even[j], odd[j], sum[i][j]);
            }
        }
        finish_byte_strip(s, target, sum);
    }
};

// A is (rows x depth), quantised; of B the `depth` rows from first_depth on, which begins a group.
struct ByteFactors {
    const uint8_t* a;
    int64_t a_row;
    const float* a_scales;  // of the first group
    int64_t a_scale_row;
    const int8_t* panels;
    int64_t panel_steps;
    int64_t first_depth;
    int64_t depth;
    const float* b_scales;
    const int32_t* offsets;
    int64_t offset_row;

    const StripKernels<ByteStrips>& kernels() const {
#ifdef BERT_FAST_VNNI
        static const bool is_there = has_vnni() && !is_off("BERT_FAST_VNNI");
        if (is_there) return kStripKernels<VnniStrips>;
#endif
        return kStripKernels<ByteStrips>;
    }
    int64_t num_parts() const { return num_groups(depth); }
    int64_t first_step(int64_t part) const {
        return (first_depth + std::min(depth, part * kGroup) + kQuad - 1) / kQuad;
    }

    ByteStrip strip(int64_t row, int64_t column, int64_t part, const char* b, int64_t steps) const {
        return {a + row * a_row + part * kGroup,
                a_row,
                a_scales + row * a_scale_row + part,
                a_scale_row,
                reinterpret_cast<const int8_t*>(b),
                steps,
                b_scales + column,
                offsets + (first_depth / kGroup + part) * offset_row + column};
    }
};

}  // namespace bert_fast::cpu::BERT_FAST_ISA
