// The attention of one group of sequences, for the op and for the whole step.
#pragma once
#include "lanes.h"

namespace swirl::SWIRL_ISA {

// A key that some sequence of a group sees. `full`: all of them do, through the whole call.
struct SeenKey {
    int32_t index, end, position, slot, full;
};

// Lanes past the last sequence repeat the first, so that all lanes hold numbers; nothing of theirs is kept.
struct Group {
    int live;
    int64_t row[LANES];
    int32_t state[LANES], position[LANES], own_length[LANES];

    Group(const Sequences& s, int64_t g) {
        int64_t left = s.B - g * LANES;
        live = left < LANES ? left : LANES;
        for (int lane = 0; lane < LANES; lane++) {
            row[lane] = g * LANES + (lane < live ? lane : 0);
            state[lane] = s.state[row[lane]];
            own_length[lane] = s.own_length[row[lane]];
            position[lane] = (s.T ? s.position[state[lane]] : 0) + own_length[lane];
        }
    }
};

// The keys of the tree that `lanes` lanes from `first` on see now, or some of which they lose in the next `steps` tokens, in
// packed order. A subtree that holds none of their states is stepped over.
inline int64_t list_keys(const Sequences& s, const Group& group, int first, int lanes, int64_t window, int64_t steps,
                         SeenKey* to) {
    int64_t count = 0;
    int32_t last = 0;
    for (int lane = first; lane < first + lanes; lane++) last = group.state[lane] > last ? group.state[lane] : last;
    for (int32_t j = 0; j <= last;) {
        int inside = 0, near = 0, full = 0;
        for (int lane = first; lane < first + lanes; lane++) {
            bool seen = j <= group.state[lane] && group.state[lane] < s.end[j];
            int64_t distance = group.position[lane] - s.position[j];
            inside += seen;
            near += seen && (!window || distance < window);
            full += seen && (!window || distance + steps < window);
        }
        if (near) to[count++] = {j, s.end[j], s.position[j], s.slot[j], full == lanes};
        j = inside ? j + 1 : s.end[j];
    }
    return count;
}

// I what the pools hold, T what is computed in. The lanes of one vector see their keys together; each vector its own.
template <class I, class T> struct Attention {
    static constexpr int W = WIDTH<T>, NUM_VECTORS = VECTORS<T>;
    static constexpr int64_t KEYS = 64, TOGETHER = 8;  // keys of a block, and keys or dimensions of a tile
    // What makes a score of a dot; a copy, since a store through a pointer might change a member.
    struct Score {
        T scale, cap, to_tanh;
        SWIRL_INLINE Vec<T> operator()(Vec<T> dot) const {
            return cap > 0 ? tanh_of_half<T>(dot * to_tanh) * cap : dot * scale;
        }
    };
    const int64_t Hq, Hkv, D, groups;
    const Score score_of;
    const Sequences& sequences;

    // The keys that each vector of a group sees.
    struct Seen {
        SeenKey* keys[NUM_VECTORS];
        int64_t count[NUM_VECTORS];
    };

    Attention(int64_t Hq, int64_t Hkv, int64_t D, double scale, double softcap, const Sequences& sequences)
        : Hq(Hq), Hkv(Hkv), D(D), groups(Hq / Hkv),
          score_of{T(scale), T(softcap), T(softcap > 0 ? 2 * scale / softcap : 0)}, sequences(sequences) {}

    // Most keys that a vector can see.
    int64_t most_keys() const {
        int64_t most = 0, of_vector = 0;
        for (int64_t b = 0; b < sequences.B; b++) {
            of_vector = (b % W ? of_vector : 0) + sequences.position[sequences.state[b]] + 1;
            most = of_vector > most ? of_vector : most;
        }
        return most < sequences.T ? most : sequences.T;
    }
    void list(const Group& group, int64_t window, int64_t steps, int64_t most_keys, SeenKey* memory, Seen& to) const {
        for (int v = 0; v < NUM_VECTORS; v++, memory += most_keys) {
            to.keys[v] = memory;
            to.count[v] = list_keys(sequences, group, v * W, W, window, steps, memory);
        }
    }
    int64_t own_size() const { return round_up(sequences.N, 64); }
    int64_t scratch_size(int64_t most_keys) const {
        return round_up(most_keys * W + 2 * round_up(D, LANES) + D * W + own_size(), 64);
    }

    const I* row_of(const I* pool, int64_t slot, int64_t kv) const { return pool + (slot * Hkv + kv) * D; }

    // Queries times COUNT keys: to (COUNT, W).
    template <int COUNT> SWIRL_INLINE void dots(const SeenKey* seen, const I* keys, int64_t kv, const T* q, T* to) const {
        const I* key[COUNT];
        Vec<T> sum[COUNT] = {};
        for (int i = 0; i < COUNT; i++) key[i] = row_of(keys, seen[i].slot, kv);
        for (int64_t d = 0, end = D; d < end; d++, q += LANES) {
            Vec<T> x = load(q);
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; i++) sum[i] = x * T(widen(key[i][d])) + sum[i];
        }
        for (int i = 0; i < COUNT; i++) store(to + i * W, sum[i]);
    }
    // Adds weights (count, W) times values to COUNT dimensions of out (LANES apart).
    template <int COUNT>
    SWIRL_INLINE void mix(const SeenKey* seen, int64_t count, const I* values, int64_t kv, int64_t d, const T* weights,
                          T* out) const {
        Vec<T> sum[COUNT];
        for (int i = 0; i < COUNT; i++) sum[i] = load(out + i * LANES);
        for (int64_t t = 0; t < count; t++, weights += W) {
            Vec<T> p = load(weights);
            const I* value = row_of(values, seen[t].slot, kv) + d;
            asm("" : "+r"(value));  // one address, from which all are at hand: GCC would make each anew
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; i++) sum[i] = p * T(widen(value[i])) + sum[i];
        }
        for (int i = 0; i < COUNT; i++) store(out + i * LANES, sum[i]);
    }

    // Raw dots (count, W) -> scores, -1e30 where a sequence does not see the key. Returns the largest, `top` included.
    Vec<T> scores_of(T* tile, const SeenKey* keys, int64_t count, Int<T> state, Int<T> position, bool has_window,
                     Vec<T> top) const {
        const Score score = score_of;
        bool full = true;
        for (int64_t i = 0; i < count; i++) full &= keys[i].full != 0;
        for (int64_t i = 0; i < count; i++) {
            Vec<T> x = score(load(tile + i * W));
            if (!full) {
                Int<T> seen = (state >= Whole<T>(keys[i].index)) & (state < Whole<T>(keys[i].end));
                if (has_window) seen &= position < Whole<T>(keys[i].position);
                x = seen ? x : splat<T>(T(-1e30));
            }
            top = x > top ? x : top;
            store(tile + i * W, x);
        }
        return top;
    }

    static SWIRL_INLINE T dot(int64_t D, const T* q, const I* key) {
        Vec<T> sums = {};
        int64_t i = 0;
        if constexpr (sizeof(I) == sizeof(T))
            for (; i + W <= D; i += W) sums += load(q + i) * load((const T*)key + i);
        T sum = 0, lanes[W];
        store(lanes, sums);
        for (; i < D; i++) sum += q[i] * widen(key[i]);
        for (int half = W / 2; half; half /= 2)
            for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
        return sum + lanes[0];
    }

    // One sequence's own keys: its weighted values into out (D), their maximum and total.
    void own(const Group& group, int lane, int64_t kv, int64_t window, const I* keys, const I* values, const T* q,
             T* scores, T* out, T& maximum, T& total) const {
        const int64_t D = this->D, n = group.own_length[lane], first = window && n > window ? n - window : 0, count = n - first;
        const Score score = score_of;
        const int32_t* slot = sequences.own_slot + group.row[lane] * sequences.N + first;
        for (int64_t i = 0; i < D; i++) out[i] = 0;
        maximum = -1e30, total = 0;
        for (int64_t t = 0; t < count; t++) scores[t] = dot(D, q, row_of(keys, slot[t], kv));
        for (int64_t t = count; t < round_up(count, W); t++) scores[t] = 0;
        for (int64_t t = 0; t < count; t += W) store(scores + t, score(load(scores + t)));
        for (int64_t t = 0; t < count; t++) maximum = scores[t] > maximum ? scores[t] : maximum;
        for (int64_t t = 0; t < count; t += W) store(scores + t, exp_clamped<T>(load(scores + t) - maximum));
        for (int64_t t = 0; t < count; t++) {
            const I* value = row_of(values, slot[t], kv);
            total += scores[t];
            int64_t i = 0;
            if constexpr (sizeof(I) == sizeof(T))
                for (; i + W <= D; i += W) store(out + i, multiply_add(scores[t], (const T*)value + i, load(out + i)));
            for (; i < D; i++) out[i] += scores[t] * widen(value[i]);
        }
    }

    // Own keys of all lanes of a vector, for one head: out (D, W), and the maxima and totals.
    void own_of_vector(const Group& group, int from, int64_t kv, int64_t window, const I* keys, const I* values, const T* q,
                       T* row, T* scores, T* out, T* maximum, T* total) const {
        const int64_t D = this->D;
        T* own_row = row + round_up(D, LANES);
        for (int lane = 0; lane < W; lane++) {
            bool live = from + lane < group.live;
            for (int64_t i = 0; i < D; i++) row[i] = q[i * LANES + lane], own_row[i] = 0;
            maximum[lane] = -1e30, total[lane] = 0;
            if (live)
                own(group, from + lane, kv, window, keys, values, row, scores, own_row, maximum[lane], total[lane]);
            for (int64_t i = 0; i < D; i++) out[i * W + lane] = own_row[i];
        }
    }

    // Queries (Hq, D, LANES) -> what they attend to, in their place.
    void run(const Group& group, const Seen& seen, int64_t window, const I* keys, const I* values, T* q, T* scratch) const {
        bool any_own = false;
        for (int lane = 0; lane < LANES; lane++) any_own |= group.own_length[lane] > 0;
        for (int v = 0; v < NUM_VECTORS && v * W < group.live; v++)
            for (int64_t kv = 0; kv < Hkv; kv++)
                run_vector(group, v * W, seen.keys[v], seen.count[v], kv, window, any_own, keys, values,
                           q + kv * groups * D * LANES + v * W, scratch);
    }

    void run_vector(const Group& group, int from, const SeenKey* seen, int64_t num_seen, int64_t kv, int64_t window,
                    bool any_own, const I* keys, const I* values, T* q, T* scratch) const {
        T *tile = scratch, *row = tile + num_seen * W, *own_out = row + 2 * round_up(D, LANES);
        T* own_scores = own_out + D * W;
        Int<T> state = load_index<T>(group.state + from);
        Int<T> position = load_index<T>(group.position + from) - Whole<T>(window);
        const int64_t D = this->D, size = D * LANES;
        for (int64_t i = 0; i < groups; i++) {
            Vec<T> top = splat<T>(T(-1e30)), total = {};
            T* query = q + i * size;
            int64_t t = 0;
            for (; t + TOGETHER <= num_seen; t += TOGETHER) dots<TOGETHER>(seen + t, keys, kv, query, tile + t * W);
            for (; t < num_seen; t++) dots<1>(seen + t, keys, kv, query, tile + t * W);
            for (t = 0; t < num_seen; t += KEYS)
                top = scores_of(tile + t * W, seen + t, num_seen - t < KEYS ? num_seen - t : KEYS, state, position,
                                window > 0, top);
            for (t = 0; t < num_seen; t++) {
                Vec<T> x = load(tile + t * W), weight = exp_clamped<T>(x - top);
                weight = x > T(-1e29) ? weight : Vec<T>{};
                total += weight;
                store(tile + t * W, weight);
            }
            Vec<T> tree_share = splat<T>(1), own_share = {};
            if (any_own) {
                T own_maximum[W], own_total[W];
                own_of_vector(group, from, kv, window, keys, values, query, row, own_scores, own_out, own_maximum, own_total);
                Vec<T> of_own = load(own_maximum), both = top > of_own ? top : of_own;
                tree_share = exp_clamped<T>(top - both), own_share = exp_clamped<T>(of_own - both);
                total = total * tree_share + load(own_total) * own_share;
            }
            for (int64_t d = 0; d < size; d += LANES) store(query + d, Vec<T>{});
            for (t = 0; t < num_seen; t += KEYS) {
                int64_t count = num_seen - t < KEYS ? num_seen - t : KEYS, d = 0;
                for (; d + TOGETHER <= D; d += TOGETHER)
                    mix<TOGETHER>(seen + t, count, values, kv, d, tile + t * W, query + d * LANES);
                for (; d < D; d++) mix<1>(seen + t, count, values, kv, d, tile + t * W, query + d * LANES);
            }
            Vec<T> inverse = T(1) / (total > T(0) ? total : splat<T>(1));
            for (int64_t d = 0; d < D; d++) {
                Vec<T> mixed = load(query + d * LANES) * tree_share;
                if (any_own) mixed += load(own_out + d * W) * own_share;
                store(query + d * LANES, mixed * inverse);
            }
        }
    }
};

}  // namespace swirl::SWIRL_ISA
