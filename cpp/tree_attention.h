// The problem handed from the module (built for any CPU) to the kernels (built once per instruction set).
// T packed tokens, Hq / Hkv query / key heads, D head dim; tensors are contiguous (T, H, D).
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace swirl {

// One block of pairs: a whole tile that no mask touches (full), or one to be masked. Dead ones are not listed.
struct Tile {
    int32_t query_block, key_block;
    int32_t turn;  // rank among the tiles of its query block: the order in which they add to dQ
    bool full;
};

struct Problem {
    Dtype dtype;
    int64_t T, Hq, Hkv, D;
    // Tokens in a block, of queries and of keys alike: 32, which follows the branches of small trees more closely, or
    // 64, which spends less on loading and storing sums where rows are long.
    int block;
    int64_t num_blocks;
    double scale, softcap;  // softcap 0: none
    int threads;
    // (num_blocks * block,) each. Query i sees key j <=> j <= i < end[j] and position[i] < limit[j]. Past T: end 0.
    const int32_t *end, *position, *limit;
    // Live tiles, of query block b in [first[b], first[b + 1]) forward; of key block b backward. Ascending.
    const Tile* tiles;
    const int64_t* first;

    // "wide" is float32, float64 for float64.
    const void *q, *k, *v, *d_out;
    void *out, *dq, *dk, *dv;
    void* softmax;   // (2, Hq, T) wide: the maximum taken off the scores, and the sum of their exponentials
    void* out_wide;  // (T, Hq, D) wide: O before rounding. Forward writes it unless null, backward reads it.
};

// Each returns false where memory ran out.
#define SWIRL_DECLARE(isa)                    \
    namespace isa {                           \
    bool tree_attention_fwd(const Problem&);  \
    bool tree_attention_bwd(const Problem&);  \
    }
SWIRL_DECLARE(plain)
SWIRL_DECLARE(avx2)
SWIRL_DECLARE(avx512)
SWIRL_DECLARE(avx512_bf16)
#undef SWIRL_DECLARE

}  // namespace swirl
