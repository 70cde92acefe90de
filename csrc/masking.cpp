#include "masking.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <iomanip>
#include <limits>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/team.h"
#include "philox.h"

namespace bert_fast {
namespace {

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// ---- unpad ---------------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns where the next sequence's tiles begin.
Tile* write_tiles(int32_t start, int32_t num_rows, int32_t num_keys, int64_t tile_size, Tile* out) {
    for (int64_t first = 0; first < num_rows; first += tile_size)
        *out++ = {start, num_rows, num_keys, static_cast<int32_t>(first)};
    return out;
}

struct RowCount {
    int32_t keys = 0;
    int32_t extra = 0;
    bool is_prefix = false;  // the keys are columns 0 .. keys - 1 and there is nothing extra
    int64_t first_tile = 0;
};

// Allocates the outputs for these rows and finds where each row goes.
Packing lay_out(std::vector<RowCount>& rows, int64_t columns, int64_t tile_size) {
    Packing packing;
    packing.cu_seqlens.resize(rows.size() + 1);
    packing.num_keys.resize(rows.size());
    int32_t total = 0;
    int64_t num_tiles = 0;
    for (size_t row = 0; row < rows.size(); ++row) {
        const int32_t length = rows[row].keys + rows[row].extra;
        packing.cu_seqlens[row] = total;
        packing.num_keys[row] = rows[row].keys;
        rows[row].first_tile = num_tiles;
        total += length;
        num_tiles += ceil_div(length, tile_size);
        packing.max_seqlen = std::max(packing.max_seqlen, length);
        packing.is_whole &= rows[row].keys == columns;
        packing.is_plain &= length > 0 && rows[row].extra == 0;
    }
    packing.cu_seqlens[rows.size()] = total;
    packing.indices = Buffer<int64_t>(total);
    packing.positions = Buffer<int32_t>(total);
    packing.tiles.resize(num_tiles);
    return packing;
}

template <typename T>
class Unpadding {
  public:
    Unpadding(const MaskView& mask, const uint8_t* keep, bool keep_first, int64_t tile_size)
        : mask_(mask), keep_(keep), keep_first_(keep_first), tile_size_(tile_size), kernels_(cpu::kernels()) {}

    Packing run(int threads) {
        std::vector<RowCount> rows(mask_.rows);
        std::vector<int32_t> prefixes(mask_.rows);
        Packing packing;
        std::exception_ptr error;
        threads = cpu::useful_threads(threads, mask_.rows * mask_.columns);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static)
            for (int64_t part = 0; part < threads; ++part) {
                const int64_t first = mask_.rows * part / threads;
                const int64_t last = mask_.rows * (part + 1) / threads;
                kernels_.prefix_lengths(mask_, first, last, prefixes.data());
                for (int64_t row = first; row < last; ++row) rows[row] = count(row, prefixes[row]);
            }
#pragma omp single
            try {
                packing = lay_out(rows, mask_.columns, tile_size_);
            } catch (...) {
                error = std::current_exception();
            }
            if (error == nullptr) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < mask_.rows; ++row) fill(row, rows[row], packing);
            }
        }
        if (error != nullptr) std::rethrow_exception(error);
        return packing;
    }

  private:
    const T* values(int64_t row) const { return static_cast<const T*>(mask_.data) + row * mask_.columns; }

    bool is_extra(int64_t row, int64_t column) const {
        return (keep_first_ && column == 0) || (keep_ != nullptr && keep_[row * mask_.columns + column] != 0);
    }

    RowCount count(int64_t row, int32_t prefix) const {
        RowCount found;
        if (keep_ == nullptr && (prefix > 0 || (prefix == 0 && !keep_first_))) {
            found.keys = prefix;
            found.is_prefix = true;
            return found;
        }
        for (int64_t column = 0; column < mask_.columns; ++column) {
            if (values(row)[column] != 0) {
                ++found.keys;
            } else if (is_extra(row, column)) {
                ++found.extra;
            }
        }
        return found;
    }

    void fill(int64_t row, const RowCount& count, Packing& packing) const {
        const int32_t start = packing.cu_seqlens[row];
        write_tiles(start, count.keys + count.extra, count.keys, tile_size_, packing.tiles.data() + count.first_tile);
        int64_t* indices = packing.indices.data() + start;
        int32_t* positions = packing.positions.data() + start;
        const int64_t first = row * mask_.columns;
        if (count.is_prefix) {
            kernels_.fill_sequence(first, count.keys, indices, positions);
            return;
        }
        int64_t next_key = 0;
        int64_t next_extra = count.keys;
        for (int64_t column = 0; column < mask_.columns; ++column) {
            const bool is_key = values(row)[column] != 0;
            if (!is_key && !is_extra(row, column)) continue;
            int64_t& next = is_key ? next_key : next_extra;
            indices[next] = first + column;
            positions[next] = static_cast<int32_t>(column);
            ++next;
        }
    }

    const MaskView& mask_;
    const uint8_t* keep_;
    bool keep_first_;
    int64_t tile_size_;
    const cpu::Kernels& kernels_;
};

}  // namespace

Packing unpad(const MaskView& mask, const uint8_t* keep, bool keep_first, int64_t tile_size, int threads) {
    if (mask.rows * mask.columns > std::numeric_limits<int32_t>::max())
        fail("mask has " + std::to_string(mask.rows) + " x " + std::to_string(mask.columns) +
             " elements; a batch may have at most 2147483647 tokens");
    switch (mask.type) {
        case MaskType::uint8: return Unpadding<uint8_t>(mask, keep, keep_first, tile_size).run(threads);
        case MaskType::int16: return Unpadding<int16_t>(mask, keep, keep_first, tile_size).run(threads);
        case MaskType::int32: return Unpadding<int32_t>(mask, keep, keep_first, tile_size).run(threads);
        case MaskType::int64: return Unpadding<int64_t>(mask, keep, keep_first, tile_size).run(threads);
        case MaskType::float32: return Unpadding<float>(mask, keep, keep_first, tile_size).run(threads);
        case MaskType::float64: return Unpadding<double>(mask, keep, keep_first, tile_size).run(threads);
    }
    fail("mask has an unknown type");
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
        next = write_tiles(cu_seqlens[i], length, num_keys == nullptr ? length : num_keys[i], tile_size, next);
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
    threads = cpu::useful_threads(threads, out_rows * row_bytes / static_cast<int64_t>(sizeof(float)));
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

uint64_t threshold(double probability) { return static_cast<uint64_t>(std::llround(probability * 4294967296.0)); }

// The selected tokens of a block of rows, in order.
struct Selection {
    std::vector<uint32_t> rows;  // within the block
    std::vector<uint32_t> columns;
    size_t count = 0;
};

class BlockMasker {
  public:
    BlockMasker(const int64_t* ids, const int32_t* word_ids, int64_t columns, const std::vector<int64_t>& special_ids,
                const MaskingRule& rule, int64_t* masked_ids, int64_t* labels)
        : ids_(ids),
          word_ids_(word_ids),
          columns_(columns),
          rule_(rule),
          kernels_(cpu::kernels()),
          masked_ids_(masked_ids),
          labels_(labels),
          select_below_(threshold(rule.probability)),
          mask_below_(threshold(rule.mask_probability)),
          random_below_(threshold(rule.mask_probability + rule.random_probability)),
          is_special_(rule.vocab_size, 0),
          special_ids_(special_ids.begin(), special_ids.end()) {
        std::sort(special_ids_.begin(), special_ids_.end());
        special_ids_.erase(std::unique(special_ids_.begin(), special_ids_.end()), special_ids_.end());
        for (uint32_t id : special_ids_) is_special_[id] = 1;
        if (rule.random_probability > 0 && special_ids_.size() == static_cast<size_t>(rule.vocab_size))
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

    // Rows that are worked on together: enough selected tokens to fill the registers, few enough to stay in the cache.
    int64_t block_rows() const { return std::clamp<int64_t>(4096 / std::max<int64_t>(columns_, 1), 1, 64); }

    // Appends the predicted places of the rows; returns the place of the first id out of range, or -1.
    int64_t mask_rows(int64_t first_row, int64_t rows, std::vector<int64_t>& places) const {
        Selection selection;
        selection.rows.resize(rows * columns_);
        selection.columns.resize(rows * columns_);
        std::vector<uint64_t> bits((columns_ + 63) / 64);
        for (int64_t row = first_row; row < first_row + rows; ++row) {
            const int64_t first = row * columns_;
            if (!kernels_.copy_ids(ids_ + first, columns_, rule_.vocab_size, masked_ids_ + first, labels_ + first)) {
                for (int64_t place = first; place < first + columns_; ++place)
                    if (ids_[place] < 0 || ids_[place] >= rule_.vocab_size) return place;
            }
            const size_t before = selection.count;
            if (rule_.unit == MaskUnit::span) {
                select_spans(row, selection);
            } else if (select_below_ > 0) {
                kernels_.select_columns(rule_.seed, row_number(row), columns_, static_cast<uint32_t>(select_below_ - 1),
                                        bits.data());
                if (rule_.unit == MaskUnit::token) {
                    select_tokens(row, bits, selection);
                } else {
                    select_words(row, bits, selection);
                }
            }
            std::fill(selection.rows.begin() + before, selection.rows.begin() + selection.count, row - first_row);
        }
        replace(first_row, selection, places);
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

    // Each token is drawn on its own. Few are selected, so only those are looked at.
    void select_tokens(int64_t row, std::vector<uint64_t>& bits, Selection& selection) const {
        const int64_t first = row * columns_;
        if (columns_ % 64 != 0) bits.back() &= (uint64_t{1} << (columns_ % 64)) - 1;
        uint32_t* columns = selection.columns.data();
        for (size_t group = 0; group < bits.size(); ++group) {
            for (uint64_t left = bits[group]; left != 0; left &= left - 1) {
                const int64_t column = static_cast<int64_t>(group) * 64 + __builtin_ctzll(left);
                columns[selection.count] = static_cast<uint32_t>(column);
                selection.count += is_maskable(first + column) ? 1 : 0;
            }
        }
    }

    // Each word is drawn through its first token.
    void select_words(int64_t row, const std::vector<uint64_t>& bits, Selection& selection) const {
        const int64_t first = row * columns_;
        bool is_selected = false;
        bool in_word = false;
        for (int64_t column = 0; column < columns_; ++column) {
            const int64_t place = first + column;
            if (!is_maskable(place)) {
                in_word = false;
                continue;
            }
            if (!in_word || !same_word(place, place - 1)) is_selected = (bits[column / 64] >> (column % 64)) & 1;
            in_word = true;
            if (is_selected) selection.columns[selection.count++] = static_cast<uint32_t>(column);
        }
    }

    // Spans of whole words until the row's budget is spent (n-gram masking: ALBERT, Lan et al. 2020, section 4.1).
    void select_spans(int64_t row, Selection& selection) const {
        std::vector<std::pair<int64_t, int64_t>> words;  // [start, stop) columns
        const int64_t maskable = find_words(row, words);
        if (words.empty()) return;

        const Philox philox(rule_.seed);
        const uint64_t number = row_number(row);
        uint32_t draws[4];
        const auto draw = [&](int64_t n) {
            draws[0] = static_cast<uint32_t>(n);
            draws[1] = static_cast<uint32_t>(number);
            draws[2] = static_cast<uint32_t>(number >> 32);
            draws[3] = kSpanPurpose;
            philox(draws[0], draws[1], draws[2], draws[3]);
        };
        // The budget is rounded at random, so that short rows are masked at the right rate on average.
        const double wanted = rule_.probability * static_cast<double>(maskable);
        int64_t budget = static_cast<int64_t>(std::floor(wanted));
        draw(0);
        if (draws[0] < threshold(wanted - std::floor(wanted))) ++budget;

        std::vector<uint8_t> is_taken(words.size(), 0);
        const int64_t attempts = 16 + 8 * static_cast<int64_t>(words.size());
        for (int64_t attempt = 1; attempt <= attempts && budget > 0; ++attempt) {
            draw(attempt);
            int64_t span = 1;
            while (span < rule_.max_span && draws[0] >= span_below_[span - 1]) ++span;
            uint64_t word = (uint64_t{draws[1]} * words.size()) >> 32;
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
                    selection.columns[selection.count++] = static_cast<uint32_t>(column);
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

    // 80/10/10 (or what the rule says) over the selected tokens.
    void replace(int64_t first_row, const Selection& selection, std::vector<int64_t>& places) const {
        const auto count = static_cast<int64_t>(selection.count);
        std::vector<uint32_t> actions(selection.count);
        std::vector<uint32_t> random_ids(selection.count);
        kernels_.draw_replacements(rule_.seed, row_number(first_row), selection.columns.data(), selection.rows.data(),
                                   count, static_cast<uint32_t>(rule_.vocab_size), special_ids_.data(),
                                   static_cast<int64_t>(special_ids_.size()), actions.data(), random_ids.data());
        const size_t before = places.size();
        places.resize(before + selection.count);
        int64_t* next = places.data() + before;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t place = (first_row + selection.rows[i]) * columns_ + selection.columns[i];
            // Selections, not branches: nothing could predict them.
            int64_t id = ids_[place];
            labels_[place] = id;
            id = actions[i] < random_below_ ? int64_t{random_ids[i]} : id;
            id = actions[i] < mask_below_ ? rule_.mask_id : id;
            masked_ids_[place] = id;
            next[i] = place;
        }
    }

    const int64_t* ids_;
    const int32_t* word_ids_;
    int64_t columns_;
    const MaskingRule& rule_;
    const cpu::Kernels& kernels_;
    int64_t* masked_ids_;
    int64_t* labels_;
    uint64_t select_below_;
    uint64_t mask_below_;
    uint64_t random_below_;
    std::vector<uint8_t> is_special_;
    std::vector<uint32_t> special_ids_;  // each once, ascending
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

    const BlockMasker masker(ids, word_ids, columns, special_ids, rule, masked_ids, labels);
    threads = cpu::useful_threads(threads, rows * columns);
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows));
    std::vector<std::vector<int64_t>> places(parts);
    std::vector<int64_t> bad_place(parts, -1);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t stop = rows * (part + 1) / parts;
        for (int64_t row = rows * part / parts; row < stop && bad_place[part] < 0; row += masker.block_rows())
            bad_place[part] = masker.mask_rows(row, std::min(masker.block_rows(), stop - row), places[part]);
    }
    for (int64_t place : bad_place)
        if (place >= 0)
            fail("ids[" + std::to_string(place / columns) + ", " + std::to_string(place % columns) + "] is " +
                 std::to_string(ids[place]) + "; ids lie in [0, " + std::to_string(rule.vocab_size) + ")");

    return places;
}

}  // namespace bert_fast
