// Sixteen sequences side by side: a value of each in a lane, so that nothing is summed across lanes, and a sequence's
// result is the same whoever shares the vectors with it. Matrices lie turned, [row][LANES].
#pragma once
#include "pack.h"
#include "tree_decode.h"

namespace swirl::SWIRL_ISA {

template <class T> constexpr int VECTORS = LANES / WIDTH<T>;                         // of a row
template <class T> constexpr int TOGETHER = VECTORS<T> < 12 ? 12 / VECTORS<T> : 1;   // rows of a tile: 12 accumulators,
template <class T> constexpr int FEWER = TOGETHER<T> > 1 ? TOGETHER<T> * 2 / 3 : 1;  // and where these leave some over
constexpr int CACHE_LINE_BYTES = 64;

template <int COUNT, class T>
SWIRL_INLINE void lane_tile(int64_t steps, const T* a, ptrdiff_t a_row, const T* b, T* c, bool add) {
    constexpr int W = WIDTH<T>, AT_A_TIME = CACHE_LINE_BYTES / sizeof(T);
    Vec<T> sum[COUNT][VECTORS<T>] = {};
    if (add)
        for (int i = 0; i < COUNT * VECTORS<T>; i++) sum[i / VECTORS<T>][i % VECTORS<T>] = load(c + i * W);
    for (int64_t first = 0; first < steps; first += AT_A_TIME) {
        int64_t some = steps - first < AT_A_TIME ? steps - first : AT_A_TIME;
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) __builtin_prefetch(a + (COUNT + i) * a_row, 0, 2);  // of the next tile, to L2
        for (int64_t step = 0; step < some; step++, a++, b += LANES)
#pragma GCC unroll 16
            for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS<T>; v++) sum[i][v] = multiply_add(a[i * a_row], b + v * W, sum[i][v]);
    }
    for (int i = 0; i < COUNT; i++)
        for (int v = 0; v < VECTORS<T>; v++, c += W) store(c, sum[i][v]);
}
// C (rows, LANES) = or += A (rows, steps) B (steps, LANES); a row of A lies a_row after the one before. A sum runs step by
// step, so that steps which add zero, and cuts between calls, change nothing.
template <class T>
SWIRL_INLINE void lane_product(int64_t rows, int64_t steps, const T* a, ptrdiff_t a_row, const T* b, T* c, bool add) {
    int64_t row = 0;
    for (int64_t left = rows; left >= TOGETHER<T> && (left % TOGETHER<T> == 0 || left > 2 * FEWER<T>); left = rows - row) {
        lane_tile<TOGETHER<T>>(steps, a + row * a_row, a_row, b, c + row * LANES, add);
        row += TOGETHER<T>;
    }
    for (; row + FEWER<T> <= rows; row += FEWER<T>)
        lane_tile<FEWER<T>>(steps, a + row * a_row, a_row, b, c + row * LANES, add);
    for (; row < rows; row++) lane_tile<1>(steps, a + row * a_row, a_row, b, c + row * LANES, add);
}

// Below, R is the type that results are rounded to, and T, which holds them, what is computed in.
template <class R, class T> SWIRL_INLINE Vec<T> rounded(Vec<T> x) {
    if constexpr (sizeof(R) == sizeof(T)) return x;
    Int<T> bits = (Int<T>)x;  // to the nearest bfloat16, ties to even
    Vec<T> y = (Vec<T>)((bits + 0x7fff + ((bits >> 16) & 1)) & ~Whole<T>(0xffff));
    return x == x ? y : x;
}
template <class R, class T> SWIRL_INLINE void lane_round(int64_t n, T* x) {
    if constexpr (sizeof(R) != sizeof(T))
        for (int64_t i = 0; i < n * LANES; i += WIDTH<T>) store(x + i, rounded<R, T>(load(x + i)));
}
// y = x / rms(x) (1 + weight), or y += that; x and y (d, LANES).
template <class R, class I, class T>
SWIRL_INLINE void lane_norm(int64_t d, const T* x, const I* weight, T eps, T* y, bool add) {
    for (int lane = 0; lane < LANES; lane += WIDTH<T>) {
        Vec<T> squares = {};
        for (int64_t i = 0; i < d; i++) {
            Vec<T> value = load(x + i * LANES + lane);
            squares += value * value;
        }
        Vec<T> rstd;
        for (int i = 0; i < WIDTH<T>; i++) rstd[i] = T(1) / (T)sqrt((double)(squares[i] / T(d) + eps));
        for (int64_t i = 0; i < d; i++) {
            Vec<T> normed = rounded<R, T>(load(x + i * LANES + lane) * rstd * (T(1) + widen(weight[i])));
            T* to = y + i * LANES + lane;
            store(to, add ? rounded<R, T>(load(to) + normed) : normed);
        }
    }
}
// Halves rotated: (a, b) -> (a cos - b sin, b cos + a sin); x (D, LANES), cos and sin (D / 2, LANES).
template <class R, class T> SWIRL_INLINE void lane_rope(int64_t D, T* x, const T* cos, const T* sin) {
    for (int64_t i = 0, half = D / 2 * LANES; i < half; i += WIDTH<T>) {
        Vec<T> a = load(x + i), b = load(x + half + i), c = load(cos + i), s = load(sin + i);
        store(x + i, rounded<R, T>(a * c - b * s));
        store(x + half + i, rounded<R, T>(b * c + a * s));
    }
}
// gate = gelu_tanh(gate) up, n rows.
template <class R, class T> SWIRL_INLINE void lane_geglu(int64_t n, T* gate, const T* up) {
    for (int64_t i = 0; i < n * LANES; i += WIDTH<T>) {
        Vec<T> x = load(gate + i);
        Vec<T> inner = x * (x * x * T(0.044715) + T(1)) * T(2 * 0.7978845608028654);
        store(gate + i, rounded<R, T>(x * T(0.5) * (tanh_of_half<T>(inner) + T(1)) * load(up + i)));
    }
}

}  // namespace swirl::SWIRL_ISA
