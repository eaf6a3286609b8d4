// Rows of a tensor as operands of the register-tiled product in simd.h. E is what the product reads: the elements
// themselves, widened, or pairs of bfloat16. Rows past the live ones are zero.
#pragma once
#include "dtype.h"
#include "simd.h"

namespace swirl::SWIRL_ISA {

template <class T> SWIRL_INLINE T widen(T x) { return x; }
SWIRL_INLINE float widen(Bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
SWIRL_INLINE void narrow(float x, float& to) { to = x; }
SWIRL_INLINE void narrow(double x, double& to) { to = x; }
SWIRL_INLINE void narrow(float x, Bfloat16& to) {  // to nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to.bits = x == x ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class E> constexpr int PER_ELEMENT = 1;
template <> constexpr int PER_ELEMENT<Pair> = 2;

template <class I, class E> SWIRL_INLINE void pack_row(const I* from, int64_t width, E* to) {
    for (int64_t i = 0; i < width; i++) to[i] = widen(from[i]);
}
SWIRL_INLINE void pack_row(const Bfloat16* from, int64_t width, Pair* to) {
    memcpy((void*)to, from, width / 2 * sizeof(Pair));
    if (width % 2) to[width / 2].bits = from[width - 1].bits;
}

// Elements of E that hold a row of `width`.
template <class E> constexpr int64_t steps_of(int64_t width) { return (width + PER_ELEMENT<E> - 1) / PER_ELEMENT<E>; }

// Left-hand side: [rows][steps]. `stride` is from row to row, in elements of I.
template <class I, class E>
inline void pack_rows(const I* from, int64_t stride, int64_t live, int64_t rows, int64_t width, E* to) {
    int64_t steps = steps_of<E>(width);
    for (int64_t row = 0; row < rows; row++, from += stride, to += steps) {
        if (row >= live) {
            memset((void*)to, 0, (rows - row) * steps * sizeof(E));
            return;
        }
        pack_row(from, width, to);
    }
}
// Those rows turned, as the right-hand side: [rows / PANEL][steps][PANEL].
template <class T, class E> inline void pack_turned(const E* from, int64_t rows, int64_t steps, E* to) {
    for (int64_t start = 0; start < rows; start += PANEL<T>)
        for (int64_t i = 0; i < steps; i++)
            for (int lane = 0; lane < PANEL<T>; lane++) *to++ = from[(start + lane) * steps + i];
}
// Right-hand side of a product over the rows: [columns / PANEL][rows][PANEL], columns past `width` zero. (Or panels of
// another size: one of ROWS is a left-hand side that lies turned.)
template <int SIZE = 0, class I, class T>
inline void pack_panels(const I* from, int64_t stride, int64_t live, int64_t rows, int64_t width, T* to) {
    constexpr int size = SIZE ? SIZE : PANEL<T>;
    for (int64_t start = 0; start < width; start += size)
        for (int64_t row = 0; row < rows; row++, to += size) {
            const I* at = from + row * stride + start;
            int64_t left = row < live ? width - start : 0;
            if (left >= size)
                for (int lane = 0; lane < size; lane++) to[lane] = widen(at[lane]);
            else
                for (int lane = 0; lane < size; lane++) to[lane] = lane < left ? widen(at[lane]) : T(0);
        }
}

}  // namespace swirl::SWIRL_ISA
