// The ops of pointwise.h: bound by memory, so each reads and writes every tensor once.
#include "pointwise.h"

#include "simd.h"

namespace swirl::SWIRL_ISA {
namespace {

using V = Vec<float>;
constexpr int W = WIDTH<float>;
constexpr int64_t ROW_BLOCK = 64;  // rows of a task, and of a partial sum of dweight

SWIRL_INLINE float sum_of(V x) {
    float sum = 0;
    for (int lane = 0; lane < W; lane++) sum += x[lane];
    return sum;
}

// Sum over (blocks, d) of W columns from i on, in the order of the blocks.
SWIRL_INLINE V sum_of_blocks(const float* partial, int64_t blocks, int64_t d, int64_t i) {
    V sum = {};
    for (int64_t block = 0; block < blocks; block++) sum += load(partial + block * d + i);
    return sum;
}

// gelu(x) = x (1 + tanh u) / 2 with u = c (x + a x^3), and its slope.
constexpr float GELU_C = 0.7978845608028654f, GELU_A = 0.044715f;
SWIRL_INLINE V gelu(V x, V* slope = nullptr) {
    V square = x * x, of_tanh;
    V half = tanh_of_half<float>((x + x * square * GELU_A) * (2 * GELU_C), &of_tanh) * 0.5f + 0.5f;
    if (slope) *slope = half + x * of_tanh * (square * (3 * GELU_A) + 1.0f) * (0.5f * GELU_C);
    return x * half;
}

}  // namespace

void rms_norm_fwd(const RmsNorm& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t m = 0; m < p.M; m++) {
        const float* x = p.x + m * p.d;
        V squares = {};
        for (int64_t i = 0; i < p.d; i += W) squares += load(x + i) * load(x + i);
        float rstd = 1 / sqrtf(sum_of(squares) / p.d + p.eps);
        p.rstd[m] = rstd;
        for (int64_t i = 0; i < p.d; i += W) store(p.y + m * p.d + i, load(x + i) * rstd * (load(p.weight + i) + 1.0f));
    }
}

bool rms_norm_bwd(const RmsNorm& p) {
    int64_t blocks = (p.M + ROW_BLOCK - 1) / ROW_BLOCK;
    float* partial = (float*)calloc(blocks * p.d + 1, sizeof(float));
    if (!partial) return false;
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float* dweight = partial + block * p.d;
            int64_t end = (block + 1) * ROW_BLOCK < p.M ? (block + 1) * ROW_BLOCK : p.M;
            for (int64_t m = block * ROW_BLOCK; m < end; m++) {
                const float *x = p.x + m * p.d, *dy = p.dy + m * p.d;
                float rstd = p.rstd[m];
                V along = {};
                for (int64_t i = 0; i < p.d; i += W) along += load(dy + i) * (load(p.weight + i) + 1.0f) * load(x + i);
                float mean = sum_of(along) * rstd * rstd / p.d;
                for (int64_t i = 0; i < p.d; i += W) {
                    V at = load(x + i), d_at = load(dy + i);
                    store(dweight + i, load(dweight + i) + d_at * (at * rstd));
                    store(p.dx + m * p.d + i, (d_at * (load(p.weight + i) + 1.0f) - at * mean) * rstd);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.d; i += W) store(p.dweight + i, sum_of_blocks(partial, blocks, p.d, i));
    }
    free(partial);
    return true;
}

void geglu_fwd(const Geglu& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t i = 0; i < p.n; i += W) store(p.y + i, gelu(load(p.gate + i)) * load(p.up + i));
}

void geglu_bwd(const Geglu& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t i = 0; i < p.n; i += W) {
        V slope, value = gelu(load(p.gate + i), &slope), dy = load(p.dy + i);
        store(p.dup + i, dy * value);
        store(p.dgate + i, dy * load(p.up + i) * slope);
    }
}

void rope(const Rope& p) {
    int64_t half = p.D / 2;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; t++)
        for (int64_t h = 0; h < p.H; h++) {
            const float* x = p.x + (t * p.H + h) * p.D;
            float* y = p.y + (t * p.H + h) * p.D;
            for (int64_t i = 0; i < half; i += W) {
                V a = load(x + i), b = load(x + half + i);
                V cos = load(p.cos + t * half + i), sin = load(p.sin + t * half + i) * p.sign;
                store(y + i, a * cos - b * sin);
                store(y + half + i, b * cos + a * sin);
            }
        }
}

void norm_rope_fwd(const NormRope& p) {
    int64_t half = p.D / 2;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.T; t++)
        for (int64_t h = 0; h < p.H; h++) {
            int64_t row = t * p.H + h;
            const float* x = p.x + row * p.D;
            float* y = p.y + row * p.D;
            V squares = {};
            for (int64_t i = 0; i < p.D; i += W) squares += load(x + i) * load(x + i);
            float rstd = 1 / sqrtf(sum_of(squares) / p.D + p.eps);
            p.rstd[row] = rstd;
            for (int64_t i = 0; i < half; i += W) {
                V a = load(x + i) * rstd * (load(p.weight + i) + 1.0f);
                V b = load(x + half + i) * rstd * (load(p.weight + half + i) + 1.0f);
                V cos = load(p.cos + t * half + i), sin = load(p.sin + t * half + i);
                store(y + i, a * cos - b * sin);
                store(y + half + i, b * cos + a * sin);
            }
        }
}

bool norm_rope_bwd(const NormRope& p) {
    int64_t half = p.D / 2, blocks = (p.T + ROW_BLOCK - 1) / ROW_BLOCK;
    float* partial = (float*)calloc(blocks * p.D + 1, sizeof(float));
    if (!partial) return false;
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            float* dweight = partial + block * p.D;
            int64_t first = block * ROW_BLOCK * p.H, last = (block + 1) * ROW_BLOCK < p.T ? (block + 1) * ROW_BLOCK : p.T;
            for (int64_t row = first; row < last * p.H; row++) {
                const float *x = p.x + row * p.D, *dy = p.dy + row * p.D;
                float *dx = p.dx + row * p.D, rstd = p.rstd[row];
                V along = {};
                for (int64_t i = 0; i < half; i += W) {  // turned back, and kept where dX will be
                    V cos = load(p.cos + row / p.H * half + i), sin = load(p.sin + row / p.H * half + i);
                    V da = load(dy + i), db = load(dy + half + i);
                    V d_a = da * cos + db * sin, d_b = db * cos - da * sin;
                    store(dx + i, d_a);
                    store(dx + half + i, d_b);
                    along += d_a * (load(p.weight + i) + 1.0f) * load(x + i);
                    along += d_b * (load(p.weight + half + i) + 1.0f) * load(x + half + i);
                }
                float mean = sum_of(along) * rstd * rstd / p.D;
                for (int64_t i = 0; i < p.D; i += W) {
                    V at = load(x + i), d_at = load(dx + i);
                    store(dweight + i, load(dweight + i) + d_at * (at * rstd));
                    store(dx + i, (d_at * (load(p.weight + i) + 1.0f) - at * mean) * rstd);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.D; i += W) store(p.dweight + i, sum_of_blocks(partial, blocks, p.D, i));
    }
    free(partial);
    return true;
}

}  // namespace swirl::SWIRL_ISA
