// Tree attention forward and backward over live tiles, built once per instruction set (SWIRL_ISA names it).
//
// A task owns one block and keeps it in the lanes of the vectors: forward a block of queries, whose scores are made
// transposed (keys x queries), so that maxima and sums run down the lanes; backward a block of keys. All operands
// that are read along the lanes are packed first. Weights, sums and gradients are float32 (float64 for float64).
// bfloat16: the two products of inputs alone (Q K^T, dO V^T) take the dot-product instruction where there is one,
// which is exact; those of the weights stay in float32, as the reference has them.
// Summation order is fixed by the tiles, never by the threads.
#include "tree_attention.h"

#include "pack.h"
#include "workspace.h"

namespace swirl::SWIRL_ISA {
namespace {

// I input, E score operand, T weights and sums; BLOCK is the problem's.
template <class I, class E, class T, int BLOCK> struct Attention {
    static constexpr int W = WIDTH<T>;
    static constexpr int TILE = BLOCK * BLOCK;

    const Problem& p;
    const int64_t steps;    // elements of E in a row of D
    const int64_t columns;  // D rounded up to whole panels
    const int64_t groups;

    explicit Attention(const Problem& p)
        : p(p), steps(steps_of<E>(p.D)), columns(round_up(p.D, PANEL<T>)), groups(p.Hq / p.Hkv) {}

    // One block of one head as rows of score operands, [BLOCK][steps]; rows past T are zero.
    void pack_rows(const void* tensor, int64_t H, int64_t head, int64_t block, E* to) const {
        const I* from = (const I*)tensor + (block * BLOCK * H + head) * p.D;
        SWIRL_ISA::pack_rows(from, H * p.D, p.T - block * BLOCK, BLOCK, p.D, to);
    }
    // Those rows turned, as the right-hand side of a product: [BLOCK / PANEL][steps][PANEL].
    void pack_turned(const E* rows, E* to) const { SWIRL_ISA::pack_turned<T>(rows, BLOCK, steps, to); }
    // One block of one head as the right-hand side of a product over tokens: [columns / PANEL][BLOCK][PANEL].
    void pack_panels(const void* tensor, int64_t H, int64_t head, int64_t block, T* to) const {
        const I* from = (const I*)tensor + (block * BLOCK * H + head) * p.D;
        SWIRL_ISA::pack_panels(from, H * p.D, p.T - block * BLOCK, BLOCK, p.D, to);
    }
    // Rows of sums, times a factor each, into the output tensor's dtype.
    template <class O>
    void unpack(const T* from, const T* factor, int64_t H, int64_t head, int64_t block, O* tensor) const {
        for (int row = 0; row < BLOCK; row++) {
            int64_t token = block * BLOCK + row;
            if (token >= p.T) return;
            O* to = tensor + (token * H + head) * p.D;
            for (int64_t d = 0; d < p.D; d++) narrow(from[row * columns + d] * factor[row], to[d]);
        }
    }

    // Which lanes (queries) see key j.
    SWIRL_INLINE Int<T> sees(Int<T> query, Int<T> position, int64_t key) const {
        Whole<T> j = key;
        return (query >= j) & (query < Whole<T>(p.end[j])) & (position < Whole<T>(p.limit[j]));
    }

    // S^T, as made by the product -> weights, adding to each query's sum. The cap bounds the scores, so that no maximum
    // need be taken off before the exponential.
    template <bool FULL> void weigh_capped(T* tile, int64_t q0, int64_t k0, T* total) const {
        T to_tanh = T(2 * p.scale / p.softcap), cap = T(p.softcap);
        for (int v = 0; v < BLOCK; v += W) {
            Int<T> query = iota<T>() + Whole<T>(q0 + v), position = load_index<T>(p.position + q0 + v);
            Vec<T> sum = {};
            for (int j = 0; j < BLOCK; j++) {
                T* at = tile + j * BLOCK + v;
                Vec<T> weight = exp_in_range<T>(tanh_of_half<T>(load(at) * to_tanh) * cap);
                if (!FULL) weight = sees(query, position, k0 + j) ? weight : Vec<T>{};
                sum += weight;
                store(at, weight);
            }
            store(total + v, load(total + v) + sum);
        }
    }
    // The same with the running maximum taken off; the factor says by how much earlier sums shrink.
    template <bool FULL, bool CAP>
    void weigh(T* tile, int64_t q0, int64_t k0, T* total, T* maximum, T* factor) const {
        T to_tanh = CAP ? T(2 * p.scale / p.softcap) : T(0), cap = CAP ? T(p.softcap) : T(p.scale);
        for (int v = 0; v < BLOCK; v += W) {
            Int<T> query = iota<T>() + Whole<T>(q0 + v), position = load_index<T>(p.position + q0 + v);
            Vec<T> before = load(maximum + v), top = before, sum = {};
            for (int j = 0; j < BLOCK; j++) {
                T* at = tile + j * BLOCK + v;
                Vec<T> score = CAP ? tanh_of_half<T>(load(at) * to_tanh) * cap : load(at) * cap;
                Vec<T> seen = FULL ? score : sees(query, position, k0 + j) ? score : top;
                top = seen > top ? seen : top;
                store(at, score);
            }
            for (int j = 0; j < BLOCK; j++) {
                T* at = tile + j * BLOCK + v;
                Vec<T> weight = exp_clamped<T>(load(at) - top);
                if (!FULL) weight = sees(query, position, k0 + j) ? weight : Vec<T>{};
                sum += weight;
                store(at, weight);
            }
            Vec<T> shrink = exp_clamped<T>(before - top);
            store(total + v, load(total + v) * shrink + sum);
            store(maximum + v, top);
            store(factor + v, shrink);
        }
    }

    bool fixed_maximum() const { return p.softcap > 0 && p.softcap <= 64; }  // e^64 * sums stays far within float32

    void forward_task(int64_t head, int64_t block, const E* key_rows, const T* value_panels, char* scratch) const {
        T* tile = (T*)scratch;
        T* sums = tile + TILE;
        T *total = sums + BLOCK * columns, *maximum = total + BLOCK, *factor = maximum + BLOCK;
        E *rows = (E*)(factor + BLOCK), *turned = rows + BLOCK * steps;
        int64_t kv = head / groups, q0 = block * BLOCK;
        pack_rows(p.q, p.Hq, head, block, rows);
        pack_turned(rows, turned);
        for (int i = 0; i < BLOCK; i++) total[i] = 0, maximum[i] = fixed_maximum() ? T(0) : T(-1e30);
        for (int64_t t = p.first[block]; t < p.first[block + 1]; t++) {
            const Tile& live = p.tiles[t];
            int64_t k0 = (int64_t)live.key_block * BLOCK, at = kv * p.num_blocks + live.key_block;
            product<E, T>(BLOCK, BLOCK, steps, key_rows + at * BLOCK * steps, steps, 1, turned, tile, BLOCK, false);
            if (fixed_maximum()) {
                live.full ? weigh_capped<true>(tile, q0, k0, total) : weigh_capped<false>(tile, q0, k0, total);
            } else {
                if (p.softcap > 0)
                    live.full ? weigh<true, true>(tile, q0, k0, total, maximum, factor)
                              : weigh<false, true>(tile, q0, k0, total, maximum, factor);
                else
                    live.full ? weigh<true, false>(tile, q0, k0, total, maximum, factor)
                              : weigh<false, false>(tile, q0, k0, total, maximum, factor);
                if (t > p.first[block])
                    for (int i = 0; i < BLOCK; i++)
                        if (factor[i] != 1)
                            for (int64_t d = 0; d < columns; d++) sums[i * columns + d] *= factor[i];
            }
            product<T, T>(BLOCK, columns, BLOCK, tile, 1, BLOCK, value_panels + at * BLOCK * columns, sums, columns,
                          t > p.first[block]);
        }
        T* softmax = (T*)p.softmax + head * p.T + q0;
        for (int i = 0; i < BLOCK && q0 + i < p.T; i++) {
            softmax[i] = maximum[i];
            softmax[p.Hq * p.T + i] = total[i];
            factor[i] = 1 / total[i];
        }
        unpack(sums, factor, p.Hq, head, block, (I*)p.out);
        if (p.out_wide) unpack(sums, factor, p.Hq, head, block, (T*)p.out_wide);
    }

    bool forward() const {
        int64_t blocks = p.num_blocks, heads_blocks = p.Hkv * blocks;
        size_t rows_bytes = heads_blocks * BLOCK * steps * sizeof(E);
        size_t panels_bytes = heads_blocks * BLOCK * columns * sizeof(T);
        size_t scratch_bytes =
            round_up((TILE + BLOCK * columns + 3 * BLOCK) * sizeof(T) + 2 * BLOCK * steps * sizeof(E), 4096);
        rows_bytes = round_up(rows_bytes, 4096), panels_bytes = round_up(panels_bytes, 4096);
        char* memory = acquire(rows_bytes + panels_bytes + scratch_bytes * p.threads);
        if (!memory) return false;
        E* key_rows = (E*)memory;
        T* value_panels = (T*)(memory + rows_bytes);
        int next_thread = 0;
        int64_t num_tasks = p.Hq * blocks;
#pragma omp parallel num_threads(p.threads)
        {
            char* scratch = memory + rows_bytes + panels_bytes +
                            scratch_bytes * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < heads_blocks; i++) {
                pack_rows(p.k, p.Hkv, i / blocks, i % blocks, key_rows + i * BLOCK * steps);
                pack_panels(p.v, p.Hkv, i / blocks, i % blocks, value_panels + i * BLOCK * columns);
            }
            // Late blocks of a long tree see the most keys: they go first, so that the threads end together.
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_tasks; i++)
                forward_task(i % p.Hq, blocks - 1 - i / p.Hq, key_rows, value_panels, scratch);
        }
        release(memory);
        return true;
    }

    // S and dP, rows of queries, lanes of keys -> weights P and dS = dLoss / d(q k^T).
    template <bool FULL, bool CAP>
    void differentiate(T* tile, T* d_tile, int64_t q0, int64_t k0, const T* maximum, const T* share,
                       const T* delta) const {
        T to_tanh = CAP ? T(2 * p.scale / p.softcap) : T(0), cap = CAP ? T(p.softcap) : T(p.scale);
        for (int v = 0; v < BLOCK; v += W) {
            Int<T> key = iota<T>() + Whole<T>(k0 + v), end = load_index<T>(p.end + k0 + v);
            Int<T> limit = load_index<T>(p.limit + k0 + v);
            for (int i = 0; i < BLOCK; i++) {
                T *at = tile + i * BLOCK + v, *d_at = d_tile + i * BLOCK + v;
                Vec<T> score = load(at), slope = splat<T>(T(p.scale));
                if (CAP) {
                    Vec<T> of_tanh;
                    score = tanh_of_half<T>(score * to_tanh, &of_tanh);
                    slope *= of_tanh;
                }
                Vec<T> weight = exp_clamped<T>(score * cap - maximum[i]) * share[i];
                if (!FULL) {
                    Whole<T> query = q0 + i, position = p.position[query];
                    Int<T> seen = (key <= query) & (end > query) & (limit > position);
                    weight = seen ? weight : Vec<T>{};
                }
                store(at, weight);
                store(d_at, weight * (load(d_at) - delta[i]) * slope);
            }
        }
    }

    struct Backward {
        E *query_rows, *d_out_rows;                          // [Hq][num_blocks][BLOCK][steps]
        T *query_panels, *d_out_panels, *key_panels;         // [Hq, Hkv][num_blocks][columns / PANEL][BLOCK][PANEL]
        T* dq;                                               // [Hq][num_blocks][BLOCK][columns]
        T *maximum, *share, *delta;                          // [Hq][num_blocks][BLOCK]: share is 1 / sum, delta dO . O
        int32_t* turn;                                       // [Hq][num_blocks]: tiles that have added to dq
    };

    void prepare_queries(const Backward& b, int64_t head, int64_t block) const {
        int64_t at = head * p.num_blocks + block;
        pack_rows(p.q, p.Hq, head, block, b.query_rows + at * BLOCK * steps);
        pack_rows(p.d_out, p.Hq, head, block, b.d_out_rows + at * BLOCK * steps);
        pack_panels(p.q, p.Hq, head, block, b.query_panels + at * BLOCK * columns);
        pack_panels(p.d_out, p.Hq, head, block, b.d_out_panels + at * BLOCK * columns);
        for (int row = 0; row < BLOCK; row++) {
            int64_t token = block * BLOCK + row;
            bool live = token < p.T;
            const T* softmax = (const T*)p.softmax + head * p.T + token;
            b.maximum[at * BLOCK + row] = live ? softmax[0] : 0;
            b.share[at * BLOCK + row] = live ? 1 / softmax[p.Hq * p.T] : 0;
        }
        // Eight rows at once, each summed in the order and by the fused steps of a product: where one weight is 1 and
        // O that value, dP - delta is then exactly 0.
        constexpr int TOGETHER = 8;
        for (int row = 0; row < BLOCK; row += TOGETHER) {
            const I* d_out[TOGETHER];
            const T* out[TOGETHER];
            T sum[TOGETHER] = {};
            for (int i = 0; i < TOGETHER; i++) {
                int64_t token = block * BLOCK + row + i, from = ((token < p.T ? token : p.T - 1) * p.Hq + head) * p.D;
                d_out[i] = (const I*)p.d_out + from, out[i] = (const T*)p.out_wide + from;
            }
            for (int64_t d = 0; d < p.D; d++)
                for (int i = 0; i < TOGETHER; i++) sum[i] = multiply_add(widen(d_out[i][d]), out[i][d], sum[i]);
            memcpy(b.delta + at * BLOCK + row, sum, sizeof(sum));
        }
        b.turn[at] = 0;
    }

    void backward_task(const Backward& b, int64_t kv, int64_t block, char* scratch) const {
        T *tile = (T*)scratch, *d_tile = tile + TILE;
        T *dk = d_tile + TILE, *dv = dk + BLOCK * columns, *ones = dv + BLOCK * columns;
        E *rows = (E*)(ones + BLOCK), *key_turned = rows + BLOCK * steps, *value_turned = key_turned + BLOCK * steps;
        int64_t k0 = block * BLOCK;
        pack_rows(p.k, p.Hkv, kv, block, rows);
        pack_turned(rows, key_turned);
        pack_rows(p.v, p.Hkv, kv, block, rows);
        pack_turned(rows, value_turned);
        const T* key_panels = b.key_panels + (kv * p.num_blocks + block) * BLOCK * columns;
        bool add = false;
        for (int64_t head = kv * groups; head < (kv + 1) * groups; head++)
            for (int64_t t = p.first[block]; t < p.first[block + 1]; t++, add = true) {
                const Tile& live = p.tiles[t];
                int64_t q0 = (int64_t)live.query_block * BLOCK, at = head * p.num_blocks + live.query_block;
                const T *maximum = b.maximum + at * BLOCK, *share = b.share + at * BLOCK, *delta = b.delta + at * BLOCK;
                product<E, T>(BLOCK, BLOCK, steps, b.query_rows + at * BLOCK * steps, steps, 1, key_turned, tile,
                              BLOCK, false);
                product<E, T>(BLOCK, BLOCK, steps, b.d_out_rows + at * BLOCK * steps, steps, 1, value_turned, d_tile,
                              BLOCK, false);
                if (p.softcap > 0)
                    live.full ? differentiate<true, true>(tile, d_tile, q0, k0, maximum, share, delta)
                              : differentiate<false, true>(tile, d_tile, q0, k0, maximum, share, delta);
                else
                    live.full ? differentiate<true, false>(tile, d_tile, q0, k0, maximum, share, delta)
                              : differentiate<false, false>(tile, d_tile, q0, k0, maximum, share, delta);
                product<T, T>(BLOCK, columns, BLOCK, tile, 1, BLOCK, b.d_out_panels + at * BLOCK * columns, dv,
                              columns, add);
                product<T, T>(BLOCK, columns, BLOCK, d_tile, 1, BLOCK, b.query_panels + at * BLOCK * columns, dk,
                              columns, add);
                // Tiles of one query block add to dQ in the order of their keys. Tasks are handed out in that order
                // too, so that the one waited for is always under way.
                wait_for(b.turn + at, live.turn);
                product<T, T>(BLOCK, columns, BLOCK, d_tile, BLOCK, 1, key_panels, b.dq + at * BLOCK * columns,
                              columns, live.turn > 0);
                __atomic_store_n(b.turn + at, live.turn + 1, __ATOMIC_RELEASE);
            }
        for (int i = 0; i < BLOCK; i++) ones[i] = 1;
        unpack(dk, ones, p.Hkv, kv, block, (I*)p.dk);
        unpack(dv, ones, p.Hkv, kv, block, (I*)p.dv);
    }

    bool backward() const {
        int64_t blocks = p.num_blocks, query_tasks = p.Hq * blocks, key_tasks = p.Hkv * blocks;
        size_t used = 0;
        char* memory = nullptr;
        Backward b;
        auto layout = [&] {  // run twice: to count, then to place
            used = 0;
            auto take = [&](auto*& pointer, size_t count) {
                pointer = (decltype(+pointer))(memory + used);
                used += round_up(count * sizeof(*pointer), 64);
            };
            take(b.query_rows, query_tasks * BLOCK * steps);
            take(b.d_out_rows, query_tasks * BLOCK * steps);
            take(b.query_panels, query_tasks * BLOCK * columns);
            take(b.d_out_panels, query_tasks * BLOCK * columns);
            take(b.dq, query_tasks * BLOCK * columns);
            take(b.key_panels, key_tasks * BLOCK * columns);
            take(b.maximum, query_tasks * BLOCK);
            take(b.share, query_tasks * BLOCK);
            take(b.delta, query_tasks * BLOCK);
            take(b.turn, query_tasks);
        };
        layout();
        size_t scratch_bytes = round_up(
            (2 * TILE + 2 * BLOCK * columns + BLOCK) * sizeof(T) + 3 * BLOCK * steps * sizeof(E), 4096);
        size_t scratch_at = round_up(used, 4096);
        memory = acquire(scratch_at + scratch_bytes * p.threads);
        if (!memory) return false;
        layout();
        int next_thread = 0;
        int64_t next_task = 0;
#pragma omp parallel num_threads(p.threads)
        {
            char* scratch = memory + scratch_at + scratch_bytes * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < key_tasks; i++)
                pack_panels(p.k, p.Hkv, i / blocks, i % blocks, b.key_panels + i * BLOCK * columns);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < query_tasks; i++) prepare_queries(b, i / blocks, i % blocks);
            for (int64_t i; (i = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < key_tasks;)
                backward_task(b, i % p.Hkv, i / p.Hkv, scratch);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t i = 0; i < query_tasks; i++) {
                T ones[BLOCK];
                for (T& one : ones) one = 1;
                unpack(b.dq + i * BLOCK * columns, ones, p.Hq, i / blocks, i % blocks, (I*)p.dq);
            }
        }
        release(memory);
        return true;
    }
};

template <int BLOCK, class Run> bool with_dtype(const Problem& p, Run run) {
    if (p.dtype == Dtype::float64) return run(Attention<double, double, double, BLOCK>(p));
    if (p.dtype == Dtype::float32) return run(Attention<float, float, float, BLOCK>(p));
#if defined(__AVX512BF16__)
    return run(Attention<Bfloat16, Pair, float, BLOCK>(p));
#else
    return run(Attention<Bfloat16, float, float, BLOCK>(p));
#endif
}
template <class Run> bool with_types(const Problem& p, Run run) {
    return p.block == 32 ? with_dtype<32>(p, run) : with_dtype<64>(p, run);
}

}  // namespace

bool tree_attention_fwd(const Problem& p) {
    return with_types(p, [](const auto& attention) { return attention.forward(); });
}
bool tree_attention_bwd(const Problem& p) {
    return with_types(p, [](const auto& attention) { return attention.backward(); });
}

}  // namespace swirl::SWIRL_ISA
