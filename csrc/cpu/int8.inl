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

// bytes (rows x depth, row by row byte_row) and scales (rows x groups). What is not finite makes the scale NaN.
inline void quantise_rows(const float* x, int64_t x_row, int64_t rows, int64_t depth, uint8_t* bytes, int64_t byte_row,
                          float* scales) {
    const int64_t groups = num_groups(depth);
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t group = 0; group < groups; ++group) {
            const float* from = x + row * x_row + group * kGroup;
            uint8_t* to = bytes + row * byte_row + group * kGroup;
            const int64_t size = std::min(kGroup, depth - group * kGroup);
            float largest = 0.0f;
            float nan = 0.0f;
#pragma omp simd reduction(max : largest) reduction(+ : nan)
            for (int64_t i = 0; i < size; ++i) {
                const float magnitude = std::fabs(from[i]);
                largest = magnitude > largest ? magnitude : largest;
                nan += from[i] * 0.0f;
            }
            scales[row * groups + group] = largest / kLargestByte + nan;
            const float inverse = largest > 0.0f && nan == 0.0f ? kLargestByte / largest : 0.0f;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) {
                // 1.5 * 2^23: the sum rounds to an integer, which its last bits hold.
                const float shifted = (nan == 0.0f ? from[i] : 0.0f) * inverse + (12582912.0f + kZero);
                int32_t bits;
                std::memcpy(&bits, &shifted, sizeof(bits));
                to[i] = static_cast<uint8_t>(bits);
            }
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

// One panel of columns for one strip of rows, one group deep.
struct ByteStrip {
    const uint8_t* a;
    int64_t a_row;
    const float* a_scales;
    int64_t a_scale_row;
    const int8_t* b;
    int64_t quads;
    const float* b_scales;
    const int32_t* offsets;
    const float* bias;  // or null
    float* c;
    int64_t c_row;
    bool accumulates;
    const char* ahead;  // see Strip
};

template <int kRows, int kVectors>
BERT_FAST_INLINE void finish_byte_strip(const ByteStrip& s, const IntVec (&sum)[kRows][kVectors]) {
    IntVec offsets[kVectors];
    Vec scales[kVectors];
    Vec bias[kVectors] = {};
    for (int j = 0; j < kVectors; ++j) {
        std::memcpy(&offsets[j], s.offsets + j * kLanes, sizeof(IntVec));
        load(s.b_scales + j * kLanes, scales[j]);
        if (s.bias != nullptr) load(s.bias + j * kLanes, bias[j]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        const float scale = s.a_scales[i * s.a_scale_row];
        float* row = s.c + i * s.c_row;
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            Vec value = __builtin_convertvector(sum[i][j] - offsets[j], Vec) * (scale * scales[j]) + bias[j];
            if (s.accumulates) {
                Vec before;
                load(row + j * kLanes, before);
                value += before;
            }
            store(value, row + j * kLanes);
        }
    }
}

#if defined(__x86_64__) && BERT_FAST_LANES == 16
#define BERT_FAST_VNNI 1

// In assembly, since GCC copies registers around the intrinsic, which costs half of the speed.
template <int kRows, int kVectors>
void multiply_byte_strip_vnni(const ByteStrip& s) {
    IntVec sum[kRows][kVectors] = {};
    const int8_t* b = s.b;
    // Where nothing is to be fetched, lines that are here already: a condition would cost more than they do.
    const char* ahead = s.ahead == nullptr ? reinterpret_cast<const char*>(b) : s.ahead;
    for (int64_t p = 0; p < s.quads; ++p, b += kVectors * kLanes * kQuad) {
        fetch_lines(ahead + p * kLinesAhead * kLine);
        __m512i right[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_si512(b + j * kLanes * kQuad);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            int32_t quad;
            std::memcpy(&quad, s.a + i * s.a_row + p * kQuad, sizeof(quad));
            const __m512i left = _mm512_set1_epi32(quad);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j)
                asm("vpdpbusd %2, %1, %0" : "+v"(sum[i][j]) : "v"(left), "v"(right[j]));
        }
    }
    finish_byte_strip<kRows, kVectors>(s, sum);
}
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

template <int kRows, int kVectors>
void multiply_byte_strip(const ByteStrip& s) {
    typedef int16_t ShortVec __attribute__((vector_size(sizeof(IntVec))));
    IntVec sum[kRows][kVectors] = {};
    const int8_t* b = s.b;
    for (int64_t p = 0; p < s.quads; ++p, b += kVectors * kLanes * kQuad) {
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
    finish_byte_strip<kRows, kVectors>(s, sum);
}

using ByteStripKernel = void (*)(const ByteStrip&);
using ByteStripKernels = std::array<std::array<ByteStripKernel, kTileRows>, kTileVectors>;

template <int kVectors, int... kRows>
void fill_byte_kernels([[maybe_unused]] bool has_vnni, std::array<ByteStripKernel, kTileRows>& kernels,
                       std::integer_sequence<int, kRows...>) {
    ((kernels[kRows] = multiply_byte_strip<kRows + 1, kVectors>), ...);
#ifdef BERT_FAST_VNNI
    if (has_vnni) ((kernels[kRows] = multiply_byte_strip_vnni<kRows + 1, kVectors>), ...);
#endif
}

template <int... kVectors>
ByteStripKernels byte_kernels(bool has_vnni, std::integer_sequence<int, kVectors...>) {
    ByteStripKernels kernels{};
    (fill_byte_kernels<kVectors + 1>(has_vnni, kernels[kVectors], std::make_integer_sequence<int, kTileRows>()), ...);
    return kernels;
}

inline const ByteStripKernels& byte_strip_kernels() {
#ifdef BERT_FAST_VNNI
    static const bool has_vnni = __builtin_cpu_supports("avx512vnni");
#else
    static const bool has_vnni = false;
#endif
    static const ByteStripKernels kernels = byte_kernels(has_vnni, std::make_integer_sequence<int, kTileVectors>());
    return kernels;
}

// As Product in gemm.inl; depth is a part of the whole in groups.
struct ByteProduct {
    const uint8_t* a;
    int64_t a_row;
    const float* a_scales;  // of the first group
    int64_t a_scale_row;
    int64_t rows;
    Quantised b;
    int64_t panel_depth;
    int64_t first_depth;  // a multiple of kGroup
    int64_t depth;
    int64_t columns;
    const float* bias;
    float* c;
    int64_t c_row;
    int64_t first_column;
    bool accumulates;
};

template <typename Finish>
void multiply_byte_panels(const ByteProduct& product, int64_t first_panel, int64_t last_panel, const Finish& finish) {
    const ByteStripKernels& kernels = byte_strip_kernels();
    const Strips strips(product.rows);
    const int64_t padded = round_up(product.columns, kLanes);
    const int64_t groups = num_groups(product.depth);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t column = panel * kPanel;
        const int vectors = panel_vectors(product.columns, panel);
        const int64_t width = vectors * kLanes;
        alignas(64) float bias[kPanel] = {};
        if (product.bias != nullptr)
            std::memcpy(bias, product.bias + column, std::min(width, product.columns - column) * sizeof(float));
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t start = group * kGroup;
            const int64_t whole_start = product.first_depth + start;
            const bool is_last = group + 1 == groups;
            const int8_t* b = product.b.weight + column * round_up(product.panel_depth, kQuad) + whole_start * width;
            const int64_t quads = (std::min(kGroup, product.depth - start) + kQuad - 1) / kQuad;
            const char* ahead = reinterpret_cast<const char*>(b + round_up(product.panel_depth, kQuad) * width);
            const int64_t strip_bytes = quads * kLinesAhead * kLine;
            for (int64_t strip = 0; strip < strips.count; ++strip) {
                const int64_t row = strips.begin(strip);
                const int64_t rows = strips.begin(strip + 1) - row;
                float* c = product.c + row * product.c_row + column - product.first_column;
                kernels[vectors - 1][rows - 1](
                    {product.a + row * product.a_row + start, product.a_row, product.a_scales + row * product.a_scale_row + group,
                     product.a_scale_row, b, quads, product.b.scales + column,
                     product.b.offsets + whole_start / kGroup * padded + column,
                     is_last && product.bias != nullptr ? bias : nullptr, c, product.c_row,
                     product.accumulates || group > 0,
                     panel + 1 < last_panel && strip * strip_bytes < quads * kQuad * width ? ahead + strip * strip_bytes
                                                                                           : nullptr});
                if (is_last) finish(c, product.c_row, rows, width);
            }
        }
    }
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
