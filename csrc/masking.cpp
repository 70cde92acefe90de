#include "masking.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iomanip>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "philox.h"

// The integer loops below gain from wide registers; the best version is picked when the library is loaded.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define BERT_FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BERT_FAST_CLONES
#endif

namespace bert_fast {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// ---- unpad ---------------------------------------------------------------------------------------------------------

// Skips whole blocks of nothing but zeros (kIsZero) or without any; returns where the first other block begins.
template <bool kIsZero, int64_t kBlock, typename T>
inline __attribute__((always_inline)) int64_t skip_blocks(const T* values, int64_t start, int64_t count) {
    for (; start + kBlock <= count; start += kBlock) {
        T found = 0;
        for (int64_t i = 0; i < kBlock; ++i)
            found |= kIsZero ? values[start + i] : static_cast<T>(values[start + i] == 0);
        if (found) break;
    }
    return start;
}

// Leading elements that are not zero, if all that follow are zero; -1 otherwise. One pass, by blocks that fill registers.
template <typename T>
inline __attribute__((always_inline)) int64_t prefix_length(const T* values, int64_t count) {
    constexpr int64_t kBlock = 256 / sizeof(T);
    int64_t length = skip_blocks<false, kBlock>(values, 0, count);
    length = skip_blocks<false, 8>(values, length, count);
    while (length < count && values[length] != 0) ++length;
    int64_t next = skip_blocks<true, kBlock>(values, length, count);
    next = skip_blocks<true, 8>(values, next, count);
    while (next < count && values[next] == 0) ++next;
    return next == count ? length : -1;
}

BERT_FAST_CLONES int64_t prefix_length_of(const uint8_t* values, int64_t count) { return prefix_length(values, count); }
BERT_FAST_CLONES int64_t prefix_length_of(const int16_t* values, int64_t count) { return prefix_length(values, count); }
BERT_FAST_CLONES int64_t prefix_length_of(const int32_t* values, int64_t count) { return prefix_length(values, count); }
BERT_FAST_CLONES int64_t prefix_length_of(const int64_t* values, int64_t count) { return prefix_length(values, count); }
int64_t prefix_length_of(const float*, int64_t) { return -1; }  // masks of floats are rare: the plain way serves them
int64_t prefix_length_of(const double*, int64_t) { return -1; }

BERT_FAST_CLONES void fill_sequence(int64_t first, int64_t count, int64_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = first + i;
}

template <typename Function>
void with_type(MaskType type, const void* data, Function&& function) {
    switch (type) {
        case MaskType::uint8: return function(static_cast<const uint8_t*>(data));
        case MaskType::int16: return function(static_cast<const int16_t*>(data));
        case MaskType::int32: return function(static_cast<const int32_t*>(data));
        case MaskType::int64: return function(static_cast<const int64_t*>(data));
        case MaskType::float32: return function(static_cast<const float*>(data));
        case MaskType::float64: return function(static_cast<const double*>(data));
    }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_extra(const uint8_t* keep_row, bool keep_first, int64_t column) {
    return (keep_first && column == 0) || (keep_row != nullptr && keep_row[column] != 0);
}

void append_tiles(int32_t start, int32_t num_rows, int32_t num_keys, int64_t tile_size, Tile*& out) {
    for (int64_t first = 0; first < num_rows; first += tile_size)
        *out++ = {start, num_rows, num_keys, static_cast<int32_t>(first)};
}

}  // namespace

RowCounts count_rows(const MaskView& mask, const uint8_t* keep, bool keep_first, int64_t tile_size, int threads) {
    if (mask.rows * mask.columns > std::numeric_limits<int32_t>::max())
        fail("mask has " + std::to_string(mask.rows) + " x " + std::to_string(mask.columns) +
             " elements; a batch may have at most 2147483647 tokens");
    RowCounts counts;
    counts.keys.resize(mask.rows);
    counts.extra.resize(mask.rows);
    counts.is_prefix.resize(mask.rows);
    with_type(mask.type, mask.data, [&](const auto* data) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t row = 0; row < mask.rows; ++row) {
            const auto* values = data + row * mask.columns;
            const int64_t prefix = prefix_length_of(values, mask.columns);
            const uint8_t* keep_row = keep == nullptr ? nullptr : keep + row * mask.columns;
            if (prefix >= 0 && keep == nullptr && (prefix > 0 || !keep_first)) {
                counts.keys[row] = static_cast<int32_t>(prefix);
                counts.is_prefix[row] = 1;
                continue;
            }
            for (int64_t column = 0; column < mask.columns; ++column) {
                if (values[column] != 0) {
                    ++counts.keys[row];
                } else if (is_extra(keep_row, keep_first, column)) {
                    ++counts.extra[row];
                }
            }
        }
    });
    for (int64_t row = 0; row < mask.rows; ++row) {
        const int32_t length = counts.keys[row] + counts.extra[row];
        counts.total += length;
        counts.num_tiles += ceil_div(length, tile_size);
        counts.max_seqlen = std::max(counts.max_seqlen, length);
    }
    return counts;
}

void fill_packing(const MaskView& mask, const uint8_t* keep, bool keep_first, const RowCounts& counts, int64_t tile_size,
                  int threads, int64_t* indices, int64_t* positions, int32_t* cu_seqlens, int32_t* num_keys,
                  Tile* tiles) {
    cu_seqlens[0] = 0;
    for (int64_t row = 0; row < mask.rows; ++row) {
        const int32_t length = counts.keys[row] + counts.extra[row];
        cu_seqlens[row + 1] = cu_seqlens[row] + length;
        num_keys[row] = counts.keys[row];
        append_tiles(cu_seqlens[row], length, counts.keys[row], tile_size, tiles);
    }
    with_type(mask.type, mask.data, [&](const auto* data) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t row = 0; row < mask.rows; ++row) {
            int64_t* row_indices = indices + cu_seqlens[row];
            int64_t* row_positions = positions + cu_seqlens[row];
            const int64_t first = row * mask.columns;
            if (counts.is_prefix[row]) {
                fill_sequence(first, counts.keys[row], row_indices);
                fill_sequence(0, counts.keys[row], row_positions);
                continue;
            }
            const auto* values = data + first;
            const uint8_t* keep_row = keep == nullptr ? nullptr : keep + first;
            int64_t next_key = 0;
            int64_t next_extra = counts.keys[row];
            for (int64_t column = 0; column < mask.columns; ++column) {
                int64_t* next = nullptr;
                if (values[column] != 0) {
                    next = &next_key;
                } else if (is_extra(keep_row, keep_first, column)) {
                    next = &next_extra;
                } else {
                    continue;
                }
                row_indices[*next] = first + column;
                row_positions[*next] = column;
                ++*next;
            }
        }
    });
}

std::vector<Tile> make_tiles(const int32_t* cu_seqlens, const int32_t* num_keys, int64_t sequences, int64_t tile_size) {
    if (cu_seqlens[0] != 0) fail("cu_seqlens[0] is " + std::to_string(cu_seqlens[0]) + "; it must be 0");
    int64_t count = 0;
    for (int64_t i = 0; i < sequences; ++i) {
        const int64_t length = int64_t{cu_seqlens[i + 1]} - cu_seqlens[i];
        if (length < 0)
            fail("cu_seqlens must ascend: cu_seqlens[" + std::to_string(i) + "] is " + std::to_string(cu_seqlens[i]) +
                 " and cu_seqlens[" + std::to_string(i + 1) + "] is " + std::to_string(cu_seqlens[i + 1]));
        if (num_keys != nullptr && (num_keys[i] < 0 || num_keys[i] > length))
            fail("num_keys[" + std::to_string(i) + "] is " + std::to_string(num_keys[i]) + "; it must lie in [0, " +
                 std::to_string(length) + "], the sequence's length");
        count += ceil_div(length, tile_size);
    }
    std::vector<Tile> tiles(count);
    Tile* next = tiles.data();
    for (int64_t i = 0; i < sequences; ++i) {
        const int32_t length = cu_seqlens[i + 1] - cu_seqlens[i];
        append_tiles(cu_seqlens[i], length, num_keys == nullptr ? length : num_keys[i], tile_size, next);
    }
    return tiles;
}

// ---- pad -----------------------------------------------------------------------------------------------------------

void pad_rows(const std::byte* packed, const int64_t* indices, int64_t packed_rows, int64_t row_bytes, int64_t out_rows,
              int threads, std::byte* out) {
    std::vector<int64_t> source(out_rows, -1);
    for (int64_t i = 0; i < packed_rows; ++i) {
        if (indices[i] < 0 || indices[i] >= out_rows)
            fail("indices[" + std::to_string(i) + "] is " + std::to_string(indices[i]) + "; it must lie in [0, " +
                 std::to_string(out_rows) + ")");
        if (source[indices[i]] >= 0)
            fail("indices[" + std::to_string(i) + "] is " + std::to_string(indices[i]) + ", as is indices[" +
                 std::to_string(source[indices[i]]) + "]; indices must be distinct");
        source[indices[i]] = i;
    }
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < out_rows; ++row) {
        std::byte* target = out + row * row_bytes;
        if (source[row] < 0) {
            std::memset(target, 0, row_bytes);
        } else {
            std::memcpy(target, packed + source[row] * row_bytes, row_bytes);
        }
    }
}

// ---- pack ----------------------------------------------------------------------------------------------------------

Bins pack(const int64_t* lengths, int64_t count, int64_t capacity) {
    if (capacity < 1) fail("capacity is " + std::to_string(capacity) + "; it must be at least 1");
    for (int64_t i = 0; i < count; ++i)
        if (lengths[i] < 1 || lengths[i] > capacity)
            fail("lengths[" + std::to_string(i) + "] is " + std::to_string(lengths[i]) + "; it must lie in [1, " +
                 std::to_string(capacity) + "], the capacity");
    std::vector<int64_t> by_length(count);
    std::iota(by_length.begin(), by_length.end(), 0);
    std::stable_sort(by_length.begin(), by_length.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });

    std::set<std::pair<int64_t, int64_t>> open_bins;  // (room left, bin)
    std::vector<int64_t> bin_of(count);
    int64_t num_bins = 0;
    for (int64_t sequence : by_length) {
        int64_t room = capacity;
        int64_t bin = num_bins;
        const auto best = open_bins.lower_bound({lengths[sequence], 0});
        if (best == open_bins.end()) {
            ++num_bins;
        } else {
            std::tie(room, bin) = *best;
            open_bins.erase(best);
        }
        bin_of[sequence] = bin;
        if (room > lengths[sequence]) open_bins.insert({room - lengths[sequence], bin});
    }

    Bins bins;
    bins.offsets.assign(num_bins + 1, 0);
    for (int64_t bin : bin_of) ++bins.offsets[bin + 1];
    std::partial_sum(bins.offsets.begin(), bins.offsets.end(), bins.offsets.begin());
    bins.order.resize(count);
    std::vector<int64_t> next(bins.offsets.begin(), bins.offsets.end() - 1);
    for (int64_t sequence = 0; sequence < count; ++sequence) bins.order[next[bin_of[sequence]]++] = sequence;
    return bins;
}

// ---- mask_tokens ---------------------------------------------------------------------------------------------------

namespace {

constexpr int64_t kIgnored = -100;

// What the last counter word says a draw is for (see masking.h).
constexpr uint32_t kSelect = 0;
constexpr uint32_t kReplace = 1;
constexpr uint32_t kSpan = 2;

constexpr int kLanes = 64;          // counters drawn at a time: enough that one's rounds hide behind another's
constexpr int kGroup = 16;          // neighbouring columns that read the same word of neighbouring counters
constexpr int kChunk = 4 * kLanes;  // columns that a draw of the selection serves

// Four words for each of kLanes counters (counter, row low, row high, purpose); words[w][lane].
struct Draws {
    uint32_t words[4][kLanes];
};

BERT_FAST_CLONES void draw(Philox philox, const uint32_t* counters, uint64_t row, uint32_t purpose, Draws& draws) {
    const uint32_t row_low = static_cast<uint32_t>(row);
    const uint32_t row_high = static_cast<uint32_t>(row >> 32);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
        uint32_t c0 = counters[lane];
        uint32_t c1 = row_low;
        uint32_t c2 = row_high;
        uint32_t c3 = purpose;
        philox(c0, c1, c2, c3);
        draws.words[0][lane] = c0;
        draws.words[1][lane] = c1;
        draws.words[2][lane] = c2;
        draws.words[3][lane] = c3;
    }
}

// For each group of columns, one bit for each column whose word is at most `last`.
BERT_FAST_CLONES void select_groups(const Draws& draws, uint32_t last, uint32_t* bits_of_groups) {
    for (int group = 0; group < kChunk / kGroup; ++group) {
        const uint32_t* words = &draws.words[group % 4][group / 4 * kGroup];
        uint32_t bits = 0;
#pragma omp simd reduction(| : bits)
        for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(words[i] <= last) << i;
        bits_of_groups[group] = bits;
    }
}

// Whether all values lie in [0, limit); a negative one is above every limit when read as unsigned.
BERT_FAST_CLONES bool all_below(const int64_t* values, int64_t count, int64_t limit) {
    uint64_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint64_t>(values[i]));
    return largest < static_cast<uint64_t>(limit);
}

uint64_t threshold(double probability) { return static_cast<uint64_t>(std::llround(probability * 4294967296.0)); }

uint64_t scale_to(uint32_t word, uint64_t size) { return (uint64_t{word} * size) >> 32; }

class RowMasker {
  public:
    RowMasker(const int64_t* ids, const int32_t* word_ids, int64_t columns, const std::vector<int64_t>& special_ids,
              const MaskingRule& rule, int64_t* masked_ids, int64_t* labels)
        : ids_(ids),
          word_ids_(word_ids),
          columns_(columns),
          rule_(rule),
          philox_(rule.seed),
          masked_ids_(masked_ids),
          labels_(labels),
          select_below_(threshold(rule.probability)),
          mask_below_(threshold(rule.mask_probability)),
          random_below_(threshold(rule.mask_probability + rule.random_probability)),
          is_special_(rule.vocab_size, 0) {
        for (int64_t id : special_ids) is_special_[id] = 1;
        for (int64_t id = 0; id < rule.vocab_size; ++id)
            if (is_special_[id]) special_ids_.push_back(id);
        num_ordinary_ = static_cast<uint64_t>(rule.vocab_size) - special_ids_.size();
        if (rule.random_probability > 0 && num_ordinary_ == 0)
            fail("every id in [0, " + std::to_string(rule.vocab_size) +
                 ") is special; random_probability > 0 needs an id that is not");
        double total = 0;
        for (int64_t n = 1; n <= rule.max_span; ++n) total += 1.0 / static_cast<double>(n);
        double below = 0;
        for (int64_t n = 1; n <= rule.max_span; ++n) {
            below += 1.0 / static_cast<double>(n) / total;
            span_below_.push_back(threshold(below));
        }
    }

    // Appends the predicted places of the row; returns the column of the first id out of range, or -1.
    int64_t mask_row(int64_t row, std::vector<uint32_t>& columns, std::vector<int64_t>& places) const {
        const int64_t first = row * columns_;
        std::memcpy(masked_ids_ + first, ids_ + first, columns_ * sizeof(int64_t));
        std::fill_n(labels_ + first, columns_, kIgnored);
        if (!all_below(ids_ + first, columns_, rule_.vocab_size))
            for (int64_t column = 0; column < columns_; ++column)
                if (ids_[first + column] < 0 || ids_[first + column] >= rule_.vocab_size) return column;
        columns.clear();
        switch (rule_.unit) {
            case MaskUnit::token: select_tokens(row, columns); break;
            case MaskUnit::word: select_words(row, columns); break;
            case MaskUnit::span: select_spans(row, columns); break;
        }
        replace(row, columns, places);
        return -1;
    }

  private:
    uint64_t row_number(int64_t row) const { return rule_.first_row + static_cast<uint64_t>(row); }

    bool is_maskable(int64_t place) const {
        return !is_special_[ids_[place]] && (word_ids_ == nullptr || word_ids_[place] >= 0);
    }

    bool same_word(int64_t place, int64_t before) const {
        return word_ids_ != nullptr && word_ids_[place] == word_ids_[before];
    }

    // The id with this number among those that are not special.
    int64_t ordinary_id(uint64_t number) const {
        int64_t id = static_cast<int64_t>(number);
        for (int64_t special : special_ids_) id += special <= id ? 1 : 0;
        return id;
    }

    // The kChunk selection words of the columns from `start`, a multiple of kChunk, on.
    void draw_selection(int64_t row, int64_t start, Draws& draws) const {
        uint32_t counters[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) counters[lane] = static_cast<uint32_t>(start / 4 + lane);
        draw(philox_, counters, row_number(row), kSelect, draws);
    }

    // Each token is drawn on its own. Few are selected, so only those are looked at.
    void select_tokens(int64_t row, std::vector<uint32_t>& columns) const {
        if (select_below_ == 0) return;
        const int64_t first = row * columns_;
        Draws draws;
        for (int64_t start = 0; start < columns_; start += kChunk) {
            draw_selection(row, start, draws);
            uint32_t bits_of_groups[kChunk / kGroup];
            select_groups(draws, static_cast<uint32_t>(select_below_ - 1), bits_of_groups);
            for (int group = 0; group < kChunk / kGroup; ++group) {
                for (uint32_t bits = bits_of_groups[group]; bits != 0; bits &= bits - 1) {
                    const int64_t column = start + group * kGroup + __builtin_ctz(bits);
                    if (column < columns_ && is_maskable(first + column))
                        columns.push_back(static_cast<uint32_t>(column));
                }
            }
        }
    }

    // Each word is drawn through its first token.
    void select_words(int64_t row, std::vector<uint32_t>& columns) const {
        const int64_t first = row * columns_;
        bool is_selected = false;
        bool in_word = false;
        Draws draws;
        for (int64_t column = 0; column < columns_; ++column) {
            if (column % kChunk == 0) draw_selection(row, column, draws);
            const int64_t place = first + column;
            if (!is_maskable(place)) {
                in_word = false;
                continue;
            }
            if (!in_word || !same_word(place, place - 1)) {
                const int64_t group = column % kChunk / kGroup;
                is_selected = draws.words[group % 4][group / 4 * kGroup + column % kGroup] < select_below_;
            }
            in_word = true;
            if (is_selected) columns.push_back(static_cast<uint32_t>(column));
        }
    }

    // Spans of whole words until the row's budget is spent (n-gram masking: ALBERT, Lan et al. 2020, section 4.1).
    void select_spans(int64_t row, std::vector<uint32_t>& columns) const {
        std::vector<std::pair<int64_t, int64_t>> words;  // [start, stop) columns
        const int64_t maskable = find_words(row, words);
        if (words.empty()) return;

        uint32_t counters[kLanes];
        Draws draws;
        const auto redraw = [&](int64_t index) {
            for (int lane = 0; lane < kLanes; ++lane) counters[lane] = static_cast<uint32_t>(index + lane);
            draw(philox_, counters, row_number(row), kSpan, draws);
        };
        redraw(0);
        // The budget is rounded at random, so that short rows are masked at the right rate on average.
        const double wanted = rule_.probability * static_cast<double>(maskable);
        int64_t budget = static_cast<int64_t>(std::floor(wanted));
        if (draws.words[0][0] < threshold(wanted - std::floor(wanted))) ++budget;

        std::vector<uint8_t> is_taken(words.size(), 0);
        const int64_t attempts = 16 + 8 * static_cast<int64_t>(words.size());
        for (int64_t attempt = 1; attempt <= attempts && budget > 0; ++attempt) {
            if (attempt % kLanes == 0) redraw(attempt);
            const uint32_t span_word = draws.words[0][attempt % kLanes];
            int64_t span = 1;
            while (span < rule_.max_span && span_word >= span_below_[span - 1]) ++span;
            uint64_t word = scale_to(draws.words[1][attempt % kLanes], words.size());
            for (; span > 0 && word < words.size() && !is_taken[word]; --span, ++word) {
                const int64_t size = words[word].second - words[word].first;
                if (size > budget) break;
                is_taken[word] = 1;
                budget -= size;
            }
        }
        for (size_t word = 0; word < words.size(); ++word)
            if (is_taken[word])
                for (int64_t column = words[word].first; column < words[word].second; ++column)
                    columns.push_back(static_cast<uint32_t>(column));
    }

    // The row's words as [start, stop) columns; returns how many tokens they hold.
    int64_t find_words(int64_t row, std::vector<std::pair<int64_t, int64_t>>& words) const {
        const int64_t first = row * columns_;
        int64_t maskable = 0;
        bool in_word = false;
        for (int64_t column = 0; column < columns_; ++column) {
            const int64_t place = first + column;
            if (!is_maskable(place)) {
                in_word = false;
                continue;
            }
            ++maskable;
            if (in_word && same_word(place, place - 1)) {
                ++words.back().second;
            } else {
                words.emplace_back(column, column + 1);
            }
            in_word = true;
        }
        return maskable;
    }

    // 80/10/10 (or what the rule says) over the selected columns, which ascend.
    void replace(int64_t row, const std::vector<uint32_t>& columns, std::vector<int64_t>& places) const {
        const int64_t first = row * columns_;
        const size_t before = places.size();
        places.resize(before + columns.size());
        Draws draws;
        for (size_t start = 0; start < columns.size(); start += kLanes) {
            const size_t count = std::min<size_t>(kLanes, columns.size() - start);
            int64_t* next = places.data() + before + start;
            uint32_t counters[kLanes] = {};
            std::copy_n(columns.begin() + static_cast<std::ptrdiff_t>(start), count, counters);
            draw(philox_, counters, row_number(row), kReplace, draws);
            for (size_t lane = 0; lane < count; ++lane) {
                const int64_t place = first + counters[lane];
                const uint64_t action = draws.words[0][lane];
                const int64_t random_id = ordinary_id(scale_to(draws.words[1][lane], num_ordinary_));
                // Selections, not branches: nothing could predict them.
                int64_t id = ids_[place];
                labels_[place] = id;
                id = action < random_below_ ? random_id : id;
                id = action < mask_below_ ? rule_.mask_id : id;
                masked_ids_[place] = id;
                next[lane] = place;
            }
        }
    }

    const int64_t* ids_;
    const int32_t* word_ids_;
    int64_t columns_;
    const MaskingRule& rule_;
    Philox philox_;
    int64_t* masked_ids_;
    int64_t* labels_;
    uint64_t select_below_;
    uint64_t mask_below_;
    uint64_t random_below_;
    std::vector<uint8_t> is_special_;
    std::vector<int64_t> special_ids_;  // each once, ascending
    uint64_t num_ordinary_ = 0;
    std::vector<uint64_t> span_below_;
};

std::string digits(double value) {
    std::ostringstream text;
    text << std::setprecision(std::numeric_limits<double>::max_digits10) << value;
    return text.str();
}

void check_probability(const char* name, double value) {
    if (!(value >= 0.0 && value <= 1.0)) fail(std::string(name) + " is " + digits(value) + "; it must lie in [0, 1]");
}

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
        fail(std::string(name) + " is " + std::to_string(value) + "; it must lie in [" + std::to_string(low) + ", " +
             std::to_string(high) + "]");
}

}  // namespace

std::vector<std::vector<int64_t>> mask_tokens(const int64_t* ids, const int32_t* word_ids, int64_t rows, int64_t columns,
                                 const std::vector<int64_t>& special_ids, const MaskingRule& rule, int threads,
                                 int64_t* masked_ids, int64_t* labels) {
    check_probability("probability", rule.probability);
    check_probability("mask_probability", rule.mask_probability);
    check_probability("random_probability", rule.random_probability);
    check_probability("mask_probability + random_probability", rule.mask_probability + rule.random_probability);
    check_range("vocab_size", rule.vocab_size, 1, std::numeric_limits<int32_t>::max());
    check_range("max_span", rule.max_span, 1, 1000);
    if (rule.mask_id < 0 || rule.mask_id >= rule.vocab_size)
        fail("mask_id is " + std::to_string(rule.mask_id) + "; it must lie in [0, " + std::to_string(rule.vocab_size) + ")");
    for (int64_t id : special_ids)
        if (id < 0 || id >= rule.vocab_size)
            fail("special_ids holds " + std::to_string(id) + "; ids lie in [0, " + std::to_string(rule.vocab_size) + ")");

    const RowMasker masker(ids, word_ids, columns, special_ids, rule, masked_ids, labels);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
    std::vector<std::vector<int64_t>> places(parts);
    std::vector<int64_t> bad_place(parts, -1);
    const auto columns_hint = static_cast<size_t>(1.2 * rule.probability * static_cast<double>(columns)) + 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t stop = rows * (part + 1) / parts;
        std::vector<uint32_t> selected;
        selected.reserve(columns_hint);
        places[part].reserve(columns_hint * static_cast<size_t>(stop - rows * part / parts));
        for (int64_t row = rows * part / parts; row < stop && bad_place[part] < 0; ++row) {
            const int64_t bad_column = masker.mask_row(row, selected, places[part]);
            if (bad_column >= 0) bad_place[part] = row * columns + bad_column;
        }
    }
    for (int64_t place : bad_place)
        if (place >= 0)
            fail("ids[" + std::to_string(place / columns) + ", " + std::to_string(place % columns) + "] is " +
                 std::to_string(ids[place]) + "; ids lie in [0, " + std::to_string(rule.vocab_size) + ")");

    return places;
}

}  // namespace bert_fast
