// Philox, many counters at a time, and the dropout masks that kernels/_random.py defines.

namespace bert_fast::cpu::BERT_FAST_ISA {

// Philox on one counter per 64-bit lane. The products need only the lower halves, so the upper ones may hold anything.
constexpr int kCounters = kLanes / 2;
typedef uint64_t Wide __attribute__((vector_size(kCounters * sizeof(uint64_t))));

BERT_FAST_INLINE Wide multiply_lower(Wide a, uint32_t b) {
    const Wide factor = Wide{} + b;
#if BERT_FAST_LANES == 16
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)factor);
#elif BERT_FAST_LANES == 8
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)factor);
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)factor);
#else
    return (a & 0xFFFFFFFFu) * factor;
#endif
}

template <int kRounds, int kVectors>
BERT_FAST_INLINE void philox(uint64_t seed, Wide (&c0)[kVectors], Wide (&c1)[kVectors], Wide (&c2)[kVectors],
                             Wide (&c3)[kVectors]) {
    uint32_t key0 = static_cast<uint32_t>(seed);
    uint32_t key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) {
            const Wide product0 = multiply_lower(c0[i], Philox::kMultiplier0);
            const Wide product1 = multiply_lower(c2[i], Philox::kMultiplier1);
            c0[i] = (product1 >> 32) ^ c1[i] ^ (Wide{} + key0);
            c1[i] = product1;
            c2[i] = (product0 >> 32) ^ c3[i] ^ (Wide{} + key1);
            c3[i] = product0;
        }
        key0 += Philox::kWeyl0;
        key1 += Philox::kWeyl1;
    }
}

// Counters at once: enough that the rounds of one vector hide behind another's.
constexpr int kVectors = 4;
constexpr int kStep = kVectors * kCounters;

BERT_FAST_INLINE void store_lower(const Wide& words, uint32_t* to) {
    typedef uint32_t Narrow __attribute__((vector_size(kCounters * sizeof(uint32_t))));
    const Narrow lower = __builtin_convertvector(words, Narrow);
    std::memcpy(to, &lower, sizeof(Narrow));
}

// factors[j], for j below `keys` rounded up to a multiple of 4 * kStep: what the probability of key j is multiplied with.
// Counter 8 * b + r holds the numbers of keys 32 * b + 8 * word + r, of query i in the upper half, of i + 8 in the lower.
inline void dropout_factors(const Dropout& dropout, int64_t sequence_start, int64_t head, int64_t query, int64_t keys,
                            float* factors) {
    const uint64_t query_group = static_cast<uint64_t>((query & 7) | ((query >> 4) << 3));
    const int shift = (query & 8) != 0 ? 16 : 0;
    const uint32_t threshold = dropout.threshold << 16;
    for (int64_t counter = 0; 4 * counter < keys; counter += kStep) {
        Wide c[4][kVectors];
        for (int i = 0; i < kVectors; ++i) {
            for (int lane = 0; lane < kCounters; ++lane)
                c[0][i][lane] = static_cast<uint64_t>(counter + i * kCounters + lane);
            c[1][i] = Wide{} + query_group;
            c[2][i] = Wide{} + static_cast<uint64_t>(sequence_start);
            c[3][i] = Wide{} + static_cast<uint64_t>(head);
        }
        philox<Dropout::kRounds>(dropout.key, c[0], c[1], c[2], c[3]);
        uint32_t words[4][kStep];
        for (int word = 0; word < 4; ++word)
            for (int i = 0; i < kVectors; ++i) store_lower(c[word][i], &words[word][i * kCounters]);
        for (int block = 0; block < kStep; block += 8) {
            float* target = factors + 4 * (counter + block);
            for (int word = 0; word < 4; ++word)
                for (int i = 0; i < 8; ++i)
                    target[8 * word + i] = (words[word][block + i] << shift) >= threshold ? dropout.scale : 0.0f;
        }
    }
}

// Features of a row whose factors are drawn together, and so what a row of factors is rounded up to.
constexpr int64_t kDrawnFeatures = 8 * kStep;

// factors[i], for i below `width` rounded up to a multiple of kDrawnFeatures: what feature i of a row is multiplied with.
// Counter c holds the numbers of features 8 * c + 2 * word, in the upper half, and of the one after it, in the lower.
inline void feature_factors(const Dropout& dropout, int64_t row, int64_t width, float* factors) {
    const uint32_t threshold = dropout.threshold << 16;
    for (int64_t counter = 0; 8 * counter < width; counter += kStep) {
        Wide c[4][kVectors];
        for (int i = 0; i < kVectors; ++i) {
            for (int lane = 0; lane < kCounters; ++lane)
                c[0][i][lane] = static_cast<uint64_t>(counter + i * kCounters + lane);
            c[1][i] = Wide{} + (static_cast<uint64_t>(row) & 0xFFFFFFFFu);
            c[2][i] = Wide{} + (static_cast<uint64_t>(row) >> 32);
            c[3][i] = Wide{};
        }
        philox<Dropout::kRounds>(dropout.key, c[0], c[1], c[2], c[3]);
        uint32_t words[4][kStep];
        for (int word = 0; word < 4; ++word)
            for (int i = 0; i < kVectors; ++i) store_lower(c[word][i], &words[word][i * kCounters]);
        float* target = factors + 8 * counter;
        for (int i = 0; i < kStep; ++i) {
            for (int word = 0; word < 4; ++word) {
                target[8 * i + 2 * word] = words[word][i] >= threshold ? dropout.scale : 0.0f;
                target[8 * i + 2 * word + 1] = (words[word][i] << 16) >= threshold ? dropout.scale : 0.0f;
            }
        }
    }
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
