// The inner loops of masking.cpp.

namespace bert_fast::cpu::BERT_FAST_ISA {

// ---- unpad ---------------------------------------------------------------------------------------------------------

constexpr int64_t kMaskBlock = 64;

// Skips whole blocks of nothing but zeros (kIsZero) or without any; returns where the first other block begins.
template <bool kIsZero, typename T>
BERT_FAST_INLINE int64_t skip_blocks(const T* values, int64_t start, int64_t count) {
    for (; start + kMaskBlock <= count; start += kMaskBlock) {
        T found = 0;
        for (int64_t i = 0; i < kMaskBlock; ++i)
            found |= kIsZero ? values[start + i] : static_cast<T>(values[start + i] == 0);
        if (found) break;
    }
    return start;
}

// Adds the leading values of a block that are not zero to `length`; returns whether all that follow are zero. Without
// branches on the values: where a row ends is what nothing can predict.
template <typename T>
BERT_FAST_INLINE bool ends_in_block(const T* values, int64_t count, int64_t& length) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>(values[i] != 0) << i;
    length += __builtin_popcountll(bits);
    return (bits & (bits + 1)) == 0;
}

template <typename T>
BERT_FAST_INLINE int32_t prefix_length(const T* values, int64_t count) {
    int64_t length = skip_blocks<false>(values, 0, count);
    int64_t next = length;
    if (next + kMaskBlock <= count) {
        if (!ends_in_block(values + next, kMaskBlock, length)) return -1;
        next = skip_blocks<true>(values, next + kMaskBlock, count);
    }
    if (next + kMaskBlock <= count) return -1;
    if (next < count) {
        const int64_t before = length;
        if (!ends_in_block(values + next, count - next, length)) return -1;
        if (before != next && length != before) return -1;
    }
    return static_cast<int32_t>(length);
}

template <typename T>
void prefix_lengths_of(const MaskView& mask, int64_t first_row, int64_t last_row, int32_t* lengths) {
    for (int64_t row = first_row; row < last_row; ++row)
        lengths[row] = prefix_length(static_cast<const T*>(mask.data) + row * mask.columns, mask.columns);
}

void prefix_lengths(const MaskView& mask, int64_t first_row, int64_t last_row, int32_t* lengths) {
    switch (mask.type) {
        case MaskType::uint8: return prefix_lengths_of<uint8_t>(mask, first_row, last_row, lengths);
        case MaskType::int16: return prefix_lengths_of<int16_t>(mask, first_row, last_row, lengths);
        case MaskType::int32: return prefix_lengths_of<int32_t>(mask, first_row, last_row, lengths);
        case MaskType::int64: return prefix_lengths_of<int64_t>(mask, first_row, last_row, lengths);
        default: std::fill(lengths + first_row, lengths + last_row, -1);  // rare: the plain way serves them
    }
}

void fill_sequence(int64_t first, int64_t count, int64_t* indices, int32_t* positions) {
    for (int64_t i = 0; i < count; ++i) {
        indices[i] = first + i;
        positions[i] = static_cast<int32_t>(i);
    }
}

// ---- mask_tokens ---------------------------------------------------------------------------------------------------

bool copy_ids(const int64_t* ids, int64_t count, int64_t limit, int64_t* masked_ids, int64_t* labels) {
    // A negative id is above every limit when it is read as unsigned.
    uint64_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, static_cast<uint64_t>(ids[i]));
        masked_ids[i] = ids[i];
        labels[i] = kIgnoredLabel;
    }
    return largest < static_cast<uint64_t>(limit);
}

// One bit for each of 16 words that is at most `last`.
BERT_FAST_INLINE uint32_t bits_at_most(const uint32_t* words, uint32_t last) {
#if BERT_FAST_LANES == 16
    return _mm512_cmple_epu32_mask(_mm512_loadu_si512(words), _mm512_set1_epi32(static_cast<int32_t>(last)));
#elif BERT_FAST_LANES == 8
    uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 * half));
        const __m256i lower = _mm256_min_epu32(word, _mm256_set1_epi32(static_cast<int32_t>(last)));
        const __m256i is_lower = _mm256_cmpeq_epi32(lower, word);
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_lower))) << (8 * half);
    }
    return bits;
#else
    uint32_t bits = 0;
    for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(words[i] <= last) << i;
    return bits;
#endif
}

void select_columns(uint64_t seed, uint64_t row, int64_t columns, uint32_t last, uint64_t* bits) {
    // 64 columns share 16 counters: word w of counter 16 * n + i belongs to column 64 * n + 16 * w + i.
    constexpr int kGroup = 16;
    constexpr int kBlocks = kStep > kGroup ? kStep / kGroup : 1;
    alignas(64) uint32_t words[4][kBlocks * kGroup];
    const int64_t blocks = (columns + 63) / 64;
    for (int64_t block = 0; block < blocks; block += kBlocks) {
        for (int start = 0; start < kBlocks * kGroup; start += kStep) {
            Wide c[4][kVectors];
            for (int i = 0; i < kVectors; ++i) {
                for (int lane = 0; lane < kCounters; ++lane)
                    c[0][i][lane] = static_cast<uint64_t>(block * kGroup + start + i * kCounters + lane);
                c[1][i] = Wide{} + row;
                c[2][i] = Wide{} + (row >> 32);
                c[3][i] = Wide{} + uint64_t{kSelectPurpose};
            }
            philox<Philox::kRounds>(seed, c[0], c[1], c[2], c[3]);
            for (int word = 0; word < 4; ++word)
                for (int i = 0; i < kVectors; ++i) store_lower(c[word][i], &words[word][start + i * kCounters]);
        }
        for (int64_t next = block; next < std::min(blocks, block + kBlocks); ++next) {
            bits[next] = 0;
            for (int word = 0; word < 4; ++word)
                bits[next] |= uint64_t{bits_at_most(&words[word][(next - block) * kGroup], last)} << (kGroup * word);
        }
    }
}

void draw_replacements(uint64_t seed, uint64_t first_row, const uint32_t* columns, const uint32_t* rows, int64_t count,
                       uint32_t vocab_size, const uint32_t* special_ids, int64_t num_special, uint32_t* actions,
                       uint32_t* random_ids) {
    const uint32_t num_ordinary = vocab_size - static_cast<uint32_t>(num_special);
    for (int64_t start = 0; start < count; start += kStep) {
        const int64_t size = std::min<int64_t>(kStep, count - start);
        uint64_t column[kStep] = {};
        uint64_t row[kStep] = {};
        std::copy_n(columns + start, size, column);
        std::copy_n(rows + start, size, row);
        Wide c[4][kVectors];
        for (int i = 0; i < kVectors; ++i) {
            std::memcpy(&c[0][i], column + i * kCounters, sizeof(Wide));
            std::memcpy(&c[1][i], row + i * kCounters, sizeof(Wide));
            c[1][i] += first_row;
            c[2][i] = c[1][i] >> 32;
            c[3][i] = Wide{} + uint64_t{kReplacePurpose};
        }
        philox<Philox::kRounds>(seed, c[0], c[1], c[2], c[3]);
        uint32_t action[kStep];
        uint32_t id[kStep];
        for (int i = 0; i < kVectors; ++i) {
            store_lower(c[0][i], action + i * kCounters);
            store_lower(multiply_lower(c[1][i], num_ordinary) >> 32, id + i * kCounters);
        }
        // The n-th id among those that are not special.
        for (int64_t n = 0; n < num_special; ++n)
            for (int lane = 0; lane < kStep; ++lane) id[lane] += special_ids[n] <= id[lane] ? 1u : 0u;
        std::copy_n(action, size, actions + start);
        std::copy_n(id, size, random_ids + start);
    }
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
