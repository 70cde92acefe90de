// dropout + residual + LayerNorm. The variance is taken around the mean in a second pass: a one-pass variance loses its
// digits on data that is far from zero.

namespace bert_fast::cpu::BERT_FAST_ISA {

// The sum of term(i) over whole vectors, and of term_at(i) over what is left. Its order depends on the width alone: what
// the compiler makes of a plain loop depends on where the row lies in memory.
constexpr int kPartialSums = 4;

template <typename Term, typename TermAt>
BERT_FAST_INLINE float sum_of_row(int64_t width, const Term& term, const TermAt& term_at) {
    Vec sums[kPartialSums] = {};
    int64_t i = 0;
    for (; i + kPartialSums * kLanes <= width; i += kPartialSums * kLanes)
        for (int j = 0; j < kPartialSums; ++j) sums[j] += term(i + j * kLanes);
    for (; i + kLanes <= width; i += kLanes) sums[0] += term(i);
    const Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    float rest = 0.0f;
    for (; i < width; ++i) rest += term_at(i);
    return sum_of_lanes(all) + rest;
}

// In place.
inline void normalise_row(int64_t width, const float* weight, const float* bias, float eps, float* y, float& mean,
                          float& rstd) {
    const auto vector_at = [y](int64_t i) {
        Vec result;
        load(y + i, result);
        return result;
    };
    mean = sum_of_row(width, vector_at, [y](int64_t i) { return y[i]; }) / static_cast<float>(width);
    const float centre = mean;
    const float squares = sum_of_row(
        width,
        [&](int64_t i) {
            const Vec distance = vector_at(i) - centre;
            return distance * distance;
        },
        [&](int64_t i) { return (y[i] - centre) * (y[i] - centre); });
    rstd = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    const float factor = rstd;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) y[i] = (y[i] - centre) * factor * weight[i] + bias[i];
}

inline void layer_norm_row(int64_t width, const float* x, const float* residual, const float* weight, const float* bias,
                           float eps, float* y, float& mean, float& rstd) {
    if (residual == nullptr) {
        std::memcpy(y, x, width * sizeof(float));
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) y[i] = x[i] + residual[i];
    }
    normalise_row(width, weight, bias, eps, y, mean, rstd);
}

void embedding(const EmbeddingTables& tables, int64_t width, int64_t tokens, const int64_t* ids,
               const int64_t* positions, const int64_t* token_types, const Norm& norm, float* y, int threads) {
    threads = useful_threads(threads, tokens * width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t token = 0; token < tokens; ++token) {
        const float* word = tables.word + ids[token] * width;
        const float* position = tables.position + positions[token] * width;
        float* row = y + token * width;
        if (tables.token_type == nullptr) {
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) row[i] = position[i] + word[i];
        } else {
            const float* type = tables.token_type + (token_types == nullptr ? 0 : token_types[token] * width);
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) row[i] = position[i] + (word[i] + type[i]);
        }
        float mean;
        float rstd;
        normalise_row(width, norm.weight, norm.bias, norm.eps, row, mean, rstd);
    }
}

void layer_norm(int64_t rows, int64_t width, const float* x, const float* residual, const Dropout& dropout,
                const Norm& norm, float* y, float* mean, float* rstd, int threads) {
    threads = useful_threads(threads, rows * width);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<float> dropped(dropout.is_on() ? round_up(width, kDrawnFeatures) : 0);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* values = x + row * width;
            if (dropout.is_on()) {
                feature_factors(dropout, row, width, dropped.data());
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) dropped[i] *= values[i];
                values = dropped.data();
            }
            float row_mean;
            float row_rstd;
            layer_norm_row(width, values, residual == nullptr ? nullptr : residual + row * width, norm.weight, norm.bias,
                           norm.eps, y + row * width, row_mean, row_rstd);
            if (mean != nullptr) mean[row] = row_mean;
            if (rstd != nullptr) rstd[row] = row_rstd;
        }
    }
}

// Some rows of the backward pass, and what it reads and writes for them.
struct LayerNormRows {
    int64_t width;
    const float* grad_y;
    const float* x;
    const float* residual;  // or null
    const float* weight;
    const float* mean;
    const float* rstd;
    float* grad_sum;  // of what is normalised

    LayerNormRows from_row(int64_t row) const {
        const int64_t offset = row * width;
        return {width,       grad_y + offset, x + offset, residual == nullptr ? nullptr : residual + offset, weight,
                mean + row, rstd + row,      grad_sum + offset};
    }
};

constexpr int kGradRows = 4;  // that share a load and a store of the columns' sums

// What a thread needs for them.
struct LayerNormScratch {
    std::vector<float> normalised;  // kGradRows rows
    std::vector<float> factors;     // of dropout: kGradRows rows, `stride` apart, or none
    int64_t stride;

    LayerNormScratch(int64_t width, bool has_dropout)
        : normalised(kGradRows * width), stride(round_up(width, kDrawnFeatures)) {
        if (has_dropout) factors.resize(kGradRows * stride);
    }
};

// dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) with g = weight * dy; also adds dy * x_hat and dy to the sums.
template <int kRows, bool kHasDropout>
void layer_norm_grad_rows(const LayerNormRows& rows, LayerNormScratch& scratch, float* weight_sum, float* bias_sum) {
    float* normalised = scratch.normalised.data();
    const int64_t width = rows.width;
    Vec sum_g[kRows] = {};
    Vec sum_g_normalised[kRows] = {};
    const auto add_columns = [&](int64_t i, const auto& get, const auto& put) BERT_FAST_LAMBDA {
        Vec weight;
        Vec weight_part{};
        Vec bias_part{};
        get(rows.weight + i, weight);
        for (int row = 0; row < kRows; ++row) {
            const int64_t at = row * width + i;
            Vec value;
            Vec grad;
            get(rows.x + at, value);
            get(rows.grad_y + at, grad);
            if (kHasDropout) {
                Vec factor;
                load(scratch.factors.data() + row * scratch.stride + i, factor);
                value *= factor;
            }
            if (rows.residual != nullptr) {
                Vec residual;
                get(rows.residual + at, residual);
                value += residual;
            }
            value = (value - rows.mean[row]) * rows.rstd[row];
            put(value, normalised + at);
            const Vec g = grad * weight;
            sum_g[row] += g;
            sum_g_normalised[row] += g * value;
            weight_part += grad * value;
            bias_part += grad;
        }
        Vec before;
        get(weight_sum + i, before);
        put(before + weight_part, weight_sum + i);
        get(bias_sum + i, before);
        put(before + bias_part, bias_sum + i);
    };
    by_vectors(width, add_columns);
    for (int row = 0; row < kRows; ++row) {
        const float mean_g = sum_of_lanes(sum_g[row]) / static_cast<float>(width);
        const float mean_g_normalised = sum_of_lanes(sum_g_normalised[row]) / static_cast<float>(width);
        const float rstd = rows.rstd[row];
        by_vectors(width, [&](int64_t i, const auto& get, const auto& put) BERT_FAST_LAMBDA {
            const int64_t at = row * width + i;
            Vec weight;
            Vec grad;
            Vec value;
            get(rows.weight + i, weight);
            get(rows.grad_y + at, grad);
            get(normalised + at, value);
            put(rstd * (grad * weight - mean_g - value * mean_g_normalised), rows.grad_sum + at);
        });
    }
}

// Rows `row` to `row + kRows`, and what dropout leaves of their gradient; grad_x null: there is no dropout.
template <int kRows>
void layer_norm_grad_rows(const LayerNormRows& all, int64_t row, const Dropout& dropout, LayerNormScratch& scratch,
                          float* grad_x, float* weight_sum, float* bias_sum) {
    const LayerNormRows rows = all.from_row(row);
    if (grad_x == nullptr) {
        layer_norm_grad_rows<kRows, false>(rows, scratch, weight_sum, bias_sum);
        return;
    }
    const auto factors = [&](int i) { return scratch.factors.data() + i * scratch.stride; };
    for (int i = 0; i < kRows; ++i) feature_factors(dropout, row + i, all.width, factors(i));
    layer_norm_grad_rows<kRows, true>(rows, scratch, weight_sum, bias_sum);
    for (int i = 0; i < kRows; ++i) {
        const float* factor = factors(i);
        const float* grad_sum = rows.grad_sum + i * all.width;
        float* grad = grad_x + (row + i) * all.width;
#pragma omp simd
        for (int64_t j = 0; j < all.width; ++j) grad[j] = grad_sum[j] * factor[j];
    }
}

void layer_norm_backward(int64_t rows, int64_t width, const float* grad_y, const float* x, const float* residual,
                         const Dropout& dropout, const float* weight, const float* mean, const float* rstd,
                         const LayerNormGradients& grads, int threads) {
    threads = useful_threads(threads, rows * width);
    const bool has_dropout = grads.sum != nullptr;
    const LayerNormRows all{width, grad_y, x, residual, weight, mean, rstd, has_dropout ? grads.sum : grads.x};
    float* grad_dropped = has_dropout ? grads.x : nullptr;
    const Chunks chunks(rows);
    ColumnSums weight_sums(chunks.count, width);
    ColumnSums bias_sums(chunks.count, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        LayerNormScratch scratch(width, has_dropout);
        std::vector<float> weight_block(width);
        std::vector<float> bias_block(width);
        const int64_t stop = chunks.begin(chunk + 1);
        for (int64_t first = chunks.begin(chunk); first < stop; first += kRowsPerBlock) {
            const int64_t last = std::min(first + kRowsPerBlock, stop);
            std::fill(weight_block.begin(), weight_block.end(), 0.0f);
            std::fill(bias_block.begin(), bias_block.end(), 0.0f);
            int64_t row = first;
            for (; row + kGradRows <= last; row += kGradRows)
                layer_norm_grad_rows<kGradRows>(all, row, dropout, scratch, grad_dropped, weight_block.data(), bias_block.data());
            for (; row < last; ++row)
                layer_norm_grad_rows<1>(all, row, dropout, scratch, grad_dropped, weight_block.data(), bias_block.data());
            weight_sums.add(chunk, weight_block.data());
            bias_sums.add(chunk, bias_block.data());
        }
    }
    weight_sums.finish(grads.weight);
    bias_sums.finish(grads.bias);
}

}  // namespace bert_fast::cpu::BERT_FAST_ISA
