// LM head and log-prob over tiles of logits, built once per instruction set (SWIRL_ISA names it).
//
// A tile is made transposed, WORDS x BLOCK rows of hidden: the weight is then read as it lies, and maxima and sums run
// down the lanes, one lane a row. Weights, sums and gradients are float32; of bfloat16, the logits take the
// dot-product instruction where there is one, which is exact.
// Forward, a task owns a block of rows and a span of words; the spans of a row are put together at the end. Backward,
// a task owns a block of words, whose d_weight stays in its cache, and walks over all rows, adding to each d_hidden
// when the words before it have done so.
// What a row's sums are made of, and in which order, follows from d and V alone.
#include "linear_log_prob.h"

#include <float.h>

#include "pack.h"
#include "workspace.h"

namespace swirl::SWIRL_ISA {
namespace {

using V = Vec<float>;
constexpr int W = WIDTH<float>;
constexpr int BLOCK = 64, WORDS = 64;  // a tile
constexpr int64_t SPAN = 1024;         // words of a forward task, whole blocks of them

// Where the sums of a block of rows stand over some words: the maximum taken off the logits x, the sum of
// e^(x - maximum), and that of e^(x - maximum) x.
struct Sums {
    float maximum[BLOCK], total[BLOCK], weighted[BLOCK];
};

// What the backward knows of a block of rows; zero past the last row, so that nothing comes of those.
struct Rows {
    float log_z[BLOCK], entropy[BLOCK], d_log_prob[BLOCK], d_entropy[BLOCK];
    int32_t target[BLOCK], turn;  // blocks of words that have added to d_hidden
};

// I input, E what the logits are made of.
template <class I, class E> struct Head {
    const LinearLogProb& p;
    const int64_t steps;    // elements of E in a row of d
    const int64_t columns;  // d rounded up to whole panels
    const int64_t row_blocks, word_blocks, spans;
    const float cap, to_tanh;

    explicit Head(const LinearLogProb& p)
        : p(p), steps(steps_of<E>(p.d)), columns(round_up(p.d, PANEL<float>)), row_blocks((p.M + BLOCK - 1) / BLOCK),
          word_blocks((p.V + WORDS - 1) / WORDS), spans((p.V + SPAN - 1) / SPAN), cap(p.softcap),
          to_tanh(p.softcap > 0 ? 2 / p.softcap : 0) {}

    int64_t words_in(int64_t block) const { return p.V - block * WORDS < WORDS ? p.V - block * WORDS : WORDS; }
    int64_t rows_in(int64_t block) const { return p.M - block * BLOCK < BLOCK ? p.M - block * BLOCK : BLOCK; }
    const I* words_at(int64_t block) const { return (const I*)p.weight + block * WORDS * p.d; }
    const I* rows_at(int64_t block) const { return (const I*)p.hidden + block * BLOCK * p.d; }

    // A block of hidden as the right-hand side of the logits.
    void pack_hidden(int64_t block, E* rows, E* turned) const {
        pack_rows(rows_at(block), p.d, rows_in(block), BLOCK, p.d, rows);
        pack_turned<float>(rows, BLOCK, steps, turned + block * BLOCK * steps);
    }
    // Raw dots, words x rows.
    void make_tile(const E* words, int64_t live, const E* turned, float* tile) const {
        product<E, float>(round_up(live, ROWS), BLOCK, steps, words, steps, 1, turned, tile, BLOCK, false);
    }

    // The cap bounds the logits, so that no maximum need be taken off before the exponential: 256k e^64 is within range.
    bool fixed_maximum() const { return p.softcap > 0 && p.softcap <= 64; }

    // Raw dots -> logits, adding their weights to the sums.
    template <bool CAP, bool FIXED, bool ENTROPY> void weigh(float* tile, int64_t live, Sums& sums) const {
        for (int lane = 0; lane < BLOCK; lane += W) {
            V total = {}, weighted = {}, top = {}, shrink = splat(1.0f);
            float* end = tile + live * BLOCK + lane;
            if (!FIXED) {
                V before = load(sums.maximum + lane);
                top = before;
                for (float* at = tile + lane; at < end; at += BLOCK) {
                    V logit = CAP ? tanh_of_half<float>(load(at) * to_tanh) * cap : load(at);
                    top = logit > top ? logit : top;
                    store(at, logit);
                }
                shrink = exp_clamped<float>(before - top);
                store(sums.maximum + lane, top);
            }
            for (float* at = tile + lane; at < end; at += BLOCK) {
                V logit = load(at);
                if (FIXED) {
                    logit = tanh_of_half<float>(logit * to_tanh) * cap;
                    store(at, logit);
                }
                V weight = FIXED ? exp_in_range<float>(logit) : exp_clamped<float>(logit - top);
                total += weight;
                if (ENTROPY) weighted += weight * logit;
            }
            store(sums.total + lane, load(sums.total + lane) * shrink + total);
            if (ENTROPY) store(sums.weighted + lane, load(sums.weighted + lane) * shrink + weighted);
        }
    }
    void weigh(float* tile, int64_t live, Sums& sums) const {
        if (fixed_maximum())
            p.with_entropy ? weigh<true, true, true>(tile, live, sums) : weigh<true, true, false>(tile, live, sums);
        else if (p.softcap > 0)
            p.with_entropy ? weigh<true, false, true>(tile, live, sums) : weigh<true, false, false>(tile, live, sums);
        else
            p.with_entropy ? weigh<false, false, true>(tile, live, sums) : weigh<false, false, false>(tile, live, sums);
    }

    void forward_task(int64_t block, int64_t span, const E* turned, Sums& sums, char* scratch) const {
        float* tile = (float*)scratch;
        E* words = (E*)(tile + WORDS * BLOCK);
        int64_t first = span * (SPAN / WORDS), last = first + SPAN / WORDS;
        for (int i = 0; i < BLOCK; i++)
            sums.maximum[i] = fixed_maximum() ? 0 : -FLT_MAX, sums.total[i] = sums.weighted[i] = 0;
        for (int64_t word = first; word < last && word < word_blocks; word++) {
            int64_t live = words_in(word);
            pack_rows(words_at(word), p.d, live, WORDS, p.d, words);
            make_tile(words, live, turned + block * BLOCK * steps, tile);
            weigh(tile, live, sums);
            for (int64_t i = 0; i < rows_in(block); i++) {
                int64_t at = p.target[block * BLOCK + i] - word * WORDS;
                if (0 <= at && at < live) p.log_prob[block * BLOCK + i] = tile[at * BLOCK + i];
            }
        }
    }

    // The spans of a block of rows put together; in float64, lest the log-prob of a sure word be lost in the rounding
    // of log_z. log_prob holds the target's logit until here.
    void finish(int64_t block, const Sums* of_span) const {
        for (int64_t i = 0, row = block * BLOCK; i < rows_in(block); i++, row++) {
            double top = of_span[0].maximum[i], total = 0, weighted = 0;
            for (int64_t s = 1; s < spans; s++) top = of_span[s].maximum[i] > top ? of_span[s].maximum[i] : top;
            for (int64_t s = 0; s < spans; s++) {
                double shrink = exp(of_span[s].maximum[i] - top);
                total += of_span[s].total[i] * shrink;
                weighted += of_span[s].weighted[i] * shrink;
            }
            double log_z = top + log(total);
            p.log_z[row] = log_z;
            p.log_prob[row] = p.log_prob[row] - log_z;
            if (p.with_entropy) p.entropy[row] = log_z - weighted / total;
        }
    }

    bool forward() const {
        size_t turned_bytes = round_up(row_blocks * BLOCK * steps * sizeof(E), 4096);
        size_t sums_bytes = round_up(row_blocks * spans * sizeof(Sums), 4096);
        size_t scratch_bytes = round_up(WORDS * BLOCK * sizeof(float) + WORDS * steps * sizeof(E), 4096);
        char* memory = acquire(turned_bytes + sums_bytes + scratch_bytes * p.threads);
        if (!memory) return false;
        E* turned = (E*)memory;
        Sums* sums = (Sums*)(memory + turned_bytes);
        int next_thread = 0;
#pragma omp parallel num_threads(p.threads)
        {
            char* scratch = memory + turned_bytes + sums_bytes +
                            scratch_bytes * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < row_blocks; block++) pack_hidden(block, (E*)scratch, turned);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < row_blocks * spans; i++) {  // rows first: they share the words that were just read
                int64_t block = i % row_blocks, span = i / row_blocks;
                forward_task(block, span, turned, sums[block * spans + span], scratch);
            }
#pragma omp for schedule(static)
            for (int64_t block = 0; block < row_blocks; block++) finish(block, sums + block * spans);
        }
        release(memory);
        return true;
    }

    // Raw dots -> dLoss / d(raw dot).
    template <bool CAP, bool ENTROPY>
    void differentiate(float* tile, int64_t word, int64_t live, const Rows& rows) const {
        for (int lane = 0; lane < BLOCK; lane += W) {
            V log_z = load(rows.log_z + lane), d_log_prob = load(rows.d_log_prob + lane);
            V entropy = load(rows.entropy + lane), d_entropy = load(rows.d_entropy + lane);
            Int<float> target = load_index<float>(rows.target + lane) - int32_t(word * WORDS);
            float* at = tile + lane;
            for (int32_t j = 0; j < live; j++, at += BLOCK) {
                V logit = load(at), slope;
                if (CAP) logit = tanh_of_half<float>(logit * to_tanh, &slope) * cap;
                V log_p = logit - log_z, d = d_log_prob;
                if (ENTROPY) d += d_entropy * (log_p + entropy);  // dH / d logit = -p (log p + H)
                d *= -exp_clamped<float>(log_p);
                d = target == j ? d + d_log_prob : d;
                store(at, CAP ? d * slope : d);
            }
        }
    }

    struct Backward {
        E* turned;             // [row_blocks][BLOCK / PANEL][steps][PANEL]
        float* hidden_panels;  // [row_blocks][columns / PANEL][BLOCK][PANEL]
        float* d_hidden;       // [row_blocks][BLOCK][columns]
        Rows* rows;            // [row_blocks]
    };

    void prepare(const Backward& b, int64_t block, E* scratch) const {
        pack_hidden(block, scratch, b.turned);
        if (p.d_weight)
            pack_panels(rows_at(block), p.d, rows_in(block), BLOCK, p.d, b.hidden_panels + block * BLOCK * columns);
        Rows& rows = b.rows[block];
        memset(&rows, 0, sizeof(rows));
        for (int64_t i = 0, row = block * BLOCK; i < rows_in(block); i++, row++) {
            rows.log_z[i] = p.log_z[row], rows.d_log_prob[i] = p.d_log_prob[row], rows.target[i] = p.target[row];
            if (p.with_entropy) rows.entropy[i] = p.entropy[row], rows.d_entropy[i] = p.d_entropy[row];
        }
    }

    void backward_task(const Backward& b, int64_t word, char* scratch) const {
        float *tile = (float*)scratch, *d_weight = tile + WORDS * BLOCK, *word_panels = d_weight + WORDS * columns;
        E* words = (E*)(word_panels + WORDS * columns);
        int64_t live = words_in(word);
        pack_rows(words_at(word), p.d, live, WORDS, p.d, words);
        if (p.d_hidden) pack_panels(words_at(word), p.d, live, live, p.d, word_panels);
        for (int64_t block = 0; block < row_blocks; block++) {
            make_tile(words, live, b.turned + block * BLOCK * steps, tile);
            Rows& rows = b.rows[block];
            if (p.softcap > 0)
                p.with_entropy ? differentiate<true, true>(tile, word, live, rows)
                               : differentiate<true, false>(tile, word, live, rows);
            else
                p.with_entropy ? differentiate<false, true>(tile, word, live, rows)
                               : differentiate<false, false>(tile, word, live, rows);
            if (p.d_weight)
                product<float, float>(round_up(live, ROWS), columns, BLOCK, tile, BLOCK, 1,
                                      b.hidden_panels + block * BLOCK * columns, d_weight, columns, block > 0);
            if (!p.d_hidden) continue;
            // Tasks are handed out in the order of their words, so that the one waited for is always under way.
            wait_for(&rows.turn, word);
            product<float, float>(BLOCK, columns, live, tile, 1, BLOCK, word_panels,
                                  b.d_hidden + block * BLOCK * columns, columns, word > 0);
            __atomic_store_n(&rows.turn, word + 1, __ATOMIC_RELEASE);
        }
        if (p.d_weight) unpack(d_weight, live, (I*)p.d_weight + word * WORDS * p.d);
    }
    void unpack(const float* from, int64_t live, I* to) const {
        for (int64_t row = 0; row < live; row++, from += columns, to += p.d)
            for (int64_t i = 0; i < p.d; i++) narrow(from[i], to[i]);
    }

    bool backward() const {
        size_t turned_bytes = round_up(row_blocks * BLOCK * steps * sizeof(E), 4096);
        size_t wide_bytes = round_up(row_blocks * BLOCK * columns * sizeof(float), 4096);
        size_t rows_bytes = round_up(row_blocks * sizeof(Rows), 4096);
        size_t scratch_bytes = round_up(
            (WORDS * BLOCK + 2 * WORDS * columns) * sizeof(float) + WORDS * steps * sizeof(E), 4096);
        size_t scratch_at = turned_bytes + 2 * wide_bytes + rows_bytes;
        char* memory = acquire(scratch_at + scratch_bytes * p.threads);
        if (!memory) return false;
        Backward b;
        b.turned = (E*)memory;
        b.hidden_panels = (float*)(memory + turned_bytes);
        b.d_hidden = (float*)(memory + turned_bytes + wide_bytes);
        b.rows = (Rows*)(memory + turned_bytes + 2 * wide_bytes);
        int next_thread = 0;
        int64_t next_task = 0;
#pragma omp parallel num_threads(p.threads)
        {
            char* scratch = memory + scratch_at + scratch_bytes * __atomic_fetch_add(&next_thread, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(static)
            for (int64_t block = 0; block < row_blocks; block++) prepare(b, block, (E*)scratch);
            for (int64_t i; (i = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < word_blocks;)
                backward_task(b, i, scratch);
#pragma omp barrier
            if (p.d_hidden) {
#pragma omp for schedule(static)
                for (int64_t block = 0; block < row_blocks; block++)
                    unpack(b.d_hidden + block * BLOCK * columns, rows_in(block), (I*)p.d_hidden + block * BLOCK * p.d);
            }
        }
        release(memory);
        return true;
    }
};

template <class Run> bool with_dtype(const LinearLogProb& p, Run run) {
    if (p.dtype == Dtype::float32) return run(Head<float, float>(p));
#if defined(__AVX512BF16__)
    return run(Head<Bfloat16, Pair>(p));
#else
    return run(Head<Bfloat16, float>(p));
#endif
}

}  // namespace

bool linear_log_prob_fwd(const LinearLogProb& p) {
    return with_dtype(p, [](const auto& head) { return head.forward(); });
}
bool linear_log_prob_bwd(const LinearLogProb& p) {
    return with_dtype(p, [](const auto& head) { return head.backward(); });
}

}  // namespace swirl::SWIRL_ISA
