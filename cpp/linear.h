// y = x w^T and its gradients in float32, rows of tokens against a small weight; built once per instruction set.
#pragma once
#include <cstdint>

namespace swirl {

struct Linear {
    int64_t M, N, K;  // x (M, K), w (N, K), y (M, N), all contiguous
    const float *x, *w, *dy;
    float *y, *dx, *dw;
    int threads;
};

// Each returns false where memory ran out.
#define SWIRL_DECLARE(isa)            \
    namespace isa {                   \
    bool linear_fwd(const Linear&);   \
    bool linear_dx(const Linear&);    \
    bool linear_dw(const Linear&);    \
    }
SWIRL_DECLARE(plain)
SWIRL_DECLARE(avx2)
SWIRL_DECLARE(avx512)
SWIRL_DECLARE(avx512_bf16)
#undef SWIRL_DECLARE

}  // namespace swirl
