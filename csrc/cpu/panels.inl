// Products C[m][n] (+)= A[m][k] * B[k][n] with n along the vector lanes: a tile of C lies in registers while k runs (Goto
// and van de Geijn 2008, with the layers of packing that a weight matrix needs no more than once). What is the same
// whether factors have 32, 16 or 8 bits: B lies in panels as wide as a tile, each of them dense, and a step of a tile reads
// kStepBytes of every column, which is one, two or four rows of B.

namespace bert_fast::cpu::BERT_FAST_ISA {

// The tile of C: the largest that leaves registers for a row of B and one element of A.
constexpr int kTileRows = BERT_FAST_REGISTERS >= 32 ? 8 : 6;
constexpr int kTileVectors = BERT_FAST_REGISTERS >= 32 ? 3 : 2;
constexpr int64_t kPanel = kTileVectors * kLanes;
constexpr int64_t kStepBytes = 4;

// What the strips of a panel fetch while they compute: the panel after it, kLinesAhead lines for each of their steps, so
// that it comes evenly and is in the second-level cache when its turn comes.
constexpr int64_t kLine = 64;
constexpr int64_t kLinesAhead = 2;

BERT_FAST_INLINE void fetch_lines(const char* lines) {
    for (int64_t i = 0; i < kLinesAhead; ++i) __builtin_prefetch(lines + i * kLine, 0, 2);
}

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

// What becomes of a tile's sums.
struct StripTarget {
    const float* bias;  // of the panel's columns, or null
    float* c;
    int64_t c_row;
    bool accumulates;    // C += A * B
    const char* ahead;  // what to fetch meanwhile, or null
};

// sum_with(i, j, bias) is the tile's sum in row i and vector j, with the bias.
template <int kRows, int kVectors, typename Sum>
BERT_FAST_INLINE void finish_strip(const StripTarget& target, const Sum& sum_with) {
    Vec bias[kVectors] = {};
    if (target.bias != nullptr)
        for (int j = 0; j < kVectors; ++j) load(target.bias + j * kLanes, bias[j]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
        float* row = target.c + i * target.c_row;
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            Vec value = sum_with(i, j, bias[j]);
            if (target.accumulates) {
                Vec before;
                load(row + j * kLanes, before);
                value += before;
            }
            store(value, row + j * kLanes);
        }
    }
}

template <int kRows, int kVectors>
BERT_FAST_INLINE void finish_strip(const StripTarget& target, const Vec (&sum)[kRows][kVectors]) {
    finish_strip<kRows, kVectors>(
        target, [&sum](int i, int j, const Vec& bias) BERT_FAST_LAMBDA { return sum[i][j] + bias; });
}

// sum[i][j] += A * B for a tile whose steps are 32-bit words of several narrow factors each: add(left, right, sum) is the
// instruction that multiplies them. A's rows begin a_row_bytes apart.
template <int kRows, int kVectors, typename Sum, typename Add>
BERT_FAST_INLINE void accumulate_words(const void* a, int64_t a_row_bytes, const void* b, int64_t steps, const char* ahead,
                                       Sum (&sum)[kRows][kVectors], const Add& add) {
    const char* from = static_cast<const char*>(b);
    // Where nothing is to be fetched, lines that are here already: a condition would cost more than they do.
    const char* fetched = ahead == nullptr ? from : ahead;
    for (int64_t p = 0; p < steps; ++p, from += kVectors * kLanes * kStepBytes) {
        fetch_lines(fetched + p * kLinesAhead * kLine);
        IntVec right[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) std::memcpy(&right[j], from + j * kLanes * kStepBytes, sizeof(IntVec));
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            int32_t word;
            std::memcpy(&word, static_cast<const char*>(a) + i * a_row_bytes + p * kStepBytes, sizeof(word));
            const IntVec left = IntVec{} + word;
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) add(left, right[j], sum[i][j]);
        }
    }
}

// Kind has a type Strip, what a kernel multiplies, and the kernels `multiply<kRows, kVectors>(Strip, StripTarget)`.
template <typename Kind>
using StripKernel = void (*)(const typename Kind::Strip&, const StripTarget&);

template <typename Kind>
using StripKernels = std::array<std::array<StripKernel<Kind>, kTileRows>, kTileVectors>;

template <typename Kind, int kVectors, int... kRows>
constexpr std::array<StripKernel<Kind>, kTileRows> kernels_by_rows(std::integer_sequence<int, kRows...>) {
    return {Kind::template multiply<kRows + 1, kVectors>...};
}

template <typename Kind, int... kVectors>
constexpr StripKernels<Kind> kernels_by_vectors(std::integer_sequence<int, kVectors...>) {
    return {kernels_by_rows<Kind, kVectors + 1>(std::make_integer_sequence<int, kTileRows>())...};
}

// By vectors and by rows, less one each.
template <typename Kind>
constexpr StripKernels<Kind> kStripKernels =
    kernels_by_vectors<Kind>(std::make_integer_sequence<int, kTileVectors>());

// A part of C (rows x columns) = A B + bias: the columns of some panels. C's rows have room for whole vectors.
struct Result {
    int64_t rows;
    int64_t columns;
    const float* bias;
    float* c;  // at first_column
    int64_t c_row;
    int64_t first_column;
    bool accumulates;
};

// Factors are A and B, `panels` and `panel_steps` (of all of B) among them. They say how their depth is cut: part i has the
// steps from first_step(i) to first_step(i + 1), and its strips are summed up by themselves.
template <typename Factors, typename Finish>
void multiply_panels(const Factors& factors, const Result& result, int64_t first_panel, int64_t last_panel,
                     const Finish& finish) {
    const auto& kernels = factors.kernels();
    const Strips strips(result.rows);
    const int64_t parts = factors.num_parts();
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t column = panel * kPanel;
        const int vectors = panel_vectors(result.columns, panel);
        const int64_t width = vectors * kLanes;
        const char* panel_start = reinterpret_cast<const char*>(factors.panels) + column * factors.panel_steps * kStepBytes;
        alignas(64) float bias[kPanel] = {};
        if (result.bias != nullptr)
            std::memcpy(bias, result.bias + column, std::min(width, result.columns - column) * sizeof(float));
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t steps = factors.first_step(part + 1) - factors.first_step(part);
            const char* b = panel_start + factors.first_step(part) * width * kStepBytes;
            const char* ahead = b + factors.panel_steps * width * kStepBytes;
            const int64_t part_bytes = steps * width * kStepBytes;
            const int64_t strip_bytes = steps * kLinesAhead * kLine;
            const bool is_last = part + 1 == parts;
            for (int64_t strip = 0; strip < strips.count; ++strip) {
                const int64_t row = strips.begin(strip);
                const int64_t rows = strips.begin(strip + 1) - row;
                float* c = result.c + row * result.c_row + column - result.first_column;
                const bool fetches = panel + 1 < last_panel && strip * strip_bytes < part_bytes;
                kernels[vectors - 1][rows - 1](
                    factors.strip(row, column, part, b, steps),
                    {is_last && result.bias != nullptr ? bias : nullptr, c, result.c_row,
                     result.accumulates || part > 0, fetches ? ahead + strip * strip_bytes : nullptr});
                if (is_last) finish(c, result.c_row, rows, width);
            }
        }
    }
}

struct Nothing {
    BERT_FAST_INLINE void operator()(float*, int64_t, int64_t, int64_t) const {}
};

}  // namespace bert_fast::cpu::BERT_FAST_ISA
