// Host-side masking: what the batch looks like without its padding, and which tokens a masked language model predicts.
//
// All functions are free of Python and may run without its lock. Pointers are to contiguous row-major memory.
// A bad value throws std::invalid_argument, which names the place and the value; nothing has been written past the
// arrays by then. `threads` is the number of OpenMP threads, at least 1; results do not depend on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace bert_fast {

// One tile of attention work: up to `tile_size` consecutive query rows of one sequence and the keys that they see.
// The fields are packed as four int32, the form in which the kernels read them.
struct Tile {
    int32_t sequence_start;  // packed row of the sequence's first token
    int32_t num_rows;        // rows (queries) of the sequence
    int32_t num_keys;        // the first num_keys rows are its keys
    int32_t first_row;       // first query row of this tile, within the sequence
};

// ---- unpad ---------------------------------------------------------------------------------------------------------

// Element types that a mask may have; an element is kept where it is not zero.
enum class MaskType { uint8, int16, int32, int64, float32, float64 };

struct MaskView {
    const void* data;  // (rows, columns)
    MaskType type;
    int64_t rows;
    int64_t columns;
};

// A batch without its padding, sequence after sequence; within a sequence the keys, in order, then the tokens that are
// computed although no other token attends to them, in order.
struct Packing {
    Buffer<int64_t> indices;    // (total) row * columns + column
    Buffer<int32_t> positions;  // (total) column
    std::vector<int32_t> cu_seqlens;  // (rows + 1)
    std::vector<int32_t> num_keys;    // (rows)
    std::vector<Tile> tiles;
    int32_t max_seqlen = 0;
    bool is_whole = true;  // every token is a key: the padded rows are the packed rows
    bool is_plain = true;  // every sequence has rows, and every row is a key
};

// `keep` (rows, columns; may be null) marks tokens that are kept although the mask hides them from the others;
// keep_first does the same for column 0 of every row.
Packing unpad(const MaskView& mask, const uint8_t* keep, bool keep_first, int64_t tile_size, int threads);

// Tiles of sequences that are already packed: cu_seqlens (sequences + 1), ascending from 0; num_keys (sequences) or null
// where every row is a key.
std::vector<Tile> make_tiles(const int32_t* cu_seqlens, const int32_t* num_keys, int64_t sequences, int64_t tile_size);

// ---- pad -----------------------------------------------------------------------------------------------------------

// out[indices[i]] = packed[i] for rows of row_bytes bytes, every other row of out is zero. indices must be distinct and
// lie in [0, out_rows).
void pad_rows(const std::byte* packed, const int64_t* indices, int64_t packed_rows, int64_t row_bytes, int64_t out_rows,
              int threads, std::byte* out);

// ---- pack ----------------------------------------------------------------------------------------------------------

struct Bins {
    std::vector<int64_t> order;    // sequence numbers, bin after bin, ascending within a bin
    std::vector<int64_t> offsets;  // bin b holds order[offsets[b]] .. order[offsets[b + 1] - 1]
};

// Best-fit decreasing (Johnson 1973): the longest sequence first, equal ones in the order given, each into the fullest
// bin that still takes it, the oldest of equally full ones. Lengths lie in [1, capacity].
Bins pack(const int64_t* lengths, int64_t count, int64_t capacity);

// ---- mask_tokens ---------------------------------------------------------------------------------------------------

constexpr int64_t kIgnoredLabel = -100;

// What the last counter word says a draw is for.
constexpr uint32_t kSelectPurpose = 0;
constexpr uint32_t kReplacePurpose = 1;
constexpr uint32_t kSpanPurpose = 2;

enum class MaskUnit { token, word, span };

struct MaskingRule {
    MaskUnit unit = MaskUnit::token;
    double probability = 0.15;         // share of the maskable tokens that are predicted
    double mask_probability = 0.8;     // of those, replaced by mask_id
    double random_probability = 0.1;   // of those, replaced by a random id that is not special; the rest stay
    int64_t mask_id = 0;
    int64_t vocab_size = 0;
    int64_t max_span = 3;  // words in the longest span; a span of n words is drawn with probability proportional to 1 / n
    uint64_t seed = 0;
    uint64_t first_row = 0;  // number of the first row within the whole data set
};

// ids (rows, columns) -> masked_ids and labels (both rows, columns; labels are -100 where nothing is predicted) and the
// predicted places row * columns + column, ascending, in parts. Tokens whose id is special, or whose word_id is negative, are
// never touched. word_ids (rows, columns; may be null: every token is a word): equal neighbours form a word.
// Draws: Philox with key `seed` and counter (n, row low, row high, purpose); a word w stands for w / 2^32 in [0, 1).
//   purpose 0, n = column / 64 * 16 + column % 16: word column / 16 % 4 selects the column (its word, by the first one);
//   purpose 1, n = column: word 0 chooses mask, random or unchanged, word 1 the random id, floor(w * ids / 2^32) among
//   those that are not special, ascending;
//   purpose 2, spans: n = 0, word 0 rounds the row's budget; n > 0, words 0 and 1 are the n-th span's length and start.
// Probabilities are rounded to 2^-32. A span ends early at a word that is taken or larger than what is left of the
// budget, and a row gives up after 16 + 8 * words spans: one whose words are all larger than its budget gets none.
std::vector<std::vector<int64_t>> mask_tokens(const int64_t* ids, const int32_t* word_ids, int64_t rows, int64_t columns,
                                 const std::vector<int64_t>& special_ids, const MaskingRule& rule, int threads,
                                 int64_t* masked_ids, int64_t* labels);

}  // namespace bert_fast
