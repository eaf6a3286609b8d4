// RMSNorm, GeGLU, rotary embedding, and norm with rotation, in float32, each in one pass; built once per instruction set.
#pragma once
#include <cstdint>

namespace swirl {

// x, y, dy, dx (M, d), weight, dweight (d,), d a multiple of 16; rstd (M,) is 1 / root mean square.
struct RmsNorm {
    int64_t M, d;
    float eps;
    const float *x, *weight, *dy;
    float *y, *rstd, *dx, *dweight;
    int threads;
};

// gate, up, y and their gradients: n values, a multiple of 16.
struct Geglu {
    int64_t n;
    const float *gate, *up, *dy;
    float *y, *dgate, *dup;
    int threads;
};

// x, y (T, H, D); cos, sin (T, D / 2), D a multiple of 32. Turning back (the gradient) is sin negated.
struct Rope {
    int64_t T, H, D;
    const float *x, *cos, *sin;
    float* y;
    float sign;
    int threads;
};

// RmsNorm of every head, then Rope. x, y, dy, dx (T, H, D); weight, dweight (D,); cos, sin (T, D / 2), D a multiple of
// 32; rstd (T, H) is 1 / root mean square.
struct NormRope {
    int64_t T, H, D;
    float eps;
    const float *x, *weight, *cos, *sin, *dy;
    float *y, *rstd, *dx, *dweight;
    int threads;
};

// rms_norm_bwd and norm_rope_bwd return false where memory ran out.
#define SWIRL_DECLARE(isa)                \
    namespace isa {                       \
    void rms_norm_fwd(const RmsNorm&);    \
    bool rms_norm_bwd(const RmsNorm&);    \
    void geglu_fwd(const Geglu&);         \
    void geglu_bwd(const Geglu&);         \
    void rope(const Rope&);               \
    void norm_rope_fwd(const NormRope&);  \
    bool norm_rope_bwd(const NormRope&);  \
    }
SWIRL_DECLARE(plain)
SWIRL_DECLARE(avx2)
SWIRL_DECLARE(avx512)
SWIRL_DECLARE(avx512_bf16)
#undef SWIRL_DECLARE

}  // namespace swirl
