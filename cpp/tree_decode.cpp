// Attention of new tokens to their states in the packed tree, sixteen sequences (a group) at a time.
//
// The keys that the sequences of a vector see are listed once, and read once for all of them. A sequence's own keys are
// its alone, and merged in by their log-sum-exp.
#include "tree_attend.h"

#include "workspace.h"

namespace swirl::SWIRL_ISA {
namespace {

template <class I, class T> bool attend_all(const TreeDecode& p) {
    int64_t groups = (p.sequences.B + LANES - 1) / LANES, row = p.Hq * p.D;
    Attention<I, T> attention(p.Hq, p.Hkv, p.D, p.scale, p.softcap, p.sequences);
    int64_t most_keys = attention.most_keys();
    size_t list_bytes = round_up(VECTORS<T> * sizeof(SeenKey) * most_keys, 64);
    size_t scratch_bytes = round_up((row * LANES + attention.scratch_size(most_keys)) * sizeof(T) + list_bytes, 4096);
    char* memory = acquire(scratch_bytes * p.threads);
    if (!memory) return false;
    int next_thread = 0;
#pragma omp parallel num_threads(p.threads)
    {
        char* mine = memory + scratch_bytes * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
        T *mixed = (T*)(mine + list_bytes), *scratch = mixed + row * LANES;
#pragma omp for schedule(dynamic)
        for (int64_t g = groups - 1; g >= 0; g--) {  // later states see more keys: they go first
            Group group(p.sequences, g);
            typename Attention<I, T>::Seen seen;
            attention.list(group, p.window, 0, most_keys, (SeenKey*)mine, seen);
            for (int lane = 0; lane < LANES; lane++) {
                const I* from = (const I*)p.q + group.row[lane] * row;
                for (int64_t i = 0; i < row; i++) mixed[i * LANES + lane] = widen(from[i]);
            }
            attention.run(group, seen, p.window, (const I*)p.keys, (const I*)p.values, mixed, scratch);
            for (int lane = 0; lane < group.live; lane++) {
                I* to = (I*)p.out + group.row[lane] * row;
                for (int64_t i = 0; i < row; i++) narrow(mixed[i * LANES + lane], to[i]);
            }
        }
    }
    release(memory);
    return true;
}

}  // namespace

bool tree_decode(const TreeDecode& p) {
    if (p.dtype == Dtype::float64) return attend_all<double, double>(p);
    if (p.dtype == Dtype::float32) return attend_all<float, float>(p);
    return attend_all<Bfloat16, float>(p);
}

}  // namespace swirl::SWIRL_ISA
