// A stack of encoder layers in one parallel region. Rows meet only in attention; from there to the next layer's attention
// a block of rows stays in one thread's cache. Where there are too few rows for that, the threads share out the columns.
// Both ways add up the same terms in the same order, so a text's result depends neither on the threads nor on its batch.

namespace bert_fast::cpu::BERT_FAST_ISA {

void pack_weight(const float* weight, int64_t outputs, int64_t inputs, float* packed, int threads) {
    const int64_t panels = num_panels(outputs);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel)
        pack_panels({weight, 1, inputs}, inputs, outputs, panel, panel + 1, packed);
}

// Columns of the intermediate activation that exist at a time: the last product begins before the one before it ends.
constexpr int64_t kSlicePanels = kGroup / kPanel;

struct NonlinearStrip {
    Nonlinearity kind;
    BERT_FAST_INLINE void operator()(float* c, int64_t c_row, int64_t rows, int64_t columns) const {
        for (int64_t row = 0; row < rows; ++row) {
            float* values = c + row * c_row;
            if (kind == Nonlinearity::gelu_erf) {
                gelu_row<ErfGelu>(columns, values, nullptr, values);
            } else if (kind == Nonlinearity::gelu_tanh) {
                gelu_row<TanhGelu>(columns, values, nullptr, values);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) values[i] = values[i] < 0.0f ? 0.0f : values[i];  // NaN stays
            }
        }
    }
};

// A gate's product is multiplied with the activation that it belongs to, which lies as it does.
struct GateStrip {
    const float* gate;
    float* activation;
    BERT_FAST_INLINE void operator()(float* c, int64_t c_row, int64_t rows, int64_t columns) const {
        float* values = activation + (c - gate);
        for (int64_t row = 0; row < rows; ++row) {
            float* to = values + row * c_row;
            const float* from = c + row * c_row;
#pragma omp simd
            for (int64_t i = 0; i < columns; ++i) to[i] *= from[i];
        }
    }
};

// Turns the heads of a row by its token's angles.
inline void rotate_row(const Rotation& rotation, int64_t token, int64_t heads, int64_t head_size, float* row) {
    const int64_t half = head_size / 2;
    const float* cosines = rotation.cosines + token * half;
    const float* sines = rotation.sines + token * half;
    for (int64_t head = 0; head < heads; ++head) {
        float* first = row + head * head_size;
        float* second = first + half;
        by_vectors(half, [&](int64_t i, const auto& get, const auto& put) BERT_FAST_LAMBDA {
            Vec x, y, cosine, sine;
            get(first + i, x);
            get(second + i, y);
            get(cosines + i, cosine);
            get(sines + i, sine);
            put(x * cosine - y * sine, first + i);
            put(y * cosine + x * sine, second + i);
        });
    }
}

// Rows of activations, and the same in fewer bits where a product wants them so.
struct Activation {
    float* values;
    int64_t row;
    int64_t width;
    Narrow narrow;
    uint8_t* bytes;  // the narrow values
    int64_t byte_row;
    float* scales;  // of those in 8 bits
    int64_t scale_row;

    const uint16_t* halves() const { return reinterpret_cast<const uint16_t*>(bytes); }
    int64_t half_row() const { return byte_row / static_cast<int64_t>(sizeof(uint16_t)); }

    Activation from_row(int64_t first) const {
        Activation result = *this;
        result.values += first * row;
        result.bytes += first * byte_row;
        result.scales += first * scale_row;
        return result;
    }

    // Some of its columns, the first of which begins a group.
    Activation columns(int64_t first, int64_t count) const {
        Activation result = *this;
        result.values += first;
        result.width = count;
        result.bytes += narrow == Narrow::bfloat16 ? first * static_cast<int64_t>(sizeof(uint16_t)) : first;
        result.scales += first / kGroup;
        return result;
    }

    void round(int64_t rows) const {
        if (narrow == Narrow::bfloat16) {
            round_rows(values, row, rows, width, reinterpret_cast<uint16_t*>(bytes), half_row());
        } else {
            quantise_rows(values, row, rows, width, bytes, byte_row, scales);
        }
    }
};

// Hands out parts of an array.
struct Workspace {
    float* start;  // null where only the size is wanted
    int64_t used;

    float* take(int64_t size) {
        used += size;
        return start == nullptr ? nullptr : start + (used - size);
    }

    Workspace rest(int64_t offset = 0) const { return {start + used + offset, 0}; }

    // Whole floats.
    static int64_t narrow_row_bytes(Narrow narrow, int64_t width) {
        if (narrow == Narrow::none) return 0;
        return narrow == Narrow::int8 ? round_up(width, kQuad)
                                      : round_up(width, kPair) * static_cast<int64_t>(sizeof(uint16_t));
    }
    static int64_t num_scales(Narrow narrow, int64_t width) { return narrow == Narrow::int8 ? num_groups(width) : 0; }

    // An activation whose values are elsewhere: room for the narrow ones and their scales.
    static int64_t narrow_size(Narrow narrow, int64_t rows, int64_t width) {
        return rows * (narrow_row_bytes(narrow, width) / static_cast<int64_t>(sizeof(float)) + num_scales(narrow, width));
    }

    Activation activation(Narrow narrow, float* values, int64_t row, int64_t rows, int64_t width) {
        const int64_t byte_row = narrow_row_bytes(narrow, width);
        auto* bytes = reinterpret_cast<uint8_t*>(take(rows * byte_row / static_cast<int64_t>(sizeof(float))));
        const int64_t scales = num_scales(narrow, width);
        return {values, row, width, narrow, bytes, byte_row, take(rows * scales), scales};
    }
};

class EncoderStack {
  public:
    EncoderStack(const EncoderShape& shape, const EncoderLayer* layers, const float* input, float* const* outputs,
                 float* workspace, int threads)
        : shape_(shape), layers_(layers), input_(input), outputs_(outputs), threads_(threads),
          tokens_(shape.attention.tokens), most_rows_(std::max(tokens_, shape.rows == nullptr ? 0 : shape.num_rows)),
          hidden_(shape.hidden_size), inner_(shape.intermediate_size), row_(round_up(hidden_, kLanes)),
          slice_(std::min(kGroup, round_up(inner_, kLanes))), workspace_{workspace, 0} {
        query_ = workspace_.take(most_rows_ * row_);
        key_ = workspace_.take(tokens_ * row_);
        value_ = workspace_.take(tokens_ * row_);
        context_ = workspace_.take(most_rows_ * row_);
        if (shape_.rows != nullptr) selected_ = workspace_.take(shape_.num_rows * hidden_);
    }

    int64_t workspace_size() const {
        const int64_t used = workspace_.used;
        if (shares_columns()) {
            const int64_t inner_row = round_up(inner_, kLanes);
            return used + most_rows_ * (2 * row_ + (shape_.has_gates ? 2 : 1) * inner_row) +
                   3 * Workspace::narrow_size(shape_.narrow, most_rows_, hidden_) +
                   Workspace::narrow_size(shape_.narrow, most_rows_, inner_);
        }
        return used + threads_ * block_workspace();
    }

    void run() {
        Team team;
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        {
            const Worker worker(team);
            Scratch scratch;
            if (shares_columns()) {
                run_by_columns(worker, scratch);
            } else {
                run_by_rows(worker, scratch);
            }
        }
    }

  private:
    // Below this many rows a thread, each of them would read all weights for too little work. In 8 bits they are small, and
    // what the threads would tell one another between the products takes longer.
    static constexpr int64_t kMinRows = 16;
    static constexpr int64_t kMinRowsInBfloat16 = 8;
    static constexpr int64_t kMinRowsIn8Bits = 4;
    static constexpr int64_t kMaxBlockFloats = 48 * 1024;  // of an activation in a block of rows

    int64_t min_rows() const {
        if (!shape_.is_mostly_narrow) return kMinRows;
        return shape_.narrow == Narrow::int8 ? kMinRowsIn8Bits : kMinRowsInBfloat16;
    }

    bool shares_columns() const { return threads_ > 1 && tokens_ < threads_ * min_rows(); }

    // ---- both ways ----

    struct Part {  // of a layer
        int64_t layer;
        bool is_partial;  // the last one, for some rows
        const float* x;   // (rows, hidden)
        float* y;
        int64_t rows;
    };

    bool is_partial(int64_t layer) const { return shape_.rows != nullptr && layer + 1 == shape_.num_layers; }

    const float* layer_input(int64_t layer) const { return layer == 0 ? input_ : outputs_[layer - 1]; }

    Part part(int64_t layer) const {
        if (is_partial(layer)) return {layer, true, selected_, outputs_[layer], shape_.num_rows};
        return {layer, false, layer_input(layer), outputs_[layer], tokens_};
    }

    // C = A W^T + b for some of its panels; of `depth` columns of A and W, from first_depth on.
    struct Target {
        float* c;
        int64_t c_row;
        int64_t first_column = 0;
    };

    template <typename Finish>
    void multiply_linear(const Activation& a, int64_t rows, const Linear& linear, int64_t first_depth, int64_t depth,
                         int64_t columns, const Target& target, int64_t first_panel, int64_t last_panel,
                         const Finish& finish) const {
        const bool ends = first_depth + a.width == depth;
        const Result result{rows, columns, ends ? linear.bias : nullptr, target.c, target.c_row, target.first_column,
                            first_depth > 0};
        if (linear.weight != nullptr) {
            multiply_panels(FloatFactors{a.values, a.row, 1, linear.weight, depth, first_depth, a.width}, result,
                            first_panel, last_panel, finish);
        } else if (linear.halves != nullptr) {
            multiply_panels(HalfFactors{a.halves(), a.half_row(), linear.halves, round_up(depth, kPair) / kPair, first_depth,
                                        a.width},
                            result, first_panel, last_panel, finish);
        } else {
            const Quantised& b = linear.quantised;
            multiply_panels(ByteFactors{a.bytes, a.byte_row, a.scales, a.scale_row, b.weight, round_up(depth, kQuad) / kQuad,
                                        first_depth, a.width, b.scales, b.offsets, round_up(columns, kLanes)},
                            result, first_panel, last_panel, finish);
        }
    }

    void gather_rows(const Worker& worker) const {
        worker.share_evenly(shape_.num_rows, [&](int64_t row) {
            std::memcpy(selected_ + row * hidden_, layer_input(shape_.num_layers - 1) + shape_.rows[row] * hidden_,
                        hidden_ * sizeof(float));
        });
    }

    void attend(int64_t layer, const Worker& worker, Scratch& scratch) const {
        AttentionShape shape = shape_.attention;
        shape.window = layers_[layer].window;
        worker.share_out(shape.num_tiles * shape.heads, [&](int64_t item) {
            const Tile& tile = shape.tiles[item / shape.heads];
            const int64_t head = item % shape.heads;
            const int64_t first = int64_t{tile.sequence_start} + tile.first_row;
            int64_t query = first;
            int64_t count = std::min<int64_t>(shape.tile_size, tile.num_rows - tile.first_row);
            const int64_t* rows = nullptr;
            if (is_partial(layer)) {
                const int64_t* end = shape_.rows + shape_.num_rows;
                const int64_t* begin = std::lower_bound(shape_.rows, end, first);
                query = begin - shape_.rows;
                rows = begin;
                count = std::lower_bound(begin, end, first + count) - begin;
            }
            attend_queries(shape, tile, head,
                           {{query_ + query * row_, row_}, {context_ + query * row_, row_}, nullptr, count,
                            tile.first_row, rows},
                           {key_, row_}, {value_, row_}, scratch);
        });
    }

    void normalise(const Norm& norm, int64_t rows, const float* x, const float* residual, float* y) const {
        for (int64_t row = 0; row < rows; ++row) {
            float mean;
            float rstd;
            layer_norm_row(hidden_, x + row * row_, residual + row * hidden_, norm.weight, norm.bias, norm.eps,
                           y + row * hidden_, mean, rstd);
        }
    }

    // norm(x) where norms come first, in `to` (rows, hidden); x itself where there is no norm.
    const float* normalise_before(const Norm& norm, int64_t rows, const float* x, float* to) const {
        if (norm.weight == nullptr) return x;
        for (int64_t row = 0; row < rows; ++row) {
            float mean;
            float rstd;
            layer_norm_row(hidden_, x + row * hidden_, nullptr, norm.weight, norm.bias, norm.eps, to + row * hidden_, mean,
                           rstd);
        }
        return to;
    }

    void add(int64_t rows, const float* sums, const float* x, float* y) const {
        for (int64_t row = 0; row < rows; ++row) {
            const float* one = sums + row * row_;
            const float* other = x + row * hidden_;
            float* to = y + row * hidden_;
#pragma omp simd
            for (int64_t i = 0; i < hidden_; ++i) to[i] = one[i] + other[i];
        }
    }

    // From what attention gives, projected, to what the feed-forward layer reads. Where norms come first, y receives the
    // sum before the norm, which may stand where x does.
    void finish_attention(const EncoderLayer& layer, int64_t rows, const float* sums, const float* x, float* attended,
                          float* y) const {
        if (!shape_.norm_first) return normalise(layer.attention_norm, rows, sums, x, attended);
        add(rows, sums, x, y);
        normalise_before(layer.output_norm, rows, y, attended);
    }

    void finish_layer(const EncoderLayer& layer, int64_t rows, const float* sums, const float* attended, float* y) const {
        if (!shape_.norm_first) return normalise(layer.output_norm, rows, sums, attended, y);
        add(rows, sums, y, y);
    }

    static bool has_narrow_projections(const EncoderLayer& layer) {
        return layer.query.is_narrow() || layer.key.is_narrow() || layer.value.is_narrow();
    }

    struct Projection {
        const Linear* linear;
        float* result;
        const Rotation* rotation;  // or null
    };

    std::array<Projection, 3> projections(int64_t layer) const {
        const EncoderLayer& parts = layers_[layer];
        const Rotation* rotation = parts.rotation < 0 ? nullptr : shape_.rotations + parts.rotation;
        return {{{&parts.query, query_, rotation}, {&parts.key, key_, rotation}, {&parts.value, value_, nullptr}}};
    }

    // Rows of a projection; `tokens` are theirs, null: the rows themselves.
    void rotate(const Projection& projection, int64_t first, int64_t rows, const int64_t* tokens) const {
        const AttentionShape& shape = shape_.attention;
        for (int64_t row = first; row < first + rows; ++row)
            rotate_row(*projection.rotation, tokens == nullptr ? row : tokens[row], shape.heads, shape.head_size,
                       projection.result + row * row_);
    }

    // ---- many rows: a block of them goes through a layer in one piece ----

    int64_t max_block_rows() const {
        return std::max<int64_t>(2 * kTileRows, kMaxBlockFloats / row_ / kTileRows * kTileRows);
    }

    int64_t block_workspace() const {
        const int64_t rows = max_block_rows() + kTileRows;
        return rows * (2 * row_ + (shape_.has_gates ? 2 : 1) * slice_) + Workspace::narrow_size(shape_.narrow, rows, hidden_) +
               Workspace::narrow_size(shape_.narrow, rows, slice_);
    }

    // A thread's own memory for a block.
    struct Block {
        float* sums;
        float* attended;
        Activation hidden;  // values are set for each use
        Activation slice;
        float* gate;  // of the slice
    };

    Block own_block(const Worker& worker) const {
        Workspace own = workspace_.rest(worker.number() * block_workspace());
        const int64_t rows = max_block_rows() + kTileRows;
        float* sums = own.take(rows * row_);
        float* attended = own.take(rows * row_);
        float* slice = own.take(rows * slice_);
        float* gate = shape_.has_gates ? own.take(rows * slice_) : nullptr;
        return {sums, attended, own.activation(shape_.narrow, nullptr, 0, rows, hidden_),
                own.activation(shape_.narrow, slice, slice_, rows, slice_), gate};
    }

    // Blocks of nearly one size, as many for each thread.
    int64_t num_blocks(int64_t rows) const {
        const int64_t most = max_block_rows() * threads_;
        return threads_ * ((rows + most - 1) / most);
    }

    int64_t block_begin(int64_t rows, int64_t block) const {
        const int64_t strips = (rows + kTileRows - 1) / kTileRows;
        return std::min(rows, strips * block / num_blocks(rows) * kTileRows);
    }

    void run_by_rows(const Worker& worker, Scratch& scratch) const {
        const Block own = own_block(worker);
        worker.share_out(num_blocks(tokens_), [&](int64_t block) { project_block(0, block, own); });
        for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
            if (is_partial(layer)) {
                gather_rows(worker);
                worker.share_evenly(num_blocks(shape_.num_rows), [&](int64_t block) { project_selected(block, own); });
            }
            attend(layer, worker, scratch);
            const Part current = part(layer);
            worker.share_out(num_blocks(current.rows), [&](int64_t block) {
                finish_block(current, block, own);
                if (layer + 1 < shape_.num_layers) project_block(layer + 1, block, own);
            });
        }
    }

    void project(const float* x, int64_t rows, int64_t first, Projection projection, const int64_t* tokens,
                 const Block& own) const {
        multiply_linear(own_hidden(x, own), rows, *projection.linear, 0, hidden_, hidden_,
                        {projection.result + first * row_, row_}, 0, num_panels(hidden_), Nothing());
        if (projection.rotation != nullptr) rotate(projection, first, rows, tokens);
    }

    Activation own_hidden(const float* x, const Block& own) const {
        Activation result = own.hidden;
        result.values = const_cast<float*>(x);
        result.row = hidden_;
        return result;
    }

    void project_block(int64_t layer, int64_t block, const Block& own) const {
        const int64_t first = block_begin(tokens_, block);
        const int64_t rows = block_begin(tokens_, block + 1) - first;
        if (rows == 0) return;
        const float* x = layer_input(layer) + first * hidden_;
        if (shape_.norm_first) x = normalise_before(layers_[layer].attention_norm, rows, x, own.attended);
        if (has_narrow_projections(layers_[layer])) own_hidden(x, own).round(rows);
        const auto all = projections(layer);
        for (size_t i = is_partial(layer) ? 1 : 0; i < all.size(); ++i) project(x, rows, first, all[i], nullptr, own);
    }

    // The queries of the rows that are wanted.
    void project_selected(int64_t block, const Block& own) const {
        const int64_t first = block_begin(shape_.num_rows, block);
        const int64_t rows = block_begin(shape_.num_rows, block + 1) - first;
        if (rows == 0) return;
        const float* x = selected_ + first * hidden_;
        if (shape_.norm_first) x = normalise_before(layers_[shape_.num_layers - 1].attention_norm, rows, x, own.attended);
        const Projection query = projections(shape_.num_layers - 1)[0];
        if (query.linear->is_narrow()) own_hidden(x, own).round(rows);
        project(x, rows, first, query, shape_.rows, own);
    }

    void finish_block(const Part& part, int64_t block, const Block& own) const {
        const int64_t first = block_begin(part.rows, block);
        const int64_t rows = block_begin(part.rows, block + 1) - first;
        if (rows == 0) return;
        const EncoderLayer& layer = layers_[part.layer];
        const int64_t panels = num_panels(hidden_);
        Activation context = own.hidden;
        context.values = context_ + first * row_;
        context.row = row_;
        if (layer.attention_output.is_narrow()) context.round(rows);
        multiply_linear(context, rows, layer.attention_output, 0, hidden_, hidden_, {own.sums, row_}, 0, panels, Nothing());
        float* y = part.y + first * hidden_;
        finish_attention(layer, rows, own.sums, part.x + first * hidden_, own.attended, y);

        Activation attended = own.hidden;
        attended.values = own.attended;
        attended.row = hidden_;
        if (layer.intermediate.is_narrow()) attended.round(rows);
        for (int64_t begin = 0; begin < inner_; begin += slice_) {
            Activation slice = own.slice;
            slice.width = std::min(slice_, inner_ - begin);
            multiply_linear(attended, rows, layer.intermediate, 0, hidden_, inner_, {slice.values, slice_, begin},
                            begin / kPanel, std::min(begin / kPanel + kSlicePanels, num_panels(inner_)),
                            NonlinearStrip{shape_.nonlinearity});
            if (shape_.has_gates)
                multiply_linear(attended, rows, layer.gate, 0, hidden_, inner_, {own.gate, slice_, begin}, begin / kPanel,
                                std::min(begin / kPanel + kSlicePanels, num_panels(inner_)),
                                GateStrip{own.gate, slice.values});
            if (layer.output.is_narrow()) slice.round(rows);
            multiply_linear(slice, rows, layer.output, begin, inner_, hidden_, {own.sums, row_}, 0, panels, Nothing());
        }
        finish_layer(layer, rows, own.sums, own.attended, y);
    }

    // ---- few rows: every product is shared out by its panels ----

    static void share_out_rounding(const Worker& worker, bool is_wanted, const Activation& a, int64_t rows) {
        if (is_wanted) worker.share_evenly(rows, [&](int64_t row) { a.from_row(row).round(1); });
    }

    // What the projections read.
    const float* share_out_first_norm(const Worker& worker, const EncoderLayer& layer, int64_t rows, const float* x,
                                      float* to) const {
        if (!shape_.norm_first || layer.attention_norm.weight == nullptr) return x;
        worker.share_evenly(
            rows, [&](int64_t row) { normalise_before(layer.attention_norm, 1, x + row * hidden_, to + row * hidden_); });
        return to;
    }

    void share_out_projections(const Worker& worker, const Activation& x, int64_t rows, const Projection* first,
                               int64_t count) const {
        const int64_t panels = num_panels(hidden_);
        const int64_t begin = worker.first_of(count * panels);
        const int64_t end = worker.last_of(count * panels);
        for (int64_t i = begin / panels; i * panels < end; ++i)
            multiply_linear(x, rows, *first[i].linear, 0, hidden_, hidden_, {first[i].result, row_},
                            std::max(begin - i * panels, int64_t{0}), std::min(end - i * panels, panels), Nothing());
        worker.wait();
    }

    void share_out_rotations(const Worker& worker, int64_t rows, const Projection* first, int64_t count,
                             const int64_t* tokens) const {
        if (first->rotation == nullptr) return;
        worker.share_evenly(count * rows, [&](int64_t i) { rotate(first[i / rows], i % rows, 1, tokens); });
    }

    void run_by_columns(const Worker& worker, Scratch& scratch) const {
        const int64_t inner_row = round_up(inner_, kLanes);
        Workspace rest = workspace_.rest();
        float* sums = rest.take(most_rows_ * row_);
        const auto activations = [&](float* values, int64_t row, int64_t width) {
            return rest.activation(shape_.narrow, values, row, most_rows_, width);
        };
        const Activation attended = activations(rest.take(most_rows_ * row_), hidden_, hidden_);
        const Activation context = activations(context_, row_, hidden_);
        const Activation activation = activations(rest.take(most_rows_ * inner_row), inner_row, inner_);
        float* gate = shape_.has_gates ? rest.take(most_rows_ * inner_row) : nullptr;
        Activation x = activations(nullptr, hidden_, hidden_);
        const int64_t panels = num_panels(hidden_);
        const int64_t inner_panels = num_panels(inner_);
        for (int64_t i = 0; i < shape_.num_layers; ++i) {
            const EncoderLayer& layer = layers_[i];
            const auto heads = projections(i);
            x.values = const_cast<float*>(share_out_first_norm(worker, layer, tokens_, layer_input(i), attended.values));
            share_out_rounding(worker, has_narrow_projections(layer), x, tokens_);
            if (is_partial(i)) {
                share_out_projections(worker, x, tokens_, &heads[1], 2);
                share_out_rotations(worker, tokens_, &heads[1], 1, nullptr);
                gather_rows(worker);
                x.values = const_cast<float*>(
                    share_out_first_norm(worker, layer, shape_.num_rows, selected_, attended.values));
                share_out_rounding(worker, layer.query.is_narrow(), x, shape_.num_rows);
                share_out_projections(worker, x, shape_.num_rows, &heads[0], 1);
                share_out_rotations(worker, shape_.num_rows, &heads[0], 1, shape_.rows);
            } else {
                share_out_projections(worker, x, tokens_, &heads[0], 3);
                share_out_rotations(worker, tokens_, &heads[0], 2, nullptr);
            }
            attend(i, worker, scratch);
            const Part current = part(i);
            const int64_t rows = current.rows;
            share_out_rounding(worker, layer.attention_output.is_narrow(), context, rows);
            multiply_linear(context, rows, layer.attention_output, 0, hidden_, hidden_, {sums, row_},
                            worker.first_of(panels), worker.last_of(panels), Nothing());
            worker.wait();
            worker.share_evenly(rows, [&](int64_t row) {
                const int64_t at = row * hidden_;
                finish_attention(layer, 1, sums + row * row_, current.x + at, attended.values + at, current.y + at);
            });
            share_out_rounding(worker, layer.intermediate.is_narrow(), attended, rows);
            multiply_linear(attended, rows, layer.intermediate, 0, hidden_, inner_, {activation.values, inner_row},
                            worker.first_of(inner_panels), worker.last_of(inner_panels), NonlinearStrip{shape_.nonlinearity});
            if (shape_.has_gates)
                multiply_linear(attended, rows, layer.gate, 0, hidden_, inner_, {gate, inner_row},
                                worker.first_of(inner_panels), worker.last_of(inner_panels),
                                GateStrip{gate, activation.values});
            worker.wait();
            share_out_rounding(worker, layer.output.is_narrow(), activation, rows);
            for (int64_t panel = worker.first_of(panels); panel < worker.last_of(panels); ++panel)
                for (int64_t begin = 0; begin < inner_; begin += slice_)
                    multiply_linear(activation.columns(begin, std::min(slice_, inner_ - begin)), rows, layer.output, begin,
                                    inner_, hidden_, {sums, row_}, panel, panel + 1, Nothing());
            worker.wait();
            worker.share_evenly(rows, [&](int64_t row) {
                const int64_t at = row * hidden_;
                finish_layer(layer, 1, sums + row * row_, attended.values + at, current.y + at);
            });
        }
    }

    const EncoderShape& shape_;
    const EncoderLayer* layers_;
    const float* input_;
    float* const* outputs_;
    int threads_;
    int64_t tokens_;
    int64_t most_rows_;  // of an activation: rows that are wanted twice may be more than there are tokens
    int64_t hidden_, inner_, row_, slice_;
    Workspace workspace_;
    float *query_, *key_, *value_, *context_;
    float* selected_ = nullptr;
};

int64_t encoder_workspace(const EncoderShape& shape, int threads) {
    return EncoderStack(shape, nullptr, nullptr, nullptr, nullptr, threads).workspace_size();
}

void encoder(const EncoderShape& shape, const EncoderLayer* layers, const float* input, float* const* outputs,
             float* workspace, int threads) {
    EncoderStack(shape, layers, input, outputs, workspace, threads).run();
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
