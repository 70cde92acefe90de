// bias + GELU, erf and tanh.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr float kInvSqrt2Pi = 0.39894228f;
constexpr float kSqrt2OverPi = 0.79788456f;
constexpr float kCubic = 0.044715f;

// By the normal distribution's tail T(a) = 0.5 * erfc(a / sqrt(2)) = exp(-a^2 / 2) * S(a), a >= 0, where S is smooth and
// close to a rational function (fitted to 2.5e-8): GELU(x) = max(x, 0) - |x| T(|x|) then has no digits to lose.
struct ErfGelu {
    float x;
    float magnitude;  // of x, within the fit; NaN stays NaN
    float density;    // exp(-x^2 / 2)
    float tail;

    BERT_FAST_INLINE explicit ErfGelu(float value) : x(value) {
        float clamped = x > 14.0f ? 14.0f : x;
        clamped = clamped < -14.0f ? -14.0f : clamped;
        const float a = std::fabs(clamped);
        float p = 0.0130779066f;
        p = p * a + 0.102071617f;
        p = p * a + 0.330394625f;
        p = p * a + 0.499999988f;
        float q = 0.0328015201f;
        q = q * a + 0.25527821f;
        q = q * a + 0.868013499f;
        q = q * a + 1.45867213f;
        q = q * a + 1.0f;
        magnitude = a;
        density = exp_f32(-0.5f * a * a);
        tail = density * p / q;
    }

    static BERT_FAST_INLINE float value(float x) {
        const ErfGelu gelu(x);
        // Infinities become NaN, as in torch: where they come from, something is wrong that should be seen.
        return (x < 0.0f ? 0.0f : x) - gelu.magnitude * gelu.tail + x * 0.0f;
    }
    static BERT_FAST_INLINE float slope(float x) {
        const ErfGelu gelu(x);
        return (x < 0.0f ? gelu.tail : 1.0f - gelu.tail) + std::copysign(gelu.magnitude, x) * kInvSqrt2Pi * gelu.density;
    }
};

// 0.5 * (1 + tanh(u)) is the logistic function of 2u, which loses no digits where tanh(u) is near -1.
struct TanhGelu {
    static BERT_FAST_INLINE float decay(float x) {
        return exp_f32(-2.0f * kSqrt2OverPi * (x + kCubic * x * x * x));
    }
    static BERT_FAST_INLINE float value(float x) { return x / (1.0f + decay(x)); }
    static BERT_FAST_INLINE float slope(float x) {
        const float e = decay(x);
        const float gate = 1.0f / (1.0f + e);
        const float rest = e * gate;  // 1 - gate, with all its digits
        return gate + x * gate * rest * 2.0f * kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    }
};

template <typename Kind>
void gelu_row(int64_t width, const float* x, const float* bias, float* y) {
    if (bias == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = Kind::value(x[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = Kind::value(x[i] + bias[i]);
    }
}

template <typename Kind>
void gelu_grad_row(int64_t width, const float* grad_y, const float* x, const float* bias, float* grad_x) {
    if (bias == nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) grad_x[i] = grad_y[i] * Kind::slope(x[i]);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) grad_x[i] = grad_y[i] * Kind::slope(x[i] + bias[i]);
    }
}

void gelu(int64_t rows, int64_t width, const float* x, const float* bias, Gelu kind, float* y, int threads) {
    threads = useful_threads(threads, rows * width);
    const auto row_kernel = kind == Gelu::erf ? gelu_row<ErfGelu> : gelu_row<TanhGelu>;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) row_kernel(width, x + row * width, bias, y + row * width);
}

void gelu_backward(int64_t rows, int64_t width, const float* grad_y, const float* x, const float* bias, Gelu kind,
                        float* grad_x, float* grad_bias, int threads) {
    threads = useful_threads(threads, rows * width);
    const auto row_kernel = kind == Gelu::erf ? gelu_grad_row<ErfGelu> : gelu_grad_row<TanhGelu>;
    const Chunks chunks(rows);
    ColumnSums sums(grad_bias == nullptr ? 0 : chunks.count, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        std::vector<float> block(width, 0.0f);
        for (int64_t row = chunks.begin(chunk), stop = chunks.begin(chunk + 1); row < stop; ++row) {
            float* grad_row = grad_x + row * width;
            row_kernel(width, grad_y + row * width, x + row * width, bias, grad_row);
            if (grad_bias == nullptr) continue;
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) block[i] += grad_row[i];
            if ((row + 1 - chunks.begin(chunk)) % kRowsPerBlock == 0 || row + 1 == stop) {
                sums.add(chunk, block.data());
                std::fill(block.begin(), block.end(), 0.0f);
            }
        }
    }
    if (grad_bias != nullptr) sums.finish(grad_bias);
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
