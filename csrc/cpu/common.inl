// Shared by the kernels of one instruction set. BERT_FAST_ISA names its namespace, BERT_FAST_LANES its vector width.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int kLanes = BERT_FAST_LANES;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

#define BERT_FAST_INLINE inline __attribute__((always_inline))

BERT_FAST_INLINE void load(const float* from, Vec& to) { std::memcpy(&to, from, sizeof(Vec)); }
BERT_FAST_INLINE void store(const Vec& from, float* to) { std::memcpy(to, &from, sizeof(Vec)); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BERT_FAST_SHUFFLES 1
#endif
#endif

#ifdef BERT_FAST_SHUFFLES
// Exchanges the off-diagonal blocks of size kStep in every square of 2 * kStep rows and columns (Eklundh 1972).
template <int kStep, int... kLane>
BERT_FAST_INLINE void exchange_blocks(Vec (&rows)[kLanes], std::integer_sequence<int, kLane...>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if ((i & kStep) != 0) continue;
        const Vec upper = rows[i];
        const Vec lower = rows[i + kStep];
        rows[i] = __builtin_shufflevector(upper, lower, ((kLane & kStep) == 0 ? kLane : kLanes + kLane - kStep)...);
        rows[i + kStep] = __builtin_shufflevector(upper, lower, ((kLane & kStep) == 0 ? kLane + kStep : kLanes + kLane)...);
    }
}

template <int kStep>
BERT_FAST_INLINE void transpose_square(Vec (&rows)[kLanes]) {
    exchange_blocks<kStep>(rows, std::make_integer_sequence<int, kLanes>());
    if constexpr (kStep > 1) transpose_square<kStep / 2>(rows);
}
#endif

// Of the calling thread, in its team.
inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Terms of a sum that are added one after another; long sums are sums of such sums, which keeps their digits.
constexpr int64_t kSumBlock = 256;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

BERT_FAST_INLINE Vec broadcast(float value) { return Vec{} + value; }

// e^x for x <= 0, two units in the last place; below -86.6 the result is that of -86.6, 2.4e-38.
BERT_FAST_INLINE Vec exp_nonpositive(Vec x) {
    x = x < -86.6f ? broadcast(-86.6f) : x;
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer, which its last bits hold
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = broadcast(0.0013933884f);
    p = p * r + 0.008363335f;
    p = p * r + 0.041666463f;
    p = p * r + 0.16666576f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    IntVec exponent;
    IntVec bits;
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    std::memcpy(&bits, &p, sizeof(bits));
    bits += exponent << 23;  // n, in the place of the exponent
    std::memcpy(&p, &bits, sizeof(p));
    return p;
}

// Two units in the last place; below -86.6 the result is that of -86.6, 2.4e-38.
BERT_FAST_INLINE float exp_f32(float x) {
    x = x < -86.6f ? -86.6f : x;
    x = x > 88.37f ? 88.37f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    float p = 0.0013933884f;
    p = p * r + 0.008363335f;
    p = p * r + 0.041666463f;
    p = p * r + 0.16666576f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    int32_t bits;
    int32_t exponent;
    std::memcpy(&bits, &p, sizeof(bits));
    std::memcpy(&exponent, &shifted, sizeof(exponent));
    bits = static_cast<int32_t>(static_cast<uint32_t>(bits) + (static_cast<uint32_t>(exponent) << 23));
    std::memcpy(&p, &bits, sizeof(p));
    return p;
}

// Column sums over many rows: float over 64 rows, double over those, and one sum per chunk. The chunks depend on the
// number of rows alone, so neither the threads nor their order change a bit of the result.
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kRowsPerBlock = 64;

struct Chunks {
    int64_t rows;
    int64_t count;
    explicit Chunks(int64_t rows_)
        : rows(rows_), count(std::min(kMaxChunks, (rows_ + kRowsPerBlock - 1) / kRowsPerBlock)) {}
    int64_t begin(int64_t chunk) const { return rows * chunk / count; }
};

class ColumnSums {
  public:
    ColumnSums(int64_t chunks, int64_t width) : width_(width), sums_(chunks * width, 0.0) {}

    void add(int64_t chunk, const float* block) {
        double* sums = sums_.data() + chunk * width_;
#pragma omp simd
        for (int64_t i = 0; i < width_; ++i) sums[i] += block[i];
    }

    void finish(float* out) const {
        for (int64_t i = 0; i < width_; ++i) {
            double total = 0.0;
            for (size_t at = i; at < sums_.size(); at += width_) total += sums_[at];
            out[i] = static_cast<float>(total);
        }
    }

  private:
    int64_t width_;
    std::vector<double> sums_;
};

}  // namespace bert_fast::cpu::BERT_FAST_ISA
