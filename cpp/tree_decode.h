// Decoding on the packed tree: attention of new tokens, and whole steps of the model; built once per instruction set.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace swirl {

constexpr int LANES = 16;  // sequences that are computed together, each in a lane of the vectors

// Who sees what. Packed token j lies in row slot[j] of the pools of keys and values; a sequence whose state ends at
// packed index s sees it if j <= s < end[j], within its window, and its own tokens before and with the new one.
struct Sequences {
    int64_t T, B, N;
    const int32_t *slot, *end, *position;                // (T,)
    const int32_t *state, *own_slot, *own_length;        // (B,), (B, N), (B,): the position is position[s] + own_length
};

struct TreeDecode {
    Dtype dtype;
    int64_t Hq, Hkv, D;
    const void *q, *keys, *values;  // (B, Hq, D), pools (slots, Hkv, D)
    void* out;                      // (B, Hq, D)
    Sequences sequences;
    double scale, softcap;  // softcap 0: none
    int64_t window;         // 0: none
    int threads;
};

// Weights (out, in) row-major. q_norm and k_norm may be null. cos and sin (positions, D / 2) are float32 at least.
struct DecodeLayer {
    const void *input_norm, *q, *k, *v, *q_norm, *k_norm, *o, *attention_norm, *mlp_norm, *gate, *up, *down, *output_norm;
    const void *cos, *sin;
    void *keys, *values;
    int64_t window;
};

// The head and the draw, for all sequences; sequence b draws limit[b] tokens at most.
struct Draw {
    int64_t d, V;
    const void* embedding;        // (V, d)
    double softcap;               // of the logits, 0: none
    int64_t steps;                // columns of the three tables
    const double* uniform;        // (B, steps)
    const double* temperature;    // (B,)
    const uint8_t* is_stop;       // (V,)
    const int32_t* limit;         // (B,)
    int64_t* ids;                 // (B, steps)
    double* log_prob;             // (B, steps)
    int32_t* count;               // (B,) tokens drawn
};

struct Decode {
    Dtype dtype;  // of weights, keys, values and hidden states
    int64_t Hq, Hkv, D, F, num_layers;
    const DecodeLayer* layers;
    const void* final_norm;
    double eps, embed_scale, scale, softcap;
    Sequences sequences;
    const int64_t* token;  // (B,) the id each sequence goes on from
    const void* hidden;    // (B, d) instead: draws one token each, and runs no layer
    void* prefilled;       // (B, d) after the final norm: the tokens are those of the tree, at their states; none is drawn
    Draw draw;
    int threads;
};

// Each returns false where memory ran out.
#define SWIRL_DECLARE(isa)                 \
    namespace isa {                        \
    bool tree_decode(const TreeDecode&);   \
    bool decode(const Decode&);            \
    }
SWIRL_DECLARE(plain)
SWIRL_DECLARE(avx2)
SWIRL_DECLARE(avx512)
SWIRL_DECLARE(avx512_bf16)
#undef SWIRL_DECLARE

}  // namespace swirl
