// swirl.kernels._cpu: checks what Python hands over, plans the live tiles once per call, and picks the instruction set.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "module.h"

namespace {

using swirl::Dtype;
using swirl::Geglu;
using swirl::Linear;
using swirl::LinearLogProb;
using swirl::NormRope;
using swirl::Problem;
using swirl::RmsNorm;
using swirl::Rope;
using swirl::Tile;

#define SWIRL_OPS(isa)                                                                                    \
    #isa, swirl::isa::tree_attention_fwd, swirl::isa::tree_attention_bwd, swirl::isa::linear_fwd,         \
        swirl::isa::linear_dx, swirl::isa::linear_dw, swirl::isa::linear_log_prob_fwd,                    \
        swirl::isa::linear_log_prob_bwd, swirl::isa::rms_norm_fwd, swirl::isa::rms_norm_bwd,              \
        swirl::isa::geglu_fwd, swirl::isa::geglu_bwd, swirl::isa::rope, swirl::isa::norm_rope_fwd,        \
        swirl::isa::norm_rope_bwd, swirl::isa::tree_decode, swirl::isa::decode

#if defined(SWIRL_X86)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first. SWIRL_X86 is set where the compiler builds the x86 sets.
const Isa ISAS[] = {
#if defined(SWIRL_X86)
    {SWIRL_OPS(avx512_bf16), [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
    {SWIRL_OPS(avx512), has_avx512},
    {SWIRL_OPS(avx2), [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {SWIRL_OPS(plain), [] { return true; }},
};

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Isa& isa : ISAS)
        if (isa.here()) names.push_back(isa.name);
    return names;
}

}  // namespace

const Isa& pick(const std::string& name) {
    for (const Isa& isa : ISAS)
        if (isa.here() && (name.empty() || name == isa.name)) return isa;
    std::string message = "this CPU and build have no instruction set '" + name + "'; choose from";
    for (const std::string& here : isas()) message += " " + here;
    throw std::invalid_argument(message);
}

Dtype dtype_of(const Tensor& x) {
    if (x.dtype() == nb::dtype<float>()) return Dtype::float32;
    if (x.dtype() == nb::dtype<double>()) return Dtype::float64;
    nb::dlpack::dtype type = x.dtype();
    if (type.code == (uint8_t)nb::dlpack::dtype_code::Bfloat && type.bits == 16) return Dtype::bfloat16;
    throw std::invalid_argument("tensors must be float32, float64 or bfloat16");
}

void expect(const Tensor& x, nb::dlpack::dtype dtype, std::initializer_list<size_t> shape, const char* name) {
    bool fits = x.dtype() == dtype && x.ndim() == shape.size();
    for (size_t i = 0; fits && i < shape.size(); i++) fits = x.shape(i) == shape.begin()[i];
    if (!fits) throw std::invalid_argument(std::string(name) + " has not the shape or dtype that goes with the rest");
}

namespace {

float* float_data(const Tensor& x, std::initializer_list<size_t> shape, const char* name) {
    expect(x, nb::dtype<float>(), shape, name);
    return (float*)x.data();
}

// The mask by block, padded to whole blocks, and the live tiles. Owns what the Problem points to.
struct Plan {
    std::vector<int32_t> end, position, limit;
    std::vector<Tile> tiles;
    std::vector<int64_t> first;

    Plan(Problem& p, const int32_t* subtree_end, const int32_t* position_ids, int64_t window, bool by_key) {
        int64_t padded = p.num_blocks * p.block;
        end.assign(padded, 0), position.assign(padded, 0), limit.assign(padded, 0);
        constexpr int64_t most = std::numeric_limits<int32_t>::max();
        for (int64_t i = 0; i < p.T; i++) {
            end[i] = subtree_end[i];
            position[i] = position_ids[i];
            limit[i] = window ? (int32_t)std::min<int64_t>(position_ids[i] + window, most) : (int32_t)most;
        }
        struct Range {
            int32_t low, high;
        };
        auto ranges = [&](const std::vector<int32_t>& values) {  // over tokens before T
            std::vector<Range> result(p.num_blocks);
            for (int64_t b = 0; b < p.num_blocks; b++) {
                auto [low, high] = std::minmax_element(values.begin() + b * p.block,
                                                       values.begin() + std::min<int64_t>((b + 1) * p.block, p.T));
                result[b] = {*low, *high};
            }
            return result;
        };
        std::vector<Range> ends = ranges(end), positions = ranges(position), limits = ranges(limit);
        for (int64_t query = 0; query < p.num_blocks; query++) {
            int64_t q0 = query * p.block, turn = 0;
            for (int64_t key = 0; key <= query; key++) {
                bool dead = ends[key].high <= q0 || (window && positions[query].low >= limits[key].high);
                if (dead && key < query) continue;  // the diagonal always counts, so that no output is left unwritten
                bool full = key < query && ends[key].low >= q0 + p.block && positions[query].high < limits[key].low;
                tiles.push_back({(int32_t)query, (int32_t)key, (int32_t)turn++, full});
            }
        }
        if (by_key)
            std::stable_sort(tiles.begin(), tiles.end(),
                             [](const Tile& a, const Tile& b) { return a.key_block < b.key_block; });
        first.assign(p.num_blocks + 1, 0);
        for (const Tile& tile : tiles) first[(by_key ? tile.key_block : tile.query_block) + 1]++;
        for (int64_t b = 0; b < p.num_blocks; b++) first[b + 1] += first[b];
        p.end = end.data(), p.position = position.data(), p.limit = limit.data();
        p.tiles = tiles.data(), p.first = first.data();
    }
};

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& subtree_end,
                   const Tensor& position_ids, double scale, double softcap, int64_t window, int threads) {
    if (q.ndim() != 3 || k.ndim() != 3) throw std::invalid_argument("q, k and v must be (T, H, D)");
    Problem p = {};
    p.dtype = dtype_of(q);
    p.T = q.shape(0), p.Hq = q.shape(1), p.D = q.shape(2), p.Hkv = k.shape(1);
    size_t T = p.T, D = p.D, Hkv = p.Hkv;
    expect(k, q.dtype(), {T, Hkv, D}, "k");
    expect(v, q.dtype(), {T, Hkv, D}, "v");
    expect(subtree_end, nb::dtype<int32_t>(), {T}, "subtree_end");
    expect(position_ids, nb::dtype<int32_t>(), {T}, "position_ids");
    if (Hkv == 0 || p.Hq % p.Hkv || p.T >= std::numeric_limits<int32_t>::max() - 64)
        throw std::invalid_argument("query heads must be a multiple of key heads, and T fit in 31 bits");
    if (softcap < 0 || window < 0 || threads < 1) throw std::invalid_argument("softcap, window or threads below range");
    p.block = p.D <= 64 ? 32 : 64;
    p.num_blocks = (p.T + p.block - 1) / p.block;
    p.scale = scale, p.softcap = softcap, p.threads = threads;
    p.q = q.data(), p.k = k.data(), p.v = v.data();
    return p;
}

void run(bool (*kernel)(const Problem&), Problem& p, const Tensor& subtree_end, const Tensor& position_ids,
         int64_t window, bool by_key) {
    if (p.T == 0 || p.Hq == 0 || p.D == 0) return;
    const auto *ends = (const int32_t*)subtree_end.data(), *positions = (const int32_t*)position_ids.data();
    nb::gil_scoped_release release;
    Plan plan(p, ends, positions, window, by_key);
    if (!kernel(p)) throw std::bad_alloc();
}

void tree_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor position_ids, Tensor out,
                        Tensor softmax, std::optional<Tensor> out_wide, double scale, double softcap, int64_t window,
                        int threads, const std::string& isa) {
    Problem p = problem_of(q, k, v, subtree_end, position_ids, scale, softcap, window, threads);
    auto wide = p.dtype == Dtype::float64 ? nb::dtype<double>() : nb::dtype<float>();
    size_t T = p.T, Hq = p.Hq, D = p.D;
    expect(out, q.dtype(), {T, Hq, D}, "out");
    expect(softmax, wide, {2, Hq, T}, "softmax");
    if (out_wide) expect(*out_wide, wide, {T, Hq, D}, "out_wide");
    p.out = out.data(), p.softmax = softmax.data(), p.out_wide = out_wide ? out_wide->data() : nullptr;
    run(pick(isa).tree_attention_fwd, p, subtree_end, position_ids, window, false);
}

void tree_attention_bwd(Tensor q, Tensor k, Tensor v, Tensor subtree_end, Tensor position_ids, Tensor out_wide,
                        Tensor softmax, Tensor d_out, Tensor dq, Tensor dk, Tensor dv, double scale, double softcap,
                        int64_t window, int threads, const std::string& isa) {
    Problem p = problem_of(q, k, v, subtree_end, position_ids, scale, softcap, window, threads);
    auto wide = p.dtype == Dtype::float64 ? nb::dtype<double>() : nb::dtype<float>();
    size_t T = p.T, Hq = p.Hq, Hkv = p.Hkv, D = p.D;
    expect(out_wide, wide, {T, Hq, D}, "out_wide");
    expect(softmax, wide, {2, Hq, T}, "softmax");
    expect(d_out, q.dtype(), {T, Hq, D}, "d_out");
    expect(dq, q.dtype(), {T, Hq, D}, "dq");
    expect(dk, q.dtype(), {T, Hkv, D}, "dk");
    expect(dv, q.dtype(), {T, Hkv, D}, "dv");
    p.out_wide = out_wide.data(), p.softmax = softmax.data(), p.d_out = d_out.data();
    p.dq = dq.data(), p.dk = dk.data(), p.dv = dv.data();
    run(pick(isa).tree_attention_bwd, p, subtree_end, position_ids, window, true);
}

Linear linear_of(const Tensor& x, const Tensor& w, int threads) {
    if (x.ndim() != 2 || w.ndim() != 2 || threads < 1) throw std::invalid_argument("x and w must be (M, K) and (N, K)");
    Linear p = {};
    p.M = x.shape(0), p.K = x.shape(1), p.N = w.shape(0), p.threads = threads;
    expect(x, nb::dtype<float>(), {x.shape(0), x.shape(1)}, "x");
    expect(w, nb::dtype<float>(), {w.shape(0), x.shape(1)}, "w");
    p.x = (const float*)x.data(), p.w = (const float*)w.data();
    return p;
}

void linear_fwd(Tensor x, Tensor w, Tensor y, int threads, const std::string& isa) {
    Linear p = linear_of(x, w, threads);
    expect(y, nb::dtype<float>(), {x.shape(0), w.shape(0)}, "y");
    p.y = (float*)y.data();
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (!set.linear_fwd(p)) throw std::bad_alloc();
}

void linear_bwd(Tensor x, Tensor w, Tensor dy, std::optional<Tensor> dx, std::optional<Tensor> dw, int threads,
                const std::string& isa) {
    Linear p = linear_of(x, w, threads);
    expect(dy, nb::dtype<float>(), {x.shape(0), w.shape(0)}, "dy");
    if (dx) expect(*dx, nb::dtype<float>(), {x.shape(0), x.shape(1)}, "dx");
    if (dw) expect(*dw, nb::dtype<float>(), {w.shape(0), w.shape(1)}, "dw");
    p.dy = (const float*)dy.data();
    p.dx = dx ? (float*)dx->data() : nullptr, p.dw = dw ? (float*)dw->data() : nullptr;
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (p.dx && !set.linear_dx(p)) throw std::bad_alloc();
    if (p.dw && !set.linear_dw(p)) throw std::bad_alloc();
}

LinearLogProb linear_log_prob_of(const Tensor& hidden, const Tensor& weight, const Tensor& target_ids,
                                 const Tensor& log_z, const std::optional<Tensor>& entropy, double softcap,
                                 int threads) {
    if (hidden.ndim() != 2 || weight.ndim() != 2) throw std::invalid_argument("hidden and weight must be (M, d), (V, d)");
    LinearLogProb p = {};
    p.dtype = dtype_of(hidden), p.softcap = softcap, p.threads = threads, p.with_entropy = entropy.has_value();
    p.M = hidden.shape(0), p.d = hidden.shape(1), p.V = weight.shape(0);
    size_t M = p.M, d = p.d, V = p.V;
    if (p.dtype == Dtype::float64 || softcap < 0 || threads < 1 || M * d * V == 0 || p.V > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("softcap, threads or sizes out of range, or a dtype not served");
    expect(weight, hidden.dtype(), {V, d}, "weight");
    expect(target_ids, nb::dtype<int64_t>(), {M}, "target_ids");
    p.hidden = hidden.data(), p.weight = weight.data(), p.target = (const int64_t*)target_ids.data();
    for (size_t i = 0; i < M; i++)
        if (p.target[i] < 0 || p.target[i] >= p.V) throw std::invalid_argument("target_ids must lie in [0, V)");
    p.log_z = float_data(log_z, {M}, "log_z");
    p.entropy = entropy ? float_data(*entropy, {M}, "entropy") : nullptr;
    return p;
}

void linear_log_prob_fwd(Tensor hidden, Tensor weight, Tensor target_ids, Tensor log_prob, Tensor log_z,
                         std::optional<Tensor> entropy, double softcap, int threads, const std::string& isa) {
    LinearLogProb p = linear_log_prob_of(hidden, weight, target_ids, log_z, entropy, softcap, threads);
    p.log_prob = float_data(log_prob, {hidden.shape(0)}, "log_prob");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (!set.linear_log_prob_fwd(p)) throw std::bad_alloc();
}

void linear_log_prob_bwd(Tensor hidden, Tensor weight, Tensor target_ids, Tensor log_z, std::optional<Tensor> entropy,
                         Tensor d_log_prob, std::optional<Tensor> d_entropy, std::optional<Tensor> d_hidden,
                         std::optional<Tensor> d_weight, double softcap, int threads, const std::string& isa) {
    LinearLogProb p = linear_log_prob_of(hidden, weight, target_ids, log_z, entropy, softcap, threads);
    if (entropy.has_value() != d_entropy.has_value()) throw std::invalid_argument("entropy and d_entropy go together");
    p.d_log_prob = float_data(d_log_prob, {hidden.shape(0)}, "d_log_prob");
    p.d_entropy = d_entropy ? float_data(*d_entropy, {hidden.shape(0)}, "d_entropy") : nullptr;
    if (d_hidden) expect(*d_hidden, hidden.dtype(), {hidden.shape(0), hidden.shape(1)}, "d_hidden");
    if (d_weight) expect(*d_weight, weight.dtype(), {weight.shape(0), weight.shape(1)}, "d_weight");
    p.d_hidden = d_hidden ? d_hidden->data() : nullptr, p.d_weight = d_weight ? d_weight->data() : nullptr;
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (!set.linear_log_prob_bwd(p)) throw std::bad_alloc();
}

constexpr size_t LANES = 16;  // rows of the pointwise ops come in whole vectors of any set

RmsNorm rms_norm_of(const Tensor& x, const Tensor& weight, const Tensor& rstd, double eps, int threads) {
    if (x.ndim() != 2 || x.shape(1) % LANES || threads < 1)
        throw std::invalid_argument("x must be (M, d), d a multiple of 16");
    size_t M = x.shape(0), d = x.shape(1);
    RmsNorm p = {};
    p.M = M, p.d = d, p.eps = (float)eps, p.threads = threads;
    p.x = float_data(x, {M, d}, "x"), p.weight = float_data(weight, {d}, "weight");
    p.rstd = float_data(rstd, {M}, "rstd");
    return p;
}

void rms_norm_fwd(Tensor x, Tensor weight, Tensor y, Tensor rstd, double eps, int threads, const std::string& isa) {
    RmsNorm p = rms_norm_of(x, weight, rstd, eps, threads);
    p.y = float_data(y, {(size_t)p.M, (size_t)p.d}, "y");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    set.rms_norm_fwd(p);
}

void rms_norm_bwd(Tensor x, Tensor weight, Tensor rstd, Tensor dy, Tensor dx, Tensor dweight, int threads,
                  const std::string& isa) {
    RmsNorm p = rms_norm_of(x, weight, rstd, 0, threads);
    size_t M = p.M, d = p.d;
    p.dy = float_data(dy, {M, d}, "dy"), p.dx = float_data(dx, {M, d}, "dx");
    p.dweight = float_data(dweight, {d}, "dweight");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (!set.rms_norm_bwd(p)) throw std::bad_alloc();
}

Geglu geglu_of(const Tensor& gate, const Tensor& up, int threads) {
    if (gate.ndim() != 1 || gate.shape(0) % LANES || threads < 1)
        throw std::invalid_argument("gate must be (n,), n a multiple of 16");
    Geglu p = {};
    p.n = gate.shape(0), p.threads = threads;
    p.gate = float_data(gate, {gate.shape(0)}, "gate"), p.up = float_data(up, {gate.shape(0)}, "up");
    return p;
}

void geglu_fwd(Tensor gate, Tensor up, Tensor y, int threads, const std::string& isa) {
    Geglu p = geglu_of(gate, up, threads);
    p.y = float_data(y, {(size_t)p.n}, "y");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    set.geglu_fwd(p);
}

void geglu_bwd(Tensor gate, Tensor up, Tensor dy, Tensor dgate, Tensor dup, int threads, const std::string& isa) {
    Geglu p = geglu_of(gate, up, threads);
    size_t n = p.n;
    p.dy = float_data(dy, {n}, "dy"), p.dgate = float_data(dgate, {n}, "dgate"), p.dup = float_data(dup, {n}, "dup");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    set.geglu_bwd(p);
}

void rope(Tensor x, Tensor cos, Tensor sin, Tensor y, double sign, int threads, const std::string& isa) {
    if (x.ndim() != 3 || x.shape(2) % (2 * LANES) || threads < 1)
        throw std::invalid_argument("x must be (T, H, D), D a multiple of 32");
    size_t T = x.shape(0), H = x.shape(1), D = x.shape(2);
    Rope p = {};
    p.T = T, p.H = H, p.D = D, p.sign = (float)sign, p.threads = threads;
    p.x = float_data(x, {T, H, D}, "x"), p.y = float_data(y, {T, H, D}, "y");
    p.cos = float_data(cos, {T, D / 2}, "cos"), p.sin = float_data(sin, {T, D / 2}, "sin");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    set.rope(p);
}

NormRope norm_rope_of(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, const Tensor& rstd,
                      double eps, int threads) {
    if (x.ndim() != 3 || x.shape(2) % (2 * LANES) || threads < 1)
        throw std::invalid_argument("x must be (T, H, D), D a multiple of 32");
    size_t T = x.shape(0), H = x.shape(1), D = x.shape(2);
    NormRope p = {};
    p.T = T, p.H = H, p.D = D, p.eps = (float)eps, p.threads = threads;
    p.x = float_data(x, {T, H, D}, "x"), p.weight = float_data(weight, {D}, "weight");
    p.cos = float_data(cos, {T, D / 2}, "cos"), p.sin = float_data(sin, {T, D / 2}, "sin");
    p.rstd = float_data(rstd, {T, H}, "rstd");
    return p;
}

void norm_rope_fwd(Tensor x, Tensor weight, Tensor cos, Tensor sin, Tensor y, Tensor rstd, double eps, int threads,
                   const std::string& isa) {
    NormRope p = norm_rope_of(x, weight, cos, sin, rstd, eps, threads);
    p.y = float_data(y, {(size_t)p.T, (size_t)p.H, (size_t)p.D}, "y");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    set.norm_rope_fwd(p);
}

void norm_rope_bwd(Tensor x, Tensor weight, Tensor cos, Tensor sin, Tensor rstd, Tensor dy, Tensor dx, Tensor dweight,
                   int threads, const std::string& isa) {
    NormRope p = norm_rope_of(x, weight, cos, sin, rstd, 0, threads);
    size_t T = p.T, H = p.H, D = p.D;
    p.dy = float_data(dy, {T, H, D}, "dy"), p.dx = float_data(dx, {T, H, D}, "dx");
    p.dweight = float_data(dweight, {D}, "dweight");
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (!set.norm_rope_bwd(p)) throw std::bad_alloc();
}

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "The ops of cpp/; swirl.kernels.cpu wraps them for autograd.";
    m.def("isas", isas, "Names of the instruction sets built and present here, best first.");
    m.def("tree_attention_fwd", tree_attention_fwd, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("subtree_end"),
          nb::arg("position_ids"), nb::arg("out"), nb::arg("softmax"), nb::arg("out_wide").none(), nb::arg("scale"),
          nb::arg("softcap"), nb::arg("window"), nb::arg("threads"), nb::arg("isa"),
          "Fills out (T, Hq, D), softmax (2, Hq, T) and, if given, out_wide: O before rounding. softcap, window 0: "
          "none.");
    m.def("tree_attention_bwd", tree_attention_bwd, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("subtree_end"),
          nb::arg("position_ids"), nb::arg("out_wide"), nb::arg("softmax"), nb::arg("d_out"), nb::arg("dq"),
          nb::arg("dk"), nb::arg("dv"), nb::arg("scale"), nb::arg("softcap"), nb::arg("window"), nb::arg("threads"),
          nb::arg("isa"), "Fills dq (T, Hq, D), dk and dv (T, Hkv, D).");
    m.def("linear_fwd", linear_fwd, nb::arg("x"), nb::arg("w"), nb::arg("y"), nb::arg("threads"), nb::arg("isa"),
          "Fills y (M, N) = x (M, K) w (N, K)^T, float32.");
    m.def("linear_bwd", linear_bwd, nb::arg("x"), nb::arg("w"), nb::arg("dy"), nb::arg("dx").none(),
          nb::arg("dw").none(), nb::arg("threads"), nb::arg("isa"), "Fills dx and dw, where given.");
    m.def("linear_log_prob_fwd", linear_log_prob_fwd, nb::arg("hidden"), nb::arg("weight"), nb::arg("target_ids"),
          nb::arg("log_prob"), nb::arg("log_z"), nb::arg("entropy").none(), nb::arg("softcap"), nb::arg("threads"),
          nb::arg("isa"), "Fills log_prob, log_z and, if given, entropy, (M,) float32. softcap 0: none.");
    m.def("linear_log_prob_bwd", linear_log_prob_bwd, nb::arg("hidden"), nb::arg("weight"), nb::arg("target_ids"),
          nb::arg("log_z"), nb::arg("entropy").none(), nb::arg("d_log_prob"), nb::arg("d_entropy").none(),
          nb::arg("d_hidden").none(), nb::arg("d_weight").none(), nb::arg("softcap"), nb::arg("threads"),
          nb::arg("isa"), "Fills d_hidden (M, d) and d_weight (V, d), where given.");
    m.def("rms_norm_fwd", rms_norm_fwd, nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("rstd"),
          nb::arg("eps"), nb::arg("threads"), nb::arg("isa"), "Fills y (M, d) and rstd (M,), float32.");
    m.def("rms_norm_bwd", rms_norm_bwd, nb::arg("x"), nb::arg("weight"), nb::arg("rstd"), nb::arg("dy"), nb::arg("dx"),
          nb::arg("dweight"), nb::arg("threads"), nb::arg("isa"), "Fills dx (M, d) and dweight (d,).");
    m.def("geglu_fwd", geglu_fwd, nb::arg("gate"), nb::arg("up"), nb::arg("y"), nb::arg("threads"), nb::arg("isa"),
          "Fills y (n,) = gelu_tanh(gate) up, float32.");
    m.def("geglu_bwd", geglu_bwd, nb::arg("gate"), nb::arg("up"), nb::arg("dy"), nb::arg("dgate"), nb::arg("dup"),
          nb::arg("threads"), nb::arg("isa"), "Fills dgate and dup (n,).");
    bind_decode(m);
    m.def("rope", rope, nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("y"), nb::arg("sign"),
          nb::arg("threads"), nb::arg("isa"), "Fills y (T, H, D): x turned by sign times the angles.");
    m.def("norm_rope_fwd", norm_rope_fwd, nb::arg("x"), nb::arg("weight"), nb::arg("cos"), nb::arg("sin"), nb::arg("y"),
          nb::arg("rstd"), nb::arg("eps"), nb::arg("threads"), nb::arg("isa"),
          "Fills y (T, H, D), x normed by head and turned, and rstd (T, H), float32.");
    m.def("norm_rope_bwd", norm_rope_bwd, nb::arg("x"), nb::arg("weight"), nb::arg("cos"), nb::arg("sin"),
          nb::arg("rstd"), nb::arg("dy"), nb::arg("dx"), nb::arg("dweight"), nb::arg("threads"), nb::arg("isa"),
          "Fills dx (T, H, D) and dweight (D,).");
}
