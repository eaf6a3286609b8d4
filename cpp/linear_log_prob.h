// LM head, softcap and log-prob in one pass over tiles of logits, and its gradients; built once per instruction set.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace swirl {

struct LinearLogProb {
    Dtype dtype;  // of hidden, weight and their gradients: float32 or bfloat16
    int64_t M, d, V;
    double softcap;                         // 0: none
    const void *hidden, *weight;            // (M, d), (V, d), contiguous
    const int64_t* target;                  // (M,), in [0, V)
    float *log_prob, *log_z, *entropy;      // (M,); forward writes them, backward reads all but the first
    const float *d_log_prob, *d_entropy;    // (M,)
    void *d_hidden, *d_weight;              // null where not wanted
    bool with_entropy;                      // else entropy and d_entropy are null
    int threads;
};

// Each returns false where memory ran out.
#define SWIRL_DECLARE(isa)                               \
    namespace isa {                                      \
    bool linear_log_prob_fwd(const LinearLogProb&);      \
    bool linear_log_prob_bwd(const LinearLogProb&);      \
    }
SWIRL_DECLARE(plain)
SWIRL_DECLARE(avx2)
SWIRL_DECLARE(avx512)
SWIRL_DECLARE(avx512_bf16)
#undef SWIRL_DECLARE

}  // namespace swirl
