// bias + GELU, erf and tanh.

namespace bert_fast::cpu::BERT_FAST_ISA {

constexpr float kInvSqrt2Pi = 0.39894228f;
constexpr float kSqrt2OverPi = 0.79788456f;
constexpr float kCubic = 0.044715f;

// By the normal distribution's tail T(a) = 0.5 * erfc(a / sqrt(2)) = exp(-a^2 / 2) * S(a), a >= 0, where S is smooth and
// close to a rational function (fitted to 2.5e-8): GELU(x) = max(x, 0) - |x| T(|x|) then has no digits to lose.
struct ErfGelu {
    Vec x;
    Vec magnitude;  // of x, within the fit; NaN stays NaN
    Vec density;    // exp(-x^2 / 2)
    Vec tail;

    BERT_FAST_INLINE explicit ErfGelu(const Vec& value) : x(value) {
        const Vec a = smaller(broadcast(13.0f), magnitude_of(x));
        Vec p = broadcast(0.0130779066f);
        p = p * a + 0.102071617f;
        p = p * a + 0.330394625f;
        p = p * a + 0.499999988f;
        Vec q = broadcast(0.0328015201f);
        q = q * a + 0.25527821f;
        q = q * a + 0.868013499f;
        q = q * a + 1.45867213f;
        q = q * a + 1.0f;
        magnitude = a;
        density = exp2_nonpositive(a * a * -0.721347520f);  // -0.5 * log2(e)
        tail = density * p * reciprocal(q);
    }

    static BERT_FAST_INLINE Vec value(const Vec& x) {
        const ErfGelu gelu(x);
        // Infinities become NaN, as in torch: where they come from, something is wrong that should be seen.
        return larger(Vec{}, x) - gelu.magnitude * gelu.tail + x * 0.0f;
    }
    static BERT_FAST_INLINE Vec slope(const Vec& x) {
        const ErfGelu gelu(x);
        const Vec upright = gelu.magnitude * kInvSqrt2Pi * gelu.density;
        return x < 0.0f ? gelu.tail - upright : 1.0f - gelu.tail + upright;
    }

  private:
    // Of what is at least 1: two units in the last place, in a third of the time that a division takes.
    static BERT_FAST_INLINE Vec reciprocal(const Vec& q) {
#if defined(__x86_64__) && BERT_FAST_LANES == 16
        const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)q);
        return estimate + estimate * (1.0f - q * estimate);
#else
        return 1.0f / q;
#endif
    }
};

// 0.5 * (1 + tanh(u)) is the logistic function of 2u, which loses no digits where tanh(u) is near -1.
struct TanhGelu {
    static BERT_FAST_INLINE Vec decay(const Vec& x) {
        return exp_of(-2.0f * kSqrt2OverPi * (x + kCubic * x * x * x));
    }
    static BERT_FAST_INLINE Vec value(const Vec& x) { return x / (1.0f + decay(x)); }
    static BERT_FAST_INLINE Vec slope(const Vec& x) {
        const Vec e = decay(x);
        const Vec gate = 1.0f / (1.0f + e);
        const Vec rest = e * gate;  // 1 - gate, with all its digits
        return gate + x * gate * rest * 2.0f * kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
    }
};

template <typename Kind>
void gelu_row(int64_t width, const float* x, const float* bias, float* y) {
    by_vectors(width, [&](int64_t i, const auto& get, const auto& put) BERT_FAST_LAMBDA {
        Vec value;
        Vec shift{};
        get(x + i, value);
        if (bias != nullptr) get(bias + i, shift);
        put(Kind::value(value + shift), y + i);
    });
}

template <typename Kind>
void gelu_grad_row(int64_t width, const float* grad_y, const float* x, const float* bias, float* grad_x) {
    by_vectors(width, [&](int64_t i, const auto& get, const auto& put) BERT_FAST_LAMBDA {
        Vec value;
        Vec grad;
        Vec shift{};
        get(x + i, value);
        get(grad_y + i, grad);
        if (bias != nullptr) get(bias + i, shift);
        put(grad * Kind::slope(value + shift), grad_x + i);
    });
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
