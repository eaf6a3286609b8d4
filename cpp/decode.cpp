// Whole steps of the model for many sequences at once: no thread waits for another from the first token of a call to
// its last, since a sequence's tokens follow from its own alone. A thread takes a few groups of sixteen sequences
// (tree_attend.h) through all layers, so that a weight is read once for all of them.
#include "tree_attend.h"
#include "workspace.h"

namespace swirl::SWIRL_ISA {
namespace {

constexpr int MOST_GROUPS = 4;      // that a thread takes together
constexpr int64_t ROWS_AT_A_TIME = 48, COLUMNS_AT_A_TIME = 768;  // of a weight, for all groups in turn
constexpr int64_t CHUNK = 1024;     // of the vocabulary, whose weights are summed in T and then in double

// I what weights, keys and values are held in, T what is computed in. Every op's result is rounded to I, as the layers in
// torch round it: a sampler that rounds less is further from the log-probs that the trainer computes. Logits never are.
template <class I, class T> struct Decoder {
    const Decode& p;
    const Attention<I, T> attention;
    const int64_t q_rows, kv_rows, logits_rows, most_keys;
    int64_t window;  // of the layers that have one

    explicit Decoder(const Decode& p)
        : p(p), attention(p.Hq, p.Hkv, p.D, p.scale, p.softcap, p.sequences), q_rows(p.Hq * p.D),
          kv_rows(p.Hkv * p.D), logits_rows(p.prefilled ? 0 : p.draw.V),
          most_keys(p.hidden ? 0 : attention.most_keys()), window(0) {
        for (int64_t i = 0; i < p.num_layers; i++)
            if (p.layers[i].window) window = p.layers[i].window;
    }

    // What one group works with.
    struct Work {
        T *x, *h, *q, *k, *v, *gate, *up, *logits, *cos, *sin;
        SeenKey* lists;
        typename Attention<I, T>::Seen seen, near;  // of layers without and with a window
        bool running;
        bool live[LANES];
        int64_t token[LANES];
    };

    int64_t sizes(Work* w, T* memory) const {
        int64_t used = 0, wide = p.draw.d > q_rows ? p.draw.d : q_rows;
        auto take = [&](T*& to, int64_t rows) {
            to = memory + used;
            used += rows * LANES;
        };
        take(w->x, p.draw.d), take(w->h, wide), take(w->q, q_rows), take(w->k, kv_rows), take(w->v, kv_rows);
        take(w->gate, p.F), take(w->up, p.F), take(w->logits, logits_rows);
        take(w->cos, p.D / 2), take(w->sin, p.D / 2);
        return used;
    }

    // A block of a weight, widened in scratch where I is narrower than T: once for all groups.
    struct Block {
        const T* at;
        int64_t row;  // from row to row
    };
    Block widened(const I* from, int64_t from_row, int64_t rows, int64_t columns, T* scratch) const {
        if constexpr (sizeof(I) == sizeof(T)) return {(const T*)from, from_row};
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < columns; i++) scratch[row * columns + i] = widen(from[row * from_row + i]);
        return {scratch, columns};
    }

    // y = W x for every group, W (rows, columns), not rounded.
    template <class In, class Out>
    void product(const void* weight, int64_t rows, int64_t columns, Work* work, int count, T* scratch, In in, Out out) const {
        for (int64_t row = 0; row < rows; row += ROWS_AT_A_TIME) {
            int64_t some = rows - row < ROWS_AT_A_TIME ? rows - row : ROWS_AT_A_TIME;
            for (int64_t column = 0; column < columns; column += COLUMNS_AT_A_TIME) {
                int64_t wide = columns - column < COLUMNS_AT_A_TIME ? columns - column : COLUMNS_AT_A_TIME;
                Block block = widened((const I*)weight + row * columns + column, columns, some, wide, scratch);
                for (int g = 0; g < count; g++)
                    if (work[g].running)
                        lane_product(some, wide, block.at, block.row, in(work[g]) + column * LANES,
                                     out(work[g]) + row * LANES, column > 0);
            }
        }
    }

    template <class In, class Out>
    void project(const void* weight, int64_t rows, int64_t columns, Work* work, int count, T* scratch, In in, Out out) const {
        product(weight, rows, columns, work, count, scratch, in, out);
        for (int g = 0; g < count; g++)
            if (work[g].running) lane_round<I>(rows, out(work[g]));
    }

    void embed(const Group& group, Work& w) const {
        for (int lane = 0; lane < LANES; lane++) {
            const I* from = (const I*)p.draw.embedding + w.token[lane] * p.draw.d;
            for (int64_t i = 0; i < p.draw.d; i++) w.x[i * LANES + lane] = widen(from[i]) * T(p.embed_scale);
        }
        lane_round<I>(p.draw.d, w.x);
    }

    void rotate(const Group& group, const DecodeLayer& layer, Work& w) const {
        int64_t half = p.D / 2;
        for (int lane = 0; lane < LANES; lane++)
            for (int64_t i = 0, at = group.position[lane] * half; i < half; i++) {
                w.cos[i * LANES + lane] = ((const T*)layer.cos)[at + i];
                w.sin[i * LANES + lane] = ((const T*)layer.sin)[at + i];
            }
        int64_t size = p.D * LANES;
        for (int64_t head = 0; head < p.Hq; head++) {
            if (layer.q_norm) lane_norm<T>(p.D, w.q + head * size, (const I*)layer.q_norm, T(p.eps), w.q + head * size, false);
            lane_rope<I>(p.D, w.q + head * size, w.cos, w.sin);
        }
        for (int64_t head = 0; head < p.Hkv; head++) {
            if (layer.k_norm) lane_norm<T>(p.D, w.k + head * size, (const I*)layer.k_norm, T(p.eps), w.k + head * size, false);
            lane_rope<I>(p.D, w.k + head * size, w.cos, w.sin);
        }
    }

    void keep(const Group& group, const DecodeLayer& layer, const Work& w) const {
        for (int lane = 0; lane < group.live; lane++) {
            if (!w.live[lane]) continue;
            int64_t own = group.row[lane] * p.sequences.N + group.own_length[lane] - 1;
            int64_t at = (p.prefilled ? p.sequences.slot[group.state[lane]] : p.sequences.own_slot[own]) * kv_rows;
            for (int64_t i = 0; i < kv_rows; i++) narrow(w.k[i * LANES + lane], ((I*)layer.keys)[at + i]);
            for (int64_t i = 0; i < kv_rows; i++) narrow(w.v[i * LANES + lane], ((I*)layer.values)[at + i]);
        }
    }

    // x -> queries, and new keys and values into the pools.
    void before_attention(const DecodeLayer& l, const Group* group, Work* work, int count, T* scratch) const {
        int64_t d = p.draw.d;
        auto h = [](Work& w) { return w.h; };
        for (int g = 0; g < count; g++)
            if (work[g].running) lane_norm<I>(d, work[g].x, (const I*)l.input_norm, T(p.eps), work[g].h, false);
        project(l.q, q_rows, d, work, count, scratch, h, [](Work& w) { return w.q; });
        project(l.k, kv_rows, d, work, count, scratch, h, [](Work& w) { return w.k; });
        project(l.v, kv_rows, d, work, count, scratch, h, [](Work& w) { return w.v; });
        for (int g = 0; g < count; g++)
            if (work[g].running) rotate(group[g], l, work[g]), keep(group[g], l, work[g]);
    }

    // Queries -> attention, and the rest of the layer, into x.
    void from_attention(const DecodeLayer& l, const Group* group, Work* work, int count, T* scratch) const {
        int64_t d = p.draw.d;
        auto h = [](Work& w) { return w.h; };
        auto gate = [](Work& w) { return w.gate; };
        auto each = [&](auto run) {
            for (int g = 0; g < count; g++)
                if (work[g].running) run(group[g], work[g]);
        };
        each([&](const Group& group, Work& w) {
            attention.run(group, l.window ? w.near : w.seen, l.window, (const I*)l.keys, (const I*)l.values, w.q, scratch);
            lane_round<I>(q_rows, w.q);
        });
        project(l.o, d, q_rows, work, count, scratch, [](Work& w) { return w.q; }, h);
        each([&](const Group&, Work& w) {
            lane_norm<I>(d, w.h, (const I*)l.attention_norm, T(p.eps), w.x, true);
            lane_norm<I>(d, w.x, (const I*)l.mlp_norm, T(p.eps), w.h, false);
        });
        project(l.gate, p.F, d, work, count, scratch, h, gate);
        project(l.up, p.F, d, work, count, scratch, h, [](Work& w) { return w.up; });
        each([&](const Group&, Work& w) { lane_geglu<I>(p.F, w.gate, w.up); });
        project(l.down, d, p.F, work, count, scratch, gate, h);
        each([&](const Group&, Work& w) { lane_norm<I>(d, w.h, (const I*)l.output_norm, T(p.eps), w.x, true); });
    }

    // From logits, softcap not yet applied, the next token of each lane: the first whose cumulative probability passes
    // the uniform. At temperature 0 the largest logit's, its log-prob that of temperature 1.
    void draw(Group& group, Work& w, int64_t step, double* sums) const {
        const Draw& how = p.draw;
        T top[LANES], to_weight[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            double temperature = how.temperature[group.row[lane]];
            to_weight[lane] = temperature == 0 ? T(1) : T(1 / (temperature > 1e-37 ? temperature : 1e-37));
        }
        T to_tanh = how.softcap > 0 ? T(2 / how.softcap) : T(0), cap = T(how.softcap);
        for (int lane = 0; lane < LANES; lane += WIDTH<T>) {
            Vec<T> most = splat<T>(T(-1e30));
            for (int64_t i = 0; i < how.V; i++) {
                T* at = w.logits + i * LANES + lane;
                Vec<T> x = load(at);
                if (cap > 0) {
                    x = tanh_of_half<T>(x * to_tanh) * cap;
                    store(at, x);
                }
                most = x > most ? x : most;
            }
            store(top + lane, most);
        }
        for (int64_t first = 0; first < how.V; first += CHUNK) {
            int64_t last = first + CHUNK < how.V ? first + CHUNK : how.V;
            for (int lane = 0; lane < LANES; lane += WIDTH<T>) {
                Vec<T> sum = {}, most = load(top + lane), factor = load(to_weight + lane);
                for (int64_t i = first; i < last; i++) {
                    T* at = w.logits + i * LANES + lane;
                    Vec<T> weight = exp_clamped<T>((load(at) - most) * factor);
                    sum += weight;
                    store(at, weight);
                }
                for (int i = 0; i < WIDTH<T>; i++) sums[first / CHUNK * LANES + lane + i] = sum[i];
            }
        }
        w.running = false;
        for (int lane = 0; lane < group.live; lane++) {
            if (!w.live[lane]) continue;
            int64_t row = group.row[lane], num_chunks = (how.V + CHUNK - 1) / CHUNK;
            double total = 0;
            for (int64_t c = 0; c < num_chunks; c++) total += sums[c * LANES + lane];
            int64_t drawn = 0;
            T weight = 0;
            auto weight_of = [&](int64_t i) { return w.logits[i * LANES + lane]; };
            if (how.temperature[row] == 0) {
                for (int64_t i = 0; i < how.V; i++)
                    if (weight_of(i) > weight) weight = weight_of(i), drawn = i;
            } else {
                double left = how.uniform[row * how.steps + step] * total;
                int64_t c = 0;
                for (; c + 1 < num_chunks && sums[c * LANES + lane] <= left; c++) left -= sums[c * LANES + lane];
                int64_t end = (c + 1) * CHUNK < how.V ? (c + 1) * CHUNK : how.V;
                for (int64_t i = c * CHUNK; i < end; i++) {
                    if (weight_of(i) > 0) drawn = i, weight = weight_of(i);
                    left -= weight_of(i);
                    if (left < 0) break;
                }
            }
            int64_t at = row * how.steps + how.count[row]++;
            how.ids[at] = w.token[lane] = drawn;
            how.log_prob[at] = log((double)weight) - log(total);
            if (!(total == total)) how.log_prob[at] = total;
            w.live[lane] = !how.is_stop[drawn] && how.count[row] < how.limit[row];
            w.running |= w.live[lane];
        }
    }

    void head(Group* group, Work* work, int count, int64_t step, T* scratch, double* sums) const {
        product(p.draw.embedding, p.draw.V, p.draw.d, work, count, scratch, [](Work& w) { return w.h; },
                [](Work& w) { return w.logits; });
        for (int g = 0; g < count; g++)
            if (work[g].running) draw(group[g], work[g], step, sums);
    }

    void list(const Group& group, Work& w) const {
        attention.list(group, 0, p.draw.steps, most_keys, w.lists, w.seen);
        if (window) attention.list(group, window, p.draw.steps, most_keys, w.lists + VECTORS<T> * most_keys, w.near);
    }

    // A part of prefill: what lies between two layers' new keys, `layer` -1 before the first of them.
    void prefill_bundle(int64_t layer, const Group* group, Work* work, int count, T* scratch) const {
        for (int g = 0; g < count; g++) {
            work[g].running = true;
            for (int lane = 0; lane < LANES; lane++) {
                work[g].live[lane] = lane < group[g].live;
                work[g].token[lane] = p.token[group[g].row[lane]];
            }
            if (layer < 0) embed(group[g], work[g]);
            else list(group[g], work[g]);
        }
        if (layer >= 0) from_attention(p.layers[layer], group, work, count, scratch);
        if (layer + 1 < p.num_layers) return before_attention(p.layers[layer + 1], group, work, count, scratch);
        for (int g = 0; g < count; g++) {
            lane_norm<I>(p.draw.d, work[g].x, (const I*)p.final_norm, T(p.eps), work[g].h, false);
            for (int lane = 0; lane < group[g].live; lane++)
                for (int64_t i = 0; i < p.draw.d; i++)
                    narrow(work[g].h[i * LANES + lane], ((I*)p.prefilled)[group[g].row[lane] * p.draw.d + i]);
        }
    }

    void run_bundle(Group* group, Work* work, int count, T* scratch, double* sums) const {
        for (int g = 0; g < count; g++) {
            work[g].running = true;
            for (int lane = 0; lane < LANES; lane++) {
                int64_t row = group[g].row[lane];
                work[g].live[lane] = lane < group[g].live && p.draw.limit[row] > 0;
                if (p.hidden)
                    for (int64_t i = 0; i < p.draw.d; i++)
                        work[g].h[i * LANES + lane] = widen(((const I*)p.hidden)[row * p.draw.d + i]);
                else
                    work[g].token[lane] = p.token[row];
            }
        }
        if (p.hidden) return head(group, work, count, 0, scratch, sums);
        for (int g = 0; g < count; g++) list(group[g], work[g]);
        for (int64_t step = 0; step < p.draw.steps; step++) {
            bool running = false;
            for (int g = 0; g < count; g++) {
                if (!work[g].running) continue;
                running = true;
                for (int lane = 0; lane < LANES; lane++)  // one that has stopped goes over its last place again
                    if (work[g].live[lane]) group[g].own_length[lane]++, group[g].position[lane]++;
                embed(group[g], work[g]);
            }
            if (!running) return;
            for (int64_t l = 0; l < p.num_layers; l++) {
                before_attention(p.layers[l], group, work, count, scratch);
                from_attention(p.layers[l], group, work, count, scratch);
            }
            for (int g = 0; g < count; g++)
                if (work[g].running)
                    lane_norm<I>(p.draw.d, work[g].x, (const I*)p.final_norm, T(p.eps), work[g].h, false);
            head(group, work, count, step, scratch, sums);
        }
    }

    bool run() const {
        int64_t groups = (p.sequences.B + LANES - 1) / LANES, threads = p.threads < groups ? p.threads : groups;
        int64_t together = (groups + threads - 1) / threads;
        together = together < MOST_GROUPS ? together : MOST_GROUPS;
        int64_t bundles = (groups + together - 1) / together;
        Work probe;
        size_t group_bytes = round_up(sizes(&probe, nullptr) * sizeof(T) + 2 * VECTORS<T> * sizeof(SeenKey) * most_keys, 64);
        size_t sums_bytes = round_up((p.draw.V + CHUNK - 1) / CHUNK * LANES * sizeof(double), 64);
        int64_t to_attend = attention.scratch_size(most_keys), to_widen = ROWS_AT_A_TIME * COLUMNS_AT_A_TIME;
        size_t scratch_bytes = (sizeof(I) < sizeof(T) && to_widen > to_attend ? to_widen : to_attend) * sizeof(T);
        size_t thread_bytes = round_up(group_bytes * together + sums_bytes + scratch_bytes, 4096);
        size_t between = (p.draw.d + q_rows) * LANES;  // what prefill keeps of a group from layer to layer: x and q
        char* memory = acquire(thread_bytes * threads + (p.prefilled ? groups * between * sizeof(T) : 0));
        if (!memory) return false;
        T* kept = (T*)(memory + thread_bytes * threads);
        int next_thread = 0;
#pragma omp parallel num_threads(threads)
        {
            char* mine = memory + thread_bytes * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
            Work work[MOST_GROUPS];
            for (int g = 0; g < together; g++, mine += group_bytes) {
                int64_t used = sizes(work + g, (T*)mine);
                work[g].lists = (SeenKey*)((T*)mine + used);
            }
            double* sums = (double*)mine;
            T* scratch = (T*)(mine + sums_bytes);
            for (int64_t layer = -1; layer < (p.prefilled ? p.num_layers : 0); layer++) {
#pragma omp for schedule(dynamic)
                for (int64_t bundle = bundles - 1; bundle >= 0; bundle--) {  // later states see more keys: they go first
                    int64_t first = bundle * together;
                    int count = groups - first < together ? groups - first : together;
                    Group members[MOST_GROUPS] = {{p.sequences, first}, {p.sequences, first}, {p.sequences, first}, {p.sequences, first}};
                    for (int g = 1; g < count; g++) members[g] = Group(p.sequences, first + g);
                    for (int g = 0; g < count && p.prefilled; g++)
                        work[g].x = kept + (first + g) * between, work[g].q = work[g].x + p.draw.d * LANES;
                    if (p.prefilled) prefill_bundle(layer, members, work, count, scratch);
                    else run_bundle(members, work, count, scratch, sums);
                }
            }
        }
        release(memory);
        return true;
    }
};

}  // namespace

bool decode(const Decode& p) {
    if (p.dtype == Dtype::float64) return Decoder<double, double>(p).run();
    if (p.dtype == Dtype::float32) return Decoder<float, float>(p).run();
    return Decoder<Bfloat16, float>(p).run();
}

}  // namespace swirl::SWIRL_ISA
