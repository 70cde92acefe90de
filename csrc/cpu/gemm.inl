// Matrix products. Every one has the form C[m][n] (+)= A[m][k] * B[k][n] with n along the vector lanes; a tile of C lies in
// registers while k runs (Goto and van de Geijn 2008, with the layers of packing that a weight matrix needs no more than
// once).

namespace bert_fast::cpu::BERT_FAST_ISA {

// The tile of C: the largest that leaves registers for a row of B and one element of A.
constexpr int kTileRows = BERT_FAST_REGISTERS >= 32 ? 8 : 6;
constexpr int kTileVectors = BERT_FAST_REGISTERS >= 32 ? 3 : 2;
constexpr int64_t kPanel = kTileVectors * kLanes;

// Terms added one after another; long sums are sums of such sums, which keeps their digits, and keeps the part of B that
// is in use within the second-level cache.
constexpr int64_t kDepthBlock = 512;

// What the strips of a panel fetch while they compute: the panel after it, kLinesAhead lines for each of their steps, so
// that it comes evenly and is in the second-level cache when its turn comes.
constexpr int64_t kLine = 64;
constexpr int64_t kLinesAhead = 2;

BERT_FAST_INLINE void fetch_lines(const char* lines) {
    for (int64_t i = 0; i < kLinesAhead; ++i) __builtin_prefetch(lines + i * kLine, 0, 2);
}

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

// One panel of columns for one strip of rows.
struct Strip {
    const float* a;
    int64_t a_row, a_column;
    const float* b;  // depth x (vectors * kLanes), dense
    int64_t depth;
    const float* bias;  // of the panel's columns, or null
    float* c;
    int64_t c_row;
    bool accumulates;    // C += A * B
    const char* ahead;  // what to fetch meanwhile, or null
};

template <int kRows, int kVectors>
void multiply_strip(const Strip& s) {
    Vec sum[kRows][kVectors] = {};
    if (s.ahead != nullptr) {
        accumulate<kRows, kVectors, true>(s.a, s.a_row, s.a_column, s.b, kVectors * kLanes, s.depth, sum, s.ahead);
    } else {
        accumulate<kRows, kVectors>(s.a, s.a_row, s.a_column, s.b, kVectors * kLanes, s.depth, sum);
    }
    Vec bias[kVectors] = {};
    if (s.bias != nullptr)
        for (int j = 0; j < kVectors; ++j) load(s.bias + j * kLanes, bias[j]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        float* row = s.c + i * s.c_row;
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            Vec value = sum[i][j] + bias[j];
            if (s.accumulates) {
                Vec before;
                load(row + j * kLanes, before);
                value += before;
            }
            store(value, row + j * kLanes);
        }
    }
}

using StripKernel = void (*)(const Strip&);

template <int kVectors, int... kRows>
constexpr std::array<StripKernel, sizeof...(kRows)> strip_kernels(std::integer_sequence<int, kRows...>) {
    return {multiply_strip<kRows + 1, kVectors>...};
}

template <int... kVectors>
constexpr std::array<std::array<StripKernel, kTileRows>, sizeof...(kVectors)> panel_kernels(
    std::integer_sequence<int, kVectors...>) {
    return {strip_kernels<kVectors + 1>(std::make_integer_sequence<int, kTileRows>())...};
}

// By vectors and by rows, less one each.
constexpr auto kStripKernels = panel_kernels(std::make_integer_sequence<int, kTileVectors>());

// Rows in strips of nearly one size: a strip of one row would wait for B most of its time.
struct Strips {
    int64_t rows;
    int64_t count;
    explicit Strips(int64_t rows_) : rows(rows_), count((rows_ + kTileRows - 1) / kTileRows) {}
    int64_t begin(int64_t strip) const { return rows * strip / count; }
};

inline int64_t num_panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Width of a panel in vectors; only the last may be narrower.
inline int panel_vectors(int64_t columns, int64_t panel) {
    return static_cast<int>((std::min(kPanel, columns - panel * kPanel) + kLanes - 1) / kLanes);
}

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

// A part of C (rows x columns) = A (rows x depth) * B + bias: the columns of some panels. C's rows have room for whole
// vectors.
struct Product {
    const float* a;
    int64_t a_row;
    int64_t a_column = 1;
    int64_t rows;
    const float* panels;
    int64_t panel_depth;  // rows of the whole B
    int64_t first_depth = 0;
    int64_t depth;  // rows of B that take part, and columns of A
    int64_t columns;
    const float* bias = nullptr;
    float* c;  // at first_column
    int64_t c_row;
    int64_t first_column = 0;
    bool accumulates = false;
};

template <typename Finish>
void multiply_panels(const Product& product, int64_t first_panel, int64_t last_panel, const Finish& finish) {
    const Strips strips(product.rows);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t column = panel * kPanel;
        const int vectors = panel_vectors(product.columns, panel);
        const int64_t width = vectors * kLanes;
        alignas(64) float bias[kPanel] = {};
        if (product.bias != nullptr)
            std::memcpy(bias, product.bias + column, std::min(width, product.columns - column) * sizeof(float));
        const int64_t blocks = (product.depth + kDepthBlock - 1) / kDepthBlock;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t start = product.depth * block / blocks;
            const int64_t stop = product.depth * (block + 1) / blocks;
            const bool is_last = block + 1 == blocks;
            const float* b = product.panels + column * product.panel_depth + (product.first_depth + start) * width;
            const char* ahead = reinterpret_cast<const char*>(b + product.panel_depth * width);
            const int64_t part_bytes = (stop - start) * width * static_cast<int64_t>(sizeof(float));
            const int64_t strip_bytes = (stop - start) * kLinesAhead * kLine;
            for (int64_t strip = 0; strip < strips.count; ++strip) {
                const int64_t row = strips.begin(strip);
                const int64_t rows = strips.begin(strip + 1) - row;
                float* c = product.c + row * product.c_row + column - product.first_column;
                kStripKernels[vectors - 1][rows - 1]({
                    product.a + row * product.a_row + start * product.a_column, product.a_row, product.a_column,
                    b, stop - start,
                    is_last && product.bias != nullptr ? bias : nullptr, c, product.c_row,
                    product.accumulates || block > 0,
                    panel + 1 < last_panel && strip * strip_bytes < part_bytes ? ahead + strip * strip_bytes : nullptr});
                if (is_last) finish(c, product.c_row, rows, width);
            }
        }
    }
}

struct Nothing {
    BERT_FAST_INLINE void operator()(float*, int64_t, int64_t, int64_t) const {}
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
        Product product{a.at(0, first), a.row, a.column, rows, panels, depth, first, terms, columns, nullptr,
                        c, columns, 0, first > 0};
        if (a.row == 1) {  // columns of A, each in a line of its own: gathered, since a tile reads them again and again
            for (int64_t p = 0; p < terms; ++p) std::memcpy(packed_a + p * rows, a.at(0, first + p), rows * sizeof(float));
            product.a = packed_a;
            product.a_column = rows;
        }
        if (first + terms == depth) product.bias = bias;
        multiply_panels(product, 0, whole_panels, Nothing());
        if (whole_panels == count) continue;
        product.first_column = whole_panels * kPanel;
        product.c = last_columns;
        product.c_row = kPanel;
        multiply_panels(product, whole_panels, count, Nothing());
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
