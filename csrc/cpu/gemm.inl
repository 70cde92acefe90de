// Matrix products in float32.

namespace bert_fast::cpu::BERT_FAST_ISA {

// Terms added one after another; long sums are sums of such sums, which keeps their digits, and keeps the part of B that
// is in use within the second-level cache.
constexpr int64_t kDepthBlock = 512;

// sum[i][j] += A * B for a tile. A is read as a[i * a_row + p * a_column], so it may be transposed.
template <int kRows, int kVectors, bool kFetches = false>
BERT_FAST_INLINE void accumulate(const float* a, int64_t a_row, int64_t a_column, const float* b, int64_t b_row,
                                 int64_t depth, Vec (&sum)[kRows][kVectors], const char* ahead = nullptr) {
    for (int64_t p = 0; p < depth; ++p) {
        if (kFetches) fetch_lines(ahead + p * kLinesAhead * kLine);
        Vec right[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) load(b + p * b_row + j * kLanes, right[j]);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const float factor = a[i * a_row + p * a_column];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * right[j];
        }
    }
}

// ---- products with a weight matrix ---------------------------------------------------------------------------------

struct FloatStrips {
    struct Strip {
        const float* a;
        int64_t a_row, a_column;
        const float* b;
        int64_t steps;
    };

    template <int kRows, int kVectors>
    static void multiply(const Strip& s, const StripTarget& target) {
        Vec sum[kRows][kVectors] = {};
        if (target.ahead != nullptr) {
            accumulate<kRows, kVectors, true>(s.a, s.a_row, s.a_column, s.b, kVectors * kLanes, s.steps, sum, target.ahead);
        } else {
            accumulate<kRows, kVectors>(s.a, s.a_row, s.a_column, s.b, kVectors * kLanes, s.steps, sum);
        }
        finish_strip(target, sum);
    }
};

int64_t packed_size(int64_t columns, int64_t depth) { return round_up(columns, kLanes) * depth; }

// to (depth x width) = some columns of B, `filled` of them, then zeros.
inline void pack_panel(const Matrix& b, int64_t depth, int64_t filled, int64_t width, float* to) {
    int64_t first = 0;
#ifdef BERT_FAST_SHUFFLES
    if (b.row == 1) {  // a transposed matrix: squares of it pass through the registers
        const int64_t whole = filled / kLanes * kLanes;
        for (; first + kLanes <= depth; first += kLanes) {
            for (int64_t n = 0; n < whole; n += kLanes) {
                Vec square[kLanes];
                for (int i = 0; i < kLanes; ++i) load(b.at(first, n + i), square[i]);
                transpose_square<kLanes / 2>(square);
                for (int i = 0; i < kLanes; ++i) store(square[i], to + (first + i) * width + n);
            }
            for (int64_t p = first; p < first + kLanes; ++p) {
                for (int64_t n = whole; n < filled; ++n) to[p * width + n] = *b.at(p, n);
                std::fill(to + p * width + filled, to + (p + 1) * width, 0.0f);
            }
        }
    }
#endif
    for (int64_t p = first; p < depth; ++p) {
        float* row = to + p * width;
        if (b.column == 1) {
            std::memcpy(row, b.at(p, 0), filled * sizeof(float));
        } else {
            for (int64_t n = 0; n < filled; ++n) row[n] = *b.at(p, n);
        }
        std::fill(row + filled, row + width, 0.0f);
    }
}

// panels = B (depth x columns) in panels of kPanel columns, each depth x its width, zeros beyond the last column.
inline void pack_panels(const Matrix& b, int64_t depth, int64_t columns, int64_t first_panel, int64_t last_panel,
                        float* panels) {
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t first = panel * kPanel;
        const int64_t width = panel_vectors(columns, panel) * kLanes;
        pack_panel({b.at(0, first), b.row, b.column}, depth, std::min(width, columns - first), width, panels + first * depth);
    }
}

// A is (rows x depth), any matrix; of B the `depth` rows from first_depth on take part.
struct FloatFactors {
    const float* a;
    int64_t a_row, a_column;
    const float* panels;
    int64_t panel_steps;
    int64_t first_depth;
    int64_t depth;

    const StripKernels<FloatStrips>& kernels() const { return kStripKernels<FloatStrips>; }
    int64_t num_parts() const { return (depth + kDepthBlock - 1) / kDepthBlock; }
    int64_t first_step(int64_t part) const { return first_depth + depth * part / num_parts(); }

    FloatStrips::Strip strip(int64_t row, int64_t, int64_t part, const char* b, int64_t steps) const {
        return {a + row * a_row + (first_step(part) - first_depth) * a_column, a_row, a_column,
                reinterpret_cast<const float*>(b), steps};
    }
};

// ---- any product ---------------------------------------------------------------------------------------------------

constexpr int64_t kRowBlock = 8 * kTileRows;

// Floats for matrix_product: B in panels; for each thread a part of A and the last panel of C.
int64_t matrix_product_workspace(int64_t depth, int64_t columns, int threads) {
    return packed_size(columns, depth) + threads * kRowBlock * (kDepthBlock + kPanel);
}

// Some rows of C = A * B + bias, B being packed.
inline void multiply_row_block(const Matrix& a, const float* panels, int64_t rows, int64_t depth, int64_t columns,
                               const float* bias, float* c, float* own) {
    float* packed_a = own;
    float* last_columns = own + kRowBlock * kDepthBlock;
    const int64_t count = num_panels(columns);
    const int64_t whole_panels = columns % kLanes == 0 ? count : count - 1;
    for (int64_t first = 0; first < depth; first += kDepthBlock) {
        const int64_t terms = std::min(kDepthBlock, depth - first);
        FloatFactors factors{a.at(0, first), a.row, a.column, panels, depth, first, terms};
        if (a.row == 1) {  // columns of A, each in a line of its own: gathered, since a tile reads them again and again
            for (int64_t p = 0; p < terms; ++p) std::memcpy(packed_a + p * rows, a.at(0, first + p), rows * sizeof(float));
            factors.a = packed_a;
            factors.a_column = rows;
        }
        Result result{rows, columns, first + terms == depth ? bias : nullptr, c, columns, 0, first > 0};
        multiply_panels(factors, result, 0, whole_panels, Nothing());
        if (whole_panels == count) continue;
        result.first_column = whole_panels * kPanel;
        result.c = last_columns;
        result.c_row = kPanel;
        multiply_panels(factors, result, whole_panels, count, Nothing());
    }
    if (whole_panels < count) {
        const int64_t column = whole_panels * kPanel;
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(c + row * columns + column, last_columns + row * kPanel, (columns - column) * sizeof(float));
    }
}

// C (rows x columns, dense) = A (rows x depth) * B (depth x columns) + bias (columns, or null).
void matrix_product(const Matrix& a, const Matrix& b, int64_t rows, int64_t depth, int64_t columns, const float* bias,
                    float* c, float* workspace, int threads) {
    const int64_t panels = num_panels(columns);
    const int64_t block_rows = std::min(kRowBlock, round_up((rows + threads - 1) / threads, kTileRows));
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float* own = workspace + packed_size(columns, depth) + thread_number() * kRowBlock * (kDepthBlock + kPanel);
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels; ++panel) pack_panels(b, depth, columns, panel, panel + 1, workspace);
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * block_rows;
            multiply_row_block({a.at(first, 0), a.row, a.column}, workspace, std::min(block_rows, rows - first),
                               depth, columns, bias, c + first * columns, own);
        }
    }
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
