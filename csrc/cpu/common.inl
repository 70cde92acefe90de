// Shared by the kernels of one instruction set. BERT_FAST_ISA names its namespace, BERT_FAST_LANES its vector width.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int kLanes = BERT_FAST_LANES;
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

#define BERT_FAST_INLINE inline __attribute__((always_inline))
#define BERT_FAST_LAMBDA __attribute__((always_inline))

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define BERT_FAST_SHUFFLES 1
#endif
#endif

BERT_FAST_INLINE void load(const float* from, Vec& to) { std::memcpy(&to, from, sizeof(Vec)); }
BERT_FAST_INLINE void store(const Vec& from, float* to) { std::memcpy(to, &from, sizeof(Vec)); }

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

BERT_FAST_INLINE Vec broadcast(float value) { return Vec{} + value; }

// a > b ? a : b and a < b ? a : b, so b where one of them is NaN: an instruction, which compilers do not make of that.
BERT_FAST_INLINE Vec larger(const Vec& a, const Vec& b) {
#if defined(__x86_64__) && BERT_FAST_LANES == 16
    return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__x86_64__) && BERT_FAST_LANES == 8
    return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}
BERT_FAST_INLINE Vec smaller(const Vec& a, const Vec& b) {
#if defined(__x86_64__) && BERT_FAST_LANES == 16
    return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__x86_64__) && BERT_FAST_LANES == 8
    return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// a * b + c where it must not depend on the surroundings whether it is rounded once or twice.
BERT_FAST_INLINE Vec multiply_add(const Vec& a, const Vec& b, const Vec& c) {
#if defined(__x86_64__) && BERT_FAST_LANES == 16
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__x86_64__) && BERT_FAST_LANES == 8
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

BERT_FAST_INLINE IntVec bits_of(const Vec& values) {
    IntVec result;
    std::memcpy(&result, &values, sizeof(result));
    return result;
}
BERT_FAST_INLINE Vec from_bits(const IntVec& bits) {
    Vec result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}
constexpr int32_t kMagnitudeBits = 0x7fffffff;
BERT_FAST_INLINE Vec magnitude_of(const Vec& values) { return from_bits(bits_of(values) & kMagnitudeBits); }

// As load and store, for the first lanes alone; the others are zero.
BERT_FAST_INLINE void load_some(const float* from, int64_t count, Vec& to) {
    to = Vec{};
    std::memcpy(&to, from, count * sizeof(float));
}
BERT_FAST_INLINE void store_some(const Vec& from, int64_t count, float* to) { std::memcpy(to, &from, count * sizeof(float)); }

// body(i, get, put) for every vector of a row, the last of which may be a part of one: get and put are load and store.
template <typename Body>
BERT_FAST_INLINE void by_vectors(int64_t width, const Body& body) {
    int64_t i = 0;
    const auto get = [](const float* from, Vec& to) BERT_FAST_LAMBDA { load(from, to); };
    const auto put = [](const Vec& from, float* to) BERT_FAST_LAMBDA { store(from, to); };
    for (; i + kLanes <= width; i += kLanes) body(i, get, put);
    if (i == width) return;
    const int64_t rest = width - i;
    const auto get_some = [rest](const float* from, Vec& to) BERT_FAST_LAMBDA { load_some(from, rest, to); };
    const auto put_some = [rest](const Vec& from, float* to) BERT_FAST_LAMBDA { store_some(from, rest, to); };
    body(i, get_some, put_some);
}

// All lanes in one, halves with halves: a chain of as many steps as there are lanes would take longer than many a row.
template <int kStep, typename Values, int... kLane>
BERT_FAST_INLINE void exchange_halves(const Values& values, Values& to, std::integer_sequence<int, kLane...>) {
#ifdef BERT_FAST_SHUFFLES
    to = __builtin_shufflevector(values, values, (kLane ^ kStep)...);
#else
    ((to[kLane] = values[kLane ^ kStep]), ...);
#endif
}

template <int kStep, typename Values, typename Combine>
BERT_FAST_INLINE auto fold(const Values& values, const Combine& combine) {
    if constexpr (kStep == 0) {
        return values[0];
    } else {
        Values other;
        exchange_halves<kStep>(values, other, std::make_integer_sequence<int, kLanes>());
        return fold<kStep / 2>(combine(values, other), combine);
    }
}

BERT_FAST_INLINE float sum_of_lanes(const Vec& values) {
    return fold<kLanes / 2>(values, [](const Vec& a, const Vec& b) BERT_FAST_LAMBDA { return a + b; });
}
BERT_FAST_INLINE float largest_of_lanes(const Vec& values) {
    return fold<kLanes / 2>(values, [](const Vec& a, const Vec& b) BERT_FAST_LAMBDA { return larger(a, b); });
}

constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: a sum with it rounds to an integer, which its last bits hold

// value * 2^n, n being held by the last bits of `shifted`.
BERT_FAST_INLINE Vec scale_by_power(const Vec& value, const Vec& shifted) {
    return from_bits(bits_of(value) + (bits_of(shifted) << 23));
}

// e^x, two units in the last place; below -86.6 the result is that of -86.6, 2.4e-38, and above 88.37 that of 88.37.
BERT_FAST_INLINE Vec exp_of(Vec x) {
    x = smaller(broadcast(88.37f), larger(broadcast(-86.6f), x));
    const Vec shifted = x * 1.44269504f + kRounding;
    const Vec n = shifted - kRounding;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = broadcast(0.0013933884f);
    p = p * r + 0.008363335f;
    p = p * r + 0.041666463f;
    p = p * r + 0.16666576f;
    p = p * r + 0.5f;
    return scale_by_power(p * r * r + r + 1.0f, shifted);
}

// 2^x for x <= 0, two units in the last place; below -125 the result is that of -125, 2.4e-38.
BERT_FAST_INLINE Vec exp2_nonpositive(Vec x) {
    x = larger(broadcast(-125.0f), x);
    const Vec shifted = x + kRounding;
    const Vec r = x - (shifted - kRounding);
    Vec p = broadcast(0.0013264727f);
    p = p * r + 0.009671513f;
    p = p * r + 0.055507336f;
    p = p * r + 0.24022242f;
    p = p * r + 0.693147f;
    return scale_by_power(p * r + 1.0f, shifted);
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
