// Vectors, exp and tanh, and the register-tiled product, for the instruction set SWIRL_ISA this file is built for.
// GCC/Clang vector extensions, so that one source serves every set. No standard templates here: the linker could
// keep the copy built for a newer CPU than the one it runs on.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define SWIRL_INLINE inline __attribute__((always_inline))

namespace swirl::SWIRL_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS = 8;  // ROWS x 2 accumulators of the product stay in registers
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, ROWS = 4;
#else
constexpr int VECTOR_BYTES = 16, ROWS = 4;
#endif

template <class T> struct Lanes;
template <> struct Lanes<float> {
    typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Whole;
    typedef int32_t Index __attribute__((vector_size(VECTOR_BYTES)));
};
template <> struct Lanes<double> {
    typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Whole;
    typedef int32_t Index __attribute__((vector_size(VECTOR_BYTES / 2)));
};
template <class T> using Vec = typename Lanes<T>::Vec;
template <class T> using Int = typename Lanes<T>::Int;      // as many integers,
template <class T> using Whole = typename Lanes<T>::Whole;  // and one of them
template <class T> constexpr int WIDTH = VECTOR_BYTES / sizeof(T);
template <class T> constexpr int PANEL = 2 * WIDTH<T>;  // columns of a packed right-hand side that lie together

// Two bfloat16 values along the contraction: one operand of the dot-product instruction.
struct Pair {
    uint32_t bits;
};

template <class T> SWIRL_INLINE Vec<T> load(const T* from) {
    Vec<T> x;
    memcpy(&x, from, sizeof(x));
    return x;
}
template <class T> SWIRL_INLINE void store(T* to, Vec<T> x) { memcpy(to, &x, sizeof(x)); }
template <class T> SWIRL_INLINE Vec<T> splat(T x) { return x - Vec<T>{}; }
template <class T> SWIRL_INLINE Int<T> load_index(const int32_t* from) {
    typename Lanes<T>::Index x;
    memcpy(&x, from, sizeof(x));
    return __builtin_convertvector(x, Int<T>);
}
template <class T> SWIRL_INLINE Int<T> iota() {
    Int<T> x;
    for (int lane = 0; lane < WIDTH<T>; lane++) x[lane] = lane;
    return x;
}

// e^r = 1 + r + r^2 P(r) on |r| <= ln2 / 2. float: the minimax polynomial of Cephes expf; double: Taylor to r^13.
template <class T> struct Exp;
template <> struct Exp<float> {
    static constexpr float p[] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                  8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, round = 0x1.8p23f;
    static constexpr float smallest = -87.3f, largest = 88.3f;
    static constexpr int mantissa = 23;
};
template <> struct Exp<double> {
    static constexpr double p[] = {1 / 2.,      1 / 6.,       1 / 24.,       1 / 120.,
                                   1 / 720.,    1 / 5040.,    1 / 40320.,    1 / 362880.,
                                   1 / 3628800., 1 / 39916800., 1 / 479001600., 1 / 6227020800.};
    static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33, round = 0x1.8p52;
    static constexpr double smallest = -708, largest = 709;
    static constexpr int mantissa = 52;
};

// x = n ln2 + r: e^x = 2^n + 2^n (e^r - 1). Gives 2^n and the second term; the caller keeps x in range.
template <class T> SWIRL_INLINE void exp_parts(Vec<T> x, Vec<T>& power, Vec<T>& rest) {
    using E = Exp<T>;
    Vec<T> shifted = x * T(1.4426950408889634) + E::round;  // the sum rounds to an integer, in its low bits
    Vec<T> n = shifted - E::round;
    Vec<T> r = x - n * E::ln2_high;
    r = r - n * E::ln2_low;
    constexpr int terms = sizeof(E::p) / sizeof(T);
    Vec<T> poly = splat<T>(E::p[terms - 1]);
    for (int i = terms - 2; i >= 0; i--) poly = poly * r + E::p[i];
    poly = poly * (r * r) + r;
    Int<T> bits = ((Int<T>)shifted << E::mantissa) + (Int<T>)splat<T>(1);
    power = (Vec<T>)bits;
    rest = power * poly;
}
// e^x for x in [smallest, largest].
template <class T> SWIRL_INLINE Vec<T> exp_in_range(Vec<T> x) {
    Vec<T> power, rest;
    exp_parts<T>(x, power, rest);
    return power + rest;
}
template <class T> SWIRL_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
    x = x < low ? splat<T>(low) : x;
    return x > high ? splat<T>(high) : x;
}
// GCC makes two instructions of each of those choices. Where x is NaN, these too keep it.
#if defined(__AVX512F__)
template <> SWIRL_INLINE Vec<float> clamp<float>(Vec<float> x, float low, float high) {
    return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
}
#elif defined(__AVX2__)
template <> SWIRL_INLINE Vec<float> clamp<float>(Vec<float> x, float low, float high) {
    return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
}
#endif
template <class T> SWIRL_INLINE Vec<T> exp_clamped(Vec<T> x) {
    return exp_in_range<T>(clamp<T>(x, Exp<T>::smallest, Exp<T>::largest));
}
// t = tanh(x / 2), its relative error an ulp or two even near 0, where 1 - 2 / (e^x + 1) would cancel; and its slope
// 1 - t^2, as exact near 1, where the difference would cancel.
template <class T> SWIRL_INLINE Vec<T> tanh_of_half(Vec<T> x, Vec<T>* slope = nullptr) {
    Vec<T> power, rest;
    exp_parts<T>(clamp<T>(x, T(-40), T(40)), power, rest);
    Vec<T> expm1 = (power - T(1)) + rest, inverse = T(1) / (expm1 + T(2));
    if (slope) *slope = (power + rest) * (inverse * inverse) * T(4);
    return expm1 * inverse;
}

SWIRL_INLINE Vec<float> multiply_add(float a, const float* b, Vec<float> sum) { return load(b) * a + sum; }
SWIRL_INLINE Vec<double> multiply_add(double a, const double* b, Vec<double> sum) { return load(b) * a + sum; }
// The same step for one element, fused where those above are.
#if defined(__FMA__)
SWIRL_INLINE float multiply_add(float a, float b, float sum) { return __builtin_fmaf(a, b, sum); }
SWIRL_INLINE double multiply_add(double a, double b, double sum) { return __builtin_fma(a, b, sum); }
#else
SWIRL_INLINE float multiply_add(float a, float b, float sum) { return a * b + sum; }
SWIRL_INLINE double multiply_add(double a, double b, double sum) { return a * b + sum; }
#endif
#if defined(__AVX512BF16__)
SWIRL_INLINE Vec<float> multiply_add(Pair a, const Pair* b, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a.bits),
                                        (__m512bh)_mm512_loadu_si512(b));
}
#endif

// C (rows x columns) = or += A B. A is read one element at a time at a[row * a_row + step * a_step]; B lies packed as
// [columns / PANEL][steps][PANEL]. rows is a multiple of ROWS, columns of PANEL. Sums over steps start from zero and
// are added to C once: the order of summation depends on the shape alone.
template <class E, class T>
SWIRL_INLINE void product(int rows, int columns, int steps, const E* a, ptrdiff_t a_row, ptrdiff_t a_step, const E* b,
                          T* c, ptrdiff_t c_row, bool add) {
    constexpr int W = WIDTH<T>;
    for (int column = 0; column < columns; column += PANEL<T>, b += (ptrdiff_t)steps * PANEL<T>) {
        for (int row = 0; row < rows; row += ROWS) {
            Vec<T> sum[ROWS][2] = {};
            const E *at = a + row * a_row, *bt = b;
            for (int step = 0; step < steps; step++, at += a_step, bt += PANEL<T>) {
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; i++) {
                    sum[i][0] = multiply_add(at[i * a_row], bt, sum[i][0]);
                    sum[i][1] = multiply_add(at[i * a_row], bt + W, sum[i][1]);
                }
            }
            T* to = c + row * c_row + column;
            for (int i = 0; i < ROWS; i++, to += c_row) {
                store(to, add ? load(to) + sum[i][0] : sum[i][0]);
                store(to + W, add ? load(to + W) + sum[i][1] : sum[i][1]);
            }
        }
    }
}

}  // namespace swirl::SWIRL_ISA
