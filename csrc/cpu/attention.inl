// Attention within packed sequences; K, and V where it has to be, are copied into lane-aligned scratch per head.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr int64_t kQueryBlock = kTileRows;    // queries whose scores lie in scratch at a time
constexpr int64_t kGradQueryBlock = 16;       // the same in the backward pass, where they are the depth of two products
constexpr int64_t kGradSumBlock = 32;         // gradients of scores are differences of larger numbers
constexpr int64_t kMaxKeysInPlace = 256;      // above, rows that are far apart are read so often that V is copied

struct Block {
    const float* a;
    int64_t a_row, a_column;
    const float* b;
    int64_t b_row;
    int64_t depth, columns;
    float* c;
    int64_t c_row;
    bool accumulates;
};

template <int kRows, int kVectors>
BERT_FAST_INLINE void multiply_columns(const Block& block, int64_t column) {
    Vec sum[kRows][kVectors] = {};
    accumulate<kRows, kVectors>(block.a, block.a_row, block.a_column, block.b + column, block.b_row, block.depth, sum);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            float* target = block.c + i * block.c_row + column + j * kLanes;
            if (block.accumulates) {
                Vec before;
                load(target, before);
                sum[i][j] += before;
            }
            store(sum[i][j], target);
        }
    }
}

// Two vectors at a time: a head is 32 or 64 wide.
template <int kRows>
void multiply_block(const Block& block) {
    int64_t column = 0;
    for (; column + 2 * kLanes <= block.columns; column += 2 * kLanes) multiply_columns<kRows, 2>(block, column);
    if (column < block.columns) multiply_columns<kRows, 1>(block, column);
}

template <int... kRows>
constexpr std::array<void (*)(const Block&), sizeof...(kRows)> block_kernels(std::integer_sequence<int, kRows...>) {
    return {multiply_block<kRows + 1>...};
}

constexpr auto kBlockKernels = block_kernels(std::make_integer_sequence<int, kTileRows>());

// C (rows x columns) = or += A * B; columns is a multiple of kLanes. `sum_block` terms are added one after another.
inline void multiply(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row, int64_t rows,
                     int64_t depth, int64_t columns, float* c, int64_t c_row, bool accumulates,
                     int64_t sum_block = kSumBlock) {
    const Strips strips(rows);
    for (int64_t first = 0; first < depth; first += sum_block) {
        const int64_t terms = std::min(sum_block, depth - first);
        for (int64_t strip = 0; strip < strips.count; ++strip) {
            const int64_t row = strips.begin(strip);
            kBlockKernels[strips.begin(strip + 1) - row - 1]({a + row * a_row + first * a_column, a_row, a_column,
                                                             b + first * b_row, b_row, terms, columns, c + row * c_row,
                                                             c_row, accumulates || first > 0});
        }
    }
}

// to (rows x padded) = from (rows x width), zeros beyond width.
inline void copy_padded(const float* from, int64_t from_row, int64_t rows, int64_t width, int64_t padded, float* to) {
    for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(to + row * padded, from + row * from_row, width * sizeof(float));
        std::fill(to + row * padded + width, to + (row + 1) * padded, 0.0f);
    }
}

// to (width x padded) = transpose of from (rows x width), zeros beyond rows.
inline void transpose_padded(const float* from, int64_t from_row, int64_t rows, int64_t width, int64_t padded,
                             float* to) {
    int64_t whole = 0;
#ifdef BERT_FAST_SHUFFLES
    whole = width / kLanes * kLanes;
    for (int64_t first = 0; first < rows; first += kLanes) {
        for (int64_t column = 0; column < whole; column += kLanes) {
            Vec square[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                if (first + i < rows) {
                    load(from + (first + i) * from_row + column, square[i]);
                } else {
                    square[i] = Vec{};
                }
            }
            transpose_square<kLanes / 2>(square);
            for (int i = 0; i < kLanes; ++i) store(square[i], to + (column + i) * padded + first);
        }
    }
#endif
    for (int64_t column = whole; column < width; ++column) {
        float* line = to + column * padded;
        for (int64_t row = 0; row < rows; ++row) line[row] = from[row * from_row + column];
        std::fill(line + rows, line + padded, 0.0f);
    }
}

// Scores become exponentials of their distance from the largest; those of what is no key count for nothing. There is a
// key. `largest` is that of the scaled scores.
struct SoftmaxRow {
    float sum;
    float largest;

    float log_sum_exp() const { return largest + std::log(sum); }
};

inline SoftmaxRow softmax_row(float* scores, KeyRange keys, int64_t padded, float scale) {
    std::fill(scores, scores + keys.first, -std::numeric_limits<float>::infinity());
    std::fill(scores + keys.last, scores + padded, -std::numeric_limits<float>::infinity());
    Vec largest_of_lane;
    load(scores, largest_of_lane);
    for (int64_t j = kLanes; j < padded; j += kLanes) {
        Vec score;
        load(scores + j, score);
        largest_of_lane = larger(score, largest_of_lane);
    }
    const float largest = largest_of_lanes(largest_of_lane);
    const float factor = scale * 1.44269504f;  // to powers of 2
    Vec sums{};
    for (int64_t first = 0; first < padded; first += kSumBlock) {
        const int64_t last = std::min(first + kSumBlock, padded);
        Vec part{};
        for (int64_t j = first; j < last; j += kLanes) {
            Vec score;
            load(scores + j, score);
            score = exp2_nonpositive((score - largest) * factor);
            store(score, scores + j);
            part += score;
        }
        sums += part;
    }
    return {sum_of_lanes(sums), largest * scale};
}

// The same for one query's scores, which are to have a bias.
inline SoftmaxRow softmax_row(const AttentionShape& shape, int64_t head, int64_t query, float* scores, KeyRange keys,
                              int64_t padded) {
    if (!shape.bias.is_on()) return softmax_row(scores, keys, padded, shape.scale);
    const float* bias = shape.bias.line(head, query);
    const float scale = shape.scale;
#pragma omp simd
    for (int64_t j = keys.first; j < keys.last; ++j) scores[j] = scores[j] * scale + bias[j];
    return softmax_row(scores, keys, padded, 1.0f);
}

// Scratch of one thread, reused from item to item.
struct Scratch {
    std::vector<float> storage;
    size_t used = 0;
    void reset(size_t size) {
        if (storage.size() < size) storage.resize(size);
        used = 0;
    }
    float* take(size_t size) {
        float* start = storage.data() + used;
        used += size;
        return start;
    }
};

// Some queries of one sequence, by one head. q and out begin with the first of them; log_sum_exp may be null.
struct Queries {
    ConstRows q;
    Rows out;
    float* log_sum_exp;
    int64_t count;
    int64_t first_row;    // of the sequence, if they are neighbours
    const int64_t* rows;  // else the packed row of each

    int64_t row(int64_t query, const Tile& tile) const {
        return rows == nullptr ? first_row + query : rows[query] - tile.sequence_start;
    }
};

// Of a row of weights, all but those of its keys.
inline void clear_others(float* weights, KeyRange keys, int64_t columns) {
    std::fill(weights, weights + keys.first, 0.0f);
    std::fill(weights + keys.last, weights + columns, 0.0f);
}

// The keys that queries from one row to another see, by their place among `columns` of a block of scores whose first
// column, a multiple of kLanes, is that of key `first`.
struct VisibleColumns {
    int64_t first;
    int64_t columns;

    VisibleColumns(const AttentionShape& shape, int64_t first_query, int64_t last_query, int64_t origin, int64_t keys) {
        const KeyRange range = shape.visible(first_query, last_query, keys);
        first = range.is_empty() ? origin : origin + (range.first - origin) / kLanes * kLanes;
        columns = range.is_empty() ? 0 : range.last - first;
    }

    KeyRange of(const AttentionShape& shape, int64_t query, int64_t keys) const {
        const KeyRange range = shape.visible(query, query, keys);
        return {range.first - first, range.last - first};
    }
};

inline void attend_queries(const AttentionShape& shape, const Tile& tile, int64_t head, const Queries& queries,
                           ConstRows k, ConstRows v, Scratch& scratch) {
    const int64_t size = shape.head_size;
    const int64_t offset = head * size;
    const auto fill_with_nothing = [&](int64_t query) {
        std::fill_n(queries.out.row(query) + offset, size, 0.0f);
        if (queries.log_sum_exp != nullptr) queries.log_sum_exp[query] = -std::numeric_limits<float>::infinity();
    };
    if (queries.count == 0) return;
    const KeyRange seen = shape.visible(queries.row(0, tile), queries.row(queries.count - 1, tile), tile.num_keys);
    if (seen.is_empty()) {
        for (int64_t i = 0; i < queries.count; ++i) fill_with_nothing(i);
        return;
    }
    const int64_t keys = seen.last - seen.first;
    const int64_t padded_keys = round_up(keys, kLanes);
    const int64_t padded_size = round_up(size, kLanes);
    const int64_t factor_count = shape.dropout.is_on() ? round_up(seen.last, 4 * kStep) : 0;
    const bool copies_v = padded_size > size || keys > kMaxKeysInPlace;
    scratch.reset(size * padded_keys + (copies_v ? keys * padded_size : 0) + kQueryBlock * (padded_keys + padded_size) +
                  factor_count);
    float* k_transposed = scratch.take(size * padded_keys);
    float* scores = scratch.take(kQueryBlock * padded_keys);
    float* result = scratch.take(kQueryBlock * padded_size);
    float* factors = scratch.take(factor_count);
    const int64_t first_key = tile.sequence_start + seen.first;
    transpose_padded(k.row(first_key) + offset, k.stride, keys, size, padded_keys, k_transposed);
    ConstRows values{v.row(first_key) + offset, v.stride};
    if (copies_v) {
        float* v_padded = scratch.take(keys * padded_size);
        copy_padded(values.data, values.stride, keys, size, padded_size, v_padded);
        values = {v_padded, padded_size};
    }

    const Strips strips(queries.count);
    for (int64_t strip = 0; strip < strips.count; ++strip) {
        const int64_t row = strips.begin(strip);
        const int64_t count = strips.begin(strip + 1) - row;
        const VisibleColumns visible(shape, queries.row(row, tile), queries.row(row + count - 1, tile), seen.first,
                                     tile.num_keys);
        const int64_t skipped = visible.first - seen.first;
        const int64_t columns = round_up(visible.columns, kLanes);
        float inverse_sums[kQueryBlock];
        multiply(queries.q.row(row) + offset, queries.q.stride, 1, k_transposed + skipped, padded_keys, count, size, columns,
                 scores, padded_keys, false);
        for (int64_t i = 0; i < count; ++i) {
            float* weights = scores + i * padded_keys;
            const int64_t query = queries.row(row + i, tile);
            const KeyRange own = visible.of(shape, query, tile.num_keys);
            if (own.is_empty()) continue;
            const SoftmaxRow softmax = softmax_row(shape, head, query, weights, own, columns);
            inverse_sums[i] = 1.0f / softmax.sum;
            if (queries.log_sum_exp != nullptr) queries.log_sum_exp[row + i] = softmax.log_sum_exp();
            if (shape.has_window()) clear_others(weights, own, visible.columns);
            if (!shape.dropout.is_on()) continue;
            dropout_factors(shape.dropout, tile.sequence_start, head, query, seen.last, factors);
            const float* factor = factors + visible.first;
#pragma omp simd
            for (int64_t j = 0; j < visible.columns; ++j) weights[j] *= factor[j];
        }
        multiply(scores, padded_keys, 1, values.row(skipped), values.stride, count, visible.columns, padded_size, result,
                 padded_size, false);
        for (int64_t i = 0; i < count; ++i) {
            if (visible.of(shape, queries.row(row + i, tile), tile.num_keys).is_empty()) {
                fill_with_nothing(row + i);
                continue;
            }
            float* target = queries.out.row(row + i) + offset;
            const float* from = result + i * padded_size;
            const float inverse = inverse_sums[i];
#pragma omp simd
            for (int64_t d = 0; d < size; ++d) target[d] = from[d] * inverse;
        }
    }
}

inline void attention_tile(const AttentionShape& shape, const Tile& tile, int64_t head, ConstRows q, ConstRows k,
                           ConstRows v, Rows out, float* log_sum_exp, Scratch& scratch) {
    const int64_t first = int64_t{tile.sequence_start} + tile.first_row;
    const Queries queries{{q.row(first), q.stride},
                          {out.row(first), out.stride},
                          log_sum_exp == nullptr ? nullptr : log_sum_exp + head * shape.tokens + first,
                          std::min<int64_t>(shape.tile_size, tile.num_rows - tile.first_row),
                          tile.first_row,
                          nullptr};
    attend_queries(shape, tile, head, queries, k, v, scratch);
}

void attention(const AttentionShape& shape, ConstRows q, ConstRows k, ConstRows v, Rows out, float* log_sum_exp,
               int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < shape.num_tiles * shape.heads; ++item)
            attention_tile(shape, shape.tiles[item / shape.heads], item % shape.heads, q, k, v, out, log_sum_exp,
                           scratch);
    }
}

// All gradients of one sequence and head, by blocks of queries (Dao 2023, FlashAttention-2, section 3.1).
inline void attention_grad_sequence(const AttentionShape& shape, const Tile& tile, int64_t head, ConstRows q,
                                    ConstRows k, ConstRows v, ConstRows out, ConstRows grad_out,
                                    const AttentionGradients& grads, Scratch& scratch) {
    const int64_t size = shape.head_size;
    const int64_t start = tile.sequence_start;
    const int64_t queries = tile.num_rows;
    const int64_t keys = tile.num_keys;
    const int64_t offset = head * size;
    const int64_t padded_keys = round_up(keys, kLanes);
    const int64_t padded_size = round_up(size, kLanes);
    const int64_t factor_count = shape.dropout.is_on() ? round_up(keys, 4 * kStep) : 0;
    const int64_t distances = grads.bias != nullptr ? queries + keys : 0;
    scratch.reset(2 * size * padded_keys + 3 * keys * padded_size + kGradQueryBlock * (2 * padded_keys + 3 * padded_size) +
                  factor_count + distances);
    float* k_transposed = scratch.take(size * padded_keys);
    float* v_transposed = scratch.take(size * padded_keys);
    float* k_padded = scratch.take(keys * padded_size);
    float* grad_k = scratch.take(keys * padded_size);
    float* grad_v = scratch.take(keys * padded_size);
    float* probabilities = scratch.take(kGradQueryBlock * padded_keys);
    float* grad_scores = scratch.take(kGradQueryBlock * padded_keys);
    float* q_block = scratch.take(kGradQueryBlock * padded_size);
    float* grad_out_block = scratch.take(kGradQueryBlock * padded_size);
    float* grad_q = scratch.take(kGradQueryBlock * padded_size);
    float* factors = scratch.take(factor_count);
    float* grad_bias = scratch.take(distances);  // of key j for query i at j - i + queries
    std::fill_n(grad_bias, distances, 0.0f);
    transpose_padded(k.row(start) + offset, k.stride, keys, size, padded_keys, k_transposed);
    transpose_padded(v.row(start) + offset, v.stride, keys, size, padded_keys, v_transposed);
    copy_padded(k.row(start) + offset, k.stride, keys, size, padded_size, k_padded);
    std::fill_n(grad_k, keys * padded_size, 0.0f);
    std::fill_n(grad_v, keys * padded_size, 0.0f);

    for (int64_t row = 0; row < queries; row += kGradQueryBlock) {
        const int64_t count = std::min(kGradQueryBlock, queries - row);
        const VisibleColumns visible(shape, row, row + count - 1, 0, keys);
        const int64_t columns = round_up(visible.columns, kLanes);
        if (columns == 0) {
            for (int64_t i = 0; i < count; ++i) std::fill_n(grads.q.row(start + row + i) + offset, size, 0.0f);
            continue;
        }
        copy_padded(q.row(start + row) + offset, q.stride, count, size, padded_size, q_block);
        copy_padded(grad_out.row(start + row) + offset, grad_out.stride, count, size, padded_size, grad_out_block);
        multiply(q_block, padded_size, 1, k_transposed + visible.first, padded_keys, count, size, columns, probabilities,
                 padded_keys, false, kGradSumBlock);
        multiply(grad_out_block, padded_size, 1, v_transposed + visible.first, padded_keys, count, size, columns,
                 grad_scores, padded_keys, false, kGradSumBlock);
        for (int64_t i = 0; i < count; ++i) {
            const float* out_row = out.row(start + row + i) + offset;
            const float* grad_out_row = grad_out_block + i * padded_size;
            float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
            for (int64_t d = 0; d < size; ++d) delta += out_row[d] * grad_out_row[d];
            float* p = probabilities + i * padded_keys;
            float* ds = grad_scores + i * padded_keys;
            const KeyRange own = visible.of(shape, row + i, keys);
            if (own.is_empty()) {
                std::fill_n(p, columns, 0.0f);
                std::fill_n(ds, columns, 0.0f);
                continue;
            }
            // Not from the log-sum-exp: its rounding alone would cost the probabilities two units in the last place.
            const float inverse = 1.0f / softmax_row(shape, head, row + i, p, own, columns).sum;
            // The bias's gradient is that of the scaled scores.
            const float scale = grads.bias != nullptr ? 1.0f : shape.scale;
            if (shape.dropout.is_on()) {
                dropout_factors(shape.dropout, start, head, row + i, keys, factors);
                const float* factor = factors + visible.first;
#pragma omp simd
                for (int64_t j = own.first; j < own.last; ++j) {
                    const float probability = p[j] * inverse;
                    p[j] = probability * factor[j];
                    ds[j] = probability * (ds[j] * factor[j] - delta) * scale;
                }
            } else {
#pragma omp simd
                for (int64_t j = own.first; j < own.last; ++j) {
                    p[j] *= inverse;
                    ds[j] = p[j] * (ds[j] - delta) * scale;
                }
            }
            if (grads.bias != nullptr) {
                float* line = grad_bias + queries - (row + i);
                const float score_scale = shape.scale;
#pragma omp simd
                for (int64_t j = own.first; j < own.last; ++j) {
                    line[j] += ds[j];
                    ds[j] *= score_scale;
                }
            }
            clear_others(p, own, columns);
            clear_others(ds, own, columns);
        }
        const int64_t first = visible.first * padded_size;
        multiply(probabilities, 1, padded_keys, grad_out_block, padded_size, visible.columns, count, padded_size,
                 grad_v + first, padded_size, true);
        multiply(grad_scores, 1, padded_keys, q_block, padded_size, visible.columns, count, padded_size, grad_k + first,
                 padded_size, true);
        multiply(grad_scores, padded_keys, 1, k_padded + first, padded_size, count, visible.columns, padded_size, grad_q,
                 padded_size, false);
        for (int64_t i = 0; i < count; ++i)
            std::memcpy(grads.q.row(start + row + i) + offset, grad_q + i * padded_size, size * sizeof(float));
    }
    for (int64_t j = 0; j < keys; ++j) {
        std::memcpy(grads.k.row(start + j) + offset, grad_k + j * padded_size, size * sizeof(float));
        std::memcpy(grads.v.row(start + j) + offset, grad_v + j * padded_size, size * sizeof(float));
    }
    for (int64_t j = keys; j < queries; ++j) {
        std::fill_n(grads.k.row(start + j) + offset, size, 0.0f);
        std::fill_n(grads.v.row(start + j) + offset, size, 0.0f);
    }
    if (grads.bias != nullptr) {
        float* to = grads.bias + head * shape.bias.width() + shape.bias.reach;
        for (int64_t distance = 1 - queries; distance < keys; ++distance) to[distance] += grad_bias[distance + queries];
    }
}

void attention_backward(const AttentionShape& shape, ConstRows q, ConstRows k, ConstRows v, ConstRows out,
                        ConstRows grad_out, const AttentionGradients& grads, int threads) {
    const auto add_sequence = [&](int64_t tile, int64_t head, Scratch& scratch) {
        if (shape.tiles[tile].first_row == 0)
            attention_grad_sequence(shape, shape.tiles[tile], head, q, k, v, out, grad_out, grads, scratch);
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch;
        if (grads.bias != nullptr) {  // a head's sequences one after another, so that their sum has one order
#pragma omp for schedule(dynamic)
            for (int64_t head = 0; head < shape.heads; ++head) {
                std::fill_n(grads.bias + head * shape.bias.width(), shape.bias.width(), 0.0f);
                for (int64_t tile = 0; tile < shape.num_tiles; ++tile) add_sequence(tile, head, scratch);
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t item = 0; item < shape.num_tiles * shape.heads; ++item)
                add_sequence(item / shape.heads, item % shape.heads, scratch);
        }
    }
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
