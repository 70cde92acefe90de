// A stack of encoder layers in one parallel region. Rows meet only in attention; from there to the next layer's attention
// a block of rows stays in one thread's cache. Where there are too few rows for that, the threads share out the columns.

namespace bert_fast::cpu::BERT_FAST_ISA {

void pack_weight(const float* weight, int64_t outputs, int64_t inputs, float* packed, int threads) {
    const int64_t panels = num_panels(outputs);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = 0; panel < panels; ++panel)
        pack_panels(weight, 1, inputs, inputs, outputs, panel, panel + 1, packed);
}

// Columns of the intermediate activation that exist at a time: FFN's second product begins before its first one ends.
constexpr int64_t kSlicePanels = 384 / kPanel;

struct GeluStrip {
    Gelu kind;
    BERT_FAST_INLINE void operator()(float* c, int64_t c_row, int64_t rows, int64_t columns) const {
        for (int64_t row = 0; row < rows; ++row) {
            float* values = c + row * c_row;
            if (kind == Gelu::erf) {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) values[i] = ErfGelu::value(values[i]);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < columns; ++i) values[i] = TanhGelu::value(values[i]);
            }
        }
    }
};

class EncoderStack {
  public:
    EncoderStack(const EncoderShape& shape, const EncoderLayer* layers, const float* input, float* const* outputs,
                 float* workspace, int threads)
        : shape_(shape), layers_(layers), input_(input), outputs_(outputs), threads_(threads),
          tokens_(shape.attention.tokens), hidden_(shape.hidden_size), row_(row_size(shape)) {
        query_ = workspace;
        key_ = query_ + tokens_ * row_;
        value_ = key_ + tokens_ * row_;
        context_ = value_ + tokens_ * row_;
        rest_ = context_ + tokens_ * row_;
    }

    static int64_t row_size(const EncoderShape& shape) { return round_up(shape.hidden_size, kLanes); }

    static bool shares_columns(const EncoderShape& shape, int threads) {
        return threads > 1 && shape.attention.tokens < threads * kMinRowsPerThread;
    }

    static int64_t workspace(const EncoderShape& shape, int threads) {
        const int64_t row = row_size(shape);
        const int64_t everywhere = 4 * shape.attention.tokens * row;
        if (shares_columns(shape, threads))
            return everywhere + shape.attention.tokens * (2 * row + round_up(shape.intermediate_size, kLanes));
        return everywhere + threads * block_workspace(shape);
    }

    void run() {
#pragma omp parallel num_threads(threads_) if (threads_ > 1)
        {
            Scratch scratch;
            if (shares_columns(shape_, threads_)) {
                run_by_columns(scratch);
            } else {
                run_by_rows(scratch);
            }
        }
    }

  private:
    static constexpr int64_t kMinRowsPerThread = 24;
    static constexpr int64_t kMaxBlockFloats = 48 * 1024;  // of one row-wise activation

    static int64_t max_block_rows(const EncoderShape& shape) {
        return std::max<int64_t>(2 * kTileRows, kMaxBlockFloats / row_size(shape) / kTileRows * kTileRows);
    }

    static int64_t slice_size(const EncoderShape& shape) {
        return std::min(kSlicePanels * kPanel, round_up(shape.intermediate_size, kLanes));
    }

    static int64_t block_workspace(const EncoderShape& shape) {
        return (max_block_rows(shape) + kTileRows) * (2 * row_size(shape) + slice_size(shape));
    }

    // ---- both ways ----

    const float* layer_input(int64_t layer) const { return layer == 0 ? input_ : outputs_[layer - 1]; }

    Product product(const float* a, int64_t a_row, int64_t rows, const Linear& linear, int64_t depth, int64_t columns,
                    float* c, int64_t c_row) const {
        Product result{};
        result.a = a;
        result.a_row = a_row;
        result.a_column = 1;
        result.rows = rows;
        result.panels = linear.weight;
        result.panel_depth = depth;
        result.depth = depth;
        result.columns = columns;
        result.bias = linear.bias;
        result.c = c;
        result.c_row = c_row;
        return result;
    }

    // The part of the layer's last product that a slice of the intermediate activation gives. Both ways add up the same
    // slices, so a text's result depends neither on the threads nor on the batch it is in.
    Product second_product(const EncoderLayer& layer, int64_t rows, int64_t begin, const float* slice, int64_t slice_row,
                           float* sums) const {
        const int64_t inner = shape_.intermediate_size;
        Product result = product(slice, slice_row, rows, layer.output, inner, hidden_, sums, row_);
        result.first_depth = begin;
        result.depth = std::min(slice_size(shape_), inner - begin);
        result.accumulates = begin > 0;
        if (begin + result.depth < inner) result.bias = nullptr;
        return result;
    }

    void attend(Scratch& scratch) {
        const AttentionShape& shape = shape_.attention;
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < shape.num_tiles * shape.heads; ++item)
            attention_tile(shape, shape.tiles[item / shape.heads], item % shape.heads, {query_, row_}, {key_, row_},
                           {value_, row_}, {context_, row_}, nullptr, scratch);
    }

    void normalise(const Norm& norm, int64_t rows, const float* x, int64_t x_row, const float* residual, float* y) const {
        for (int64_t row = 0; row < rows; ++row) {
            float mean;
            float rstd;
            layer_norm_row(hidden_, x + row * x_row, residual + row * hidden_, norm.weight, norm.bias, norm.eps,
                           y + row * hidden_, mean, rstd);
        }
    }

    // ---- many rows: a block of them goes through a layer in one piece ----

    void run_by_rows(Scratch& scratch) {
        const int64_t blocks = num_blocks();
#ifdef _OPENMP
        float* own = rest_ + omp_get_thread_num() * block_workspace(shape_);
#else
        float* own = rest_;
#endif
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block) project_heads(layers_[0], block, input_);
        for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
            attend(scratch);
#pragma omp for schedule(dynamic)
            for (int64_t block = 0; block < blocks; ++block) {
                finish_layer(layers_[layer], block, layer_input(layer), outputs_[layer], own);
                if (layer + 1 < shape_.num_layers) project_heads(layers_[layer + 1], block, outputs_[layer]);
            }
        }
    }

    // Blocks of nearly one size, as many for each thread.
    int64_t num_blocks() const {
        const int64_t most = max_block_rows(shape_) * threads_;
        return threads_ * ((tokens_ + most - 1) / most);
    }

    int64_t block_begin(int64_t block) const {
        const int64_t strips = (tokens_ + kTileRows - 1) / kTileRows;
        return std::min(tokens_, strips * block / num_blocks() * kTileRows);
    }

    void project_heads(const EncoderLayer& layer, int64_t block, const float* x) {
        const int64_t first = block_begin(block);
        const int64_t rows = block_begin(block + 1) - first;
        if (rows == 0) return;
        const Linear* linears[] = {&layer.query, &layer.key, &layer.value};
        float* const results[] = {query_, key_, value_};
        for (int i = 0; i < 3; ++i)
            multiply_panels(product(x + first * hidden_, hidden_, rows, *linears[i], hidden_, hidden_,
                                    results[i] + first * row_, row_),
                            0, num_panels(hidden_), Nothing());
    }

    void finish_layer(const EncoderLayer& layer, int64_t block, const float* x, float* y, float* own) {
        const int64_t first = block_begin(block);
        const int64_t rows = block_begin(block + 1) - first;
        if (rows == 0) return;
        const int64_t inner = shape_.intermediate_size;
        const int64_t slice = slice_size(shape_);
        float* sums = own;
        float* attended = sums + rows * row_;
        float* activation = attended + rows * row_;
        multiply_panels(product(context_ + first * row_, row_, rows, layer.attention_output, hidden_, hidden_, sums, row_),
                        0, num_panels(hidden_), Nothing());
        normalise(layer.attention_norm, rows, sums, row_, x + first * hidden_, attended);
        const int64_t last_panel = num_panels(inner);
        for (int64_t panel = 0; panel < last_panel; panel += kSlicePanels) {
            const int64_t stop = std::min(panel + kSlicePanels, last_panel);
            const int64_t begin = panel * kPanel;
            Product first_product = product(attended, hidden_, rows, layer.intermediate, hidden_, inner, activation, slice);
            first_product.first_column = begin;
            multiply_panels(first_product, panel, stop, GeluStrip{shape_.gelu});
            multiply_panels(second_product(layer, rows, begin, activation, slice, sums), 0, num_panels(hidden_), Nothing());
        }
        normalise(layer.output_norm, rows, sums, row_, attended, y + first * hidden_);
    }

    // ---- few rows: every product is shared out by its panels ----

    template <typename Finish>
    void share_out(const Product& whole, const Finish& finish) {
        const int64_t panels = num_panels(whole.columns);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel) multiply_panels(whole, panel, panel + 1, finish);
    }

    void share_out_norm(const Norm& norm, const float* x, const float* residual, float* y) {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < tokens_; ++row)
            normalise(norm, 1, x + row * row_, row_, residual + row * hidden_, y + row * hidden_);
    }

    void run_by_columns(Scratch& scratch) {
        const int64_t inner_row = round_up(shape_.intermediate_size, kLanes);
        float* sums = rest_;
        float* attended = sums + tokens_ * row_;
        float* activation = attended + tokens_ * row_;
        for (int64_t i = 0; i < shape_.num_layers; ++i) {
            const EncoderLayer& layer = layers_[i];
            const float* x = layer_input(i);
            const Linear* linears[] = {&layer.query, &layer.key, &layer.value};
            float* const results[] = {query_, key_, value_};
            const int64_t panels = num_panels(hidden_);
#pragma omp for schedule(static)
            for (int64_t item = 0; item < 3 * panels; ++item)
                multiply_panels(product(x, hidden_, tokens_, *linears[item / panels], hidden_, hidden_,
                                        results[item / panels], row_),
                                item % panels, item % panels + 1, Nothing());
            attend(scratch);
            share_out(product(context_, row_, tokens_, layer.attention_output, hidden_, hidden_, sums, row_), Nothing());
            share_out_norm(layer.attention_norm, sums, x, attended);
            share_out(product(attended, hidden_, tokens_, layer.intermediate, hidden_, shape_.intermediate_size,
                              activation, inner_row),
                      GeluStrip{shape_.gelu});
#pragma omp for schedule(static)
            for (int64_t panel = 0; panel < panels; ++panel)
                for (int64_t begin = 0; begin < shape_.intermediate_size; begin += slice_size(shape_))
                    multiply_panels(second_product(layer, tokens_, begin, activation + begin, inner_row, sums), panel,
                                    panel + 1, Nothing());
            share_out_norm(layer.output_norm, sums, attended, outputs_[i]);
        }
    }

    const EncoderShape& shape_;
    const EncoderLayer* layers_;
    const float* input_;
    float* const* outputs_;
    int threads_;
    int64_t tokens_, hidden_, row_;
    float *query_, *key_, *value_, *context_, *rest_;
};

int64_t encoder_workspace(const EncoderShape& shape, int threads) { return EncoderStack::workspace(shape, threads); }

void encoder(const EncoderShape& shape, const EncoderLayer* layers, const float* input, float* const* outputs,
             float* workspace, int threads) {
    EncoderStack(shape, layers, input, outputs, workspace, threads).run();
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
