// The decoding ops of swirl.kernels._cpu: checks what Python hands over.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

#include "module.h"

namespace {

using swirl::Decode;
using swirl::DecodeLayer;
using swirl::Dtype;
using swirl::Sequences;
using swirl::TreeDecode;
using Layer = std::vector<std::optional<Tensor>>;

const int32_t* integers(const Tensor& x, std::initializer_list<size_t> shape, const char* name) {
    expect(x, nb::dtype<int32_t>(), shape, name);
    return (const int32_t*)x.data();
}

// (slot, end, position) of the tree and (state, own_slot, own_length) of the sequences. Throws where one points outside.
Sequences sequences_of(const std::vector<Tensor>& tree, const std::vector<Tensor>& rows, int64_t num_slots, int64_t steps) {
    if (tree.size() != 3 || rows.size() != 3 || tree[0].ndim() != 1 || rows[1].ndim() != 2)
        throw std::invalid_argument("expected slot, end, position (T,) and state (B,), own_slot (B, N), own_length (B,)");
    Sequences s = {};
    size_t T = s.T = tree[0].shape(0), B = s.B = rows[1].shape(0), N = s.N = rows[1].shape(1);
    s.slot = integers(tree[0], {T}, "slot"), s.end = integers(tree[1], {T}, "subtree_end");
    s.position = integers(tree[2], {T}, "position_ids"), s.state = integers(rows[0], {B}, "state");
    s.own_slot = integers(rows[1], {B, N}, "own_slot"), s.own_length = integers(rows[2], {B}, "own_length");
    bool inside = true;
    for (int64_t j = 0; j < s.T; j++)
        inside &= 0 <= s.slot[j] && s.slot[j] < num_slots && j < s.end[j] && s.end[j] <= s.T && 0 <= s.position[j];
    for (int64_t b = 0; b < s.B; b++) {
        inside &= 0 <= s.state[b] && s.state[b] < s.T && 0 <= s.own_length[b] && s.own_length[b] + steps <= s.N;
        for (int64_t t = 0; inside && t < s.own_length[b] + steps; t++)
            inside &= 0 <= s.own_slot[b * s.N + t] && s.own_slot[b * s.N + t] < num_slots;
    }
    if (!inside) throw std::invalid_argument("a slot, a state or a length lies outside its range");
    return s;
}

void tree_decode(Tensor q, Tensor keys, Tensor values, std::vector<Tensor> tree, std::vector<Tensor> rows, Tensor out,
                 double scale, double softcap, int64_t window, int threads, const std::string& isa) {
    if (q.ndim() != 3 || keys.ndim() != 3) throw std::invalid_argument("q must be (B, Hq, D), keys (slots, Hkv, D)");
    TreeDecode p = {};
    size_t B = q.shape(0), Hq = q.shape(1), D = q.shape(2), slots = keys.shape(0), Hkv = keys.shape(1);
    p.dtype = dtype_of(q), p.Hq = Hq, p.Hkv = Hkv, p.D = D;
    expect(keys, q.dtype(), {slots, Hkv, D}, "keys");
    expect(values, q.dtype(), {slots, Hkv, D}, "values");
    expect(out, q.dtype(), {B, Hq, D}, "out");
    if (!Hkv || Hq % Hkv || softcap < 0 || window < 0 || threads < 1) throw std::invalid_argument("heads, softcap, window or threads out of range");
    p.sequences = sequences_of(tree, rows, slots, 0);
    if (p.sequences.B != (int64_t)B) throw std::invalid_argument("expected a state for each query");
    p.q = q.data(), p.keys = keys.data(), p.values = values.data(), p.out = out.data();
    p.scale = scale, p.softcap = softcap, p.window = window, p.threads = threads;
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (B && !set.tree_decode(p)) throw std::bad_alloc();
}

DecodeLayer layer_of(const Layer& tensors, int64_t window, const Decode& p, nb::dlpack::dtype dtype, size_t slots,
                     size_t positions) {
    if (tensors.size() != 17) throw std::invalid_argument("expected 17 tensors a layer");
    size_t d = p.draw.d, q = p.Hq * p.D, kv = p.Hkv * p.D, F = p.F, D = p.D, Hkv = p.Hkv;
    DecodeLayer layer = {};
    layer.window = window;
    size_t at = 0;
    auto take_as = [&](nb::dlpack::dtype dtype, const void*& to, std::initializer_list<size_t> shape, bool optional) {
        const std::optional<Tensor>& x = tensors[at++];
        if (!x && !optional) throw std::invalid_argument("a weight of a layer is missing");
        if (x) expect(*x, dtype, shape, "a tensor of a layer");
        to = x ? x->data() : nullptr;
    };
    auto take = [&](const void*& to, std::initializer_list<size_t> shape, bool optional = false) {
        take_as(dtype, to, shape, optional);
    };
    take(layer.input_norm, {d}), take(layer.q, {q, d}), take(layer.k, {kv, d}), take(layer.v, {kv, d});
    take(layer.q_norm, {D}, true), take(layer.k_norm, {D}, true), take(layer.o, {d, q});
    take(layer.attention_norm, {d}), take(layer.mlp_norm, {d}), take(layer.gate, {F, d}), take(layer.up, {F, d});
    take(layer.down, {d, F}), take(layer.output_norm, {d});
    nb::dlpack::dtype wide = p.dtype == Dtype::float64 ? nb::dtype<double>() : nb::dtype<float>();
    for (const void** angles : {&layer.cos, &layer.sin}) take_as(wide, *angles, {positions, D / 2}, false);
    const void *keys, *values;
    take(keys, {slots, Hkv, D}), take(values, {slots, Hkv, D});
    layer.keys = (void*)keys, layer.values = (void*)values;
    return layer;
}

// The tables of the draws, (B, steps) or (B,), and is_stop (V,).
void fill_draw(swirl::Draw& draw, const Tensor& embedding, double softcap, const std::vector<Tensor>& tables) {
    if (embedding.ndim() != 2 || tables.size() != 7 || tables[0].ndim() != 2)
        throw std::invalid_argument("expected embedding (V, d), and the seven tables of the draws");
    size_t B = tables[0].shape(0), steps = tables[0].shape(1), V = embedding.shape(0);
    draw.V = V, draw.d = embedding.shape(1), draw.embedding = embedding.data();
    draw.softcap = softcap, draw.steps = steps;
    expect(tables[0], nb::dtype<double>(), {B, steps}, "uniform");
    expect(tables[1], nb::dtype<double>(), {B}, "temperature");
    expect(tables[2], nb::dtype<uint8_t>(), {V}, "is_stop");
    draw.uniform = (const double*)tables[0].data(), draw.temperature = (const double*)tables[1].data();
    draw.is_stop = (const uint8_t*)tables[2].data(), draw.limit = integers(tables[3], {B}, "limit");
    expect(tables[4], nb::dtype<int64_t>(), {B, steps}, "ids");
    expect(tables[5], nb::dtype<double>(), {B, steps}, "log_probs");
    draw.ids = (int64_t*)tables[4].data(), draw.log_prob = (double*)tables[5].data();
    draw.count = (int32_t*)integers(tables[6], {B}, "count");
    for (size_t b = 0; b < B; b++)
        if (draw.limit[b] < 0 || draw.limit[b] > (int32_t)steps) throw std::invalid_argument("limit must lie in [0, steps]");
}

void draw(Tensor hidden, Tensor embedding, double softcap, std::vector<Tensor> tables, int threads, const std::string& isa) {
    Decode p = {};
    p.dtype = dtype_of(embedding), p.threads = threads;
    fill_draw(p.draw, embedding, softcap, tables);
    size_t B = tables[0].shape(0), d = p.draw.d;
    expect(hidden, embedding.dtype(), {B, d}, "hidden");
    std::vector<int32_t> none(B, 0);
    p.Hkv = p.Hq = 1, p.hidden = hidden.data(), p.sequences.B = B;
    p.sequences.state = p.sequences.own_length = none.data();
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (B && p.draw.steps && !set.decode(p)) throw std::bad_alloc();
}

void decode(std::vector<Layer> layers, std::vector<int64_t> windows, Tensor final_norm, Tensor embedding, int Hq, int Hkv,
            double eps, double embed_scale, double scale, double softcap, double final_softcap, Tensor token,
            std::vector<Tensor> tree, std::vector<Tensor> rows, std::vector<Tensor> tables,
            std::optional<Tensor> prefilled, int threads, const std::string& isa) {
    if (layers.empty() || layers.size() != windows.size() || layers[0].size() != 17 || !layers[0][1] || !layers[0][9] ||
        !layers[0][13] || !layers[0][15] || layers[0][15]->ndim() != 3 || Hkv < 1 || Hq % Hkv || threads < 1)
        throw std::invalid_argument("expected the tensors of at least one layer, a window for each, and heads that fit");
    Decode p = {};
    p.dtype = dtype_of(embedding), p.threads = threads;
    fill_draw(p.draw, embedding, final_softcap, tables);
    const Tensor& pool = *layers[0][15];
    p.Hq = Hq, p.Hkv = Hkv, p.D = pool.shape(2), p.F = layers[0][9]->shape(0), p.num_layers = layers.size();
    std::vector<DecodeLayer> weights;
    int64_t positions = layers[0][13]->shape(0), sliding = 0;
    for (size_t i = 0; i < layers.size(); i++) {
        weights.push_back(layer_of(layers[i], windows[i], p, embedding.dtype(), pool.shape(0), positions));
        if (windows[i] < 0 || (sliding && windows[i] && windows[i] != sliding)) throw std::invalid_argument("expected one window");
        sliding = windows[i] ? windows[i] : sliding;
    }
    size_t B = tables[0].shape(0);
    expect(final_norm, embedding.dtype(), {(size_t)p.draw.d}, "final_norm");
    expect(token, nb::dtype<int64_t>(), {B}, "token");
    p.layers = weights.data(), p.final_norm = final_norm.data(), p.token = (const int64_t*)token.data();
    p.eps = eps, p.embed_scale = embed_scale, p.scale = scale, p.softcap = softcap;
    p.sequences = sequences_of(tree, rows, pool.shape(0), p.draw.steps);
    if (p.sequences.B != (int64_t)B) throw std::invalid_argument("expected a state for each token");
    for (size_t b = 0; b < B; b++) {
        int64_t position = p.sequences.position[p.sequences.state[b]] + p.sequences.own_length[b] + p.draw.steps;
        if (p.token[b] < 0 || p.token[b] >= p.draw.V || position >= positions) throw std::invalid_argument("a token or a position lies outside its range");
    }
    if (prefilled) {
        expect(*prefilled, embedding.dtype(), {B, (size_t)p.draw.d}, "prefilled");
        for (size_t b = 0; b < B; b++)
            if (p.sequences.own_length[b]) throw std::invalid_argument("expected no own tokens in prefill");
        p.prefilled = prefilled->data();
    }
    const Isa& set = pick(isa);
    nb::gil_scoped_release release;
    if (B && (p.draw.steps || p.prefilled) && !set.decode(p)) throw std::bad_alloc();
}

}  // namespace

void bind_decode(nb::module_& m) {
    m.def("tree_decode", tree_decode, nb::arg("q"), nb::arg("keys"), nb::arg("values"), nb::arg("tree"), nb::arg("rows"),
          nb::arg("out"), nb::arg("scale"), nb::arg("softcap"), nb::arg("window"), nb::arg("threads"), nb::arg("isa"),
          "Fills out (B, Hq, D). tree: slot, subtree_end, position_ids; rows: state, own_slot, own_length; all int32.");
    m.def("draw", draw, nb::arg("hidden"), nb::arg("embedding"), nb::arg("softcap"), nb::arg("tables"),
          nb::arg("threads"), nb::arg("isa"),
          "Draws a token from each (B, d) hidden. tables: uniform, temperature, is_stop, limit, ids, log_probs, count.");
    m.def("decode", decode, nb::arg("layers"), nb::arg("windows"), nb::arg("final_norm"), nb::arg("embedding"),
          nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("eps"), nb::arg("embed_scale"), nb::arg("scale"),
          nb::arg("softcap"), nb::arg("final_softcap"), nb::arg("token"), nb::arg("tree"), nb::arg("rows"),
          nb::arg("tables"), nb::arg("prefilled").none(), nb::arg("threads"), nb::arg("isa"),
          "Whole steps of the model, as many as the tables have columns; own_length counts tokens before the call. With "
          "prefilled (B, d), the tokens of the tree at `state` instead, their keys and values into their slots.");
}
