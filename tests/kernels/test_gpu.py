"""The Triton kernels on a CUDA device: no further from float64 than eager torch in the same dtype, outputs poisoned.

The names that hold "small" also run under compute-sanitizer (benchmarks/gpu.sh).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from swirl import Gemma, GemmaConfig, pack
from swirl.kernels import _triton
from swirl.kernels.geglu import geglu, geglu_reference
from swirl.kernels.head_draw import head_draw, head_logits, tempered
from swirl.kernels.linear_log_prob import linear_log_prob, linear_log_prob_reference
from swirl.kernels.rms_norm import norm_add_norm, norm_add_norm_reference, rms_norm, rms_norm_reference
from swirl.kernels.rope import rope, rope_reference
from swirl.kernels.tree_attention import tree_attention, tree_attention_reference, tree_mask
from swirl.kernels.tree_decode import tree_decode, tree_decode_reference
from swirl.sampling import passes
from swirl.sampling.engine import Engine
from tests.kernels.decoding import decode_case
from tests.kernels.test_triton import forest, head_case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or _triton.triton is None, reason="needs CUDA and triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# what a result may be worse than eager torch's: both round, and neither bounds the other exactly
SLACK = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever is allocated without values holds NaN until a kernel writes it."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x.fill_(0x7FFF)

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    torch.manual_seed(0)


def random(*shape, dtype):
    return torch.randn(shape, device="cuda").to(dtype)


def outputs_and_gradients(op, inputs, weights):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((y * w.to(y.dtype)).sum() for y, w in zip(outputs, weights))
    return *outputs, *torch.autograd.grad(loss, inputs)


def hold(op, eager, reference, inputs, output_shapes):
    """|op - truth| <= 1.1 |eager - truth| + slack |truth| for every output and gradient; and twice bitwise the same."""
    dtype = inputs[0].dtype
    weights = [random(*shape, dtype=dtype).double() for shape in output_shapes]
    truth = outputs_and_gradients(reference, [x.double() for x in inputs], weights)
    ours, again = (outputs_and_gradients(op, inputs, weights) for _ in range(2))
    others = outputs_and_gradients(eager, inputs, weights)
    for x, y, z, t in zip(ours, again, others, truth):
        assert torch.equal(x, y), "two runs differ"
        error, eager_error = ((a.double() - t).norm() / t.norm() for a in (x, z))
        assert error <= 1.1 * eager_error + SLACK[dtype], f"{error:.1e}, eager {eager_error:.1e}"


def eager_attention(q, k, v, mask, scale, softcap, window):
    """Attention in the inputs' own dtype, as one writes it in torch; softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~tree_mask(*mask, window), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1, dtype=torch.float32).to(q.dtype), v)


def attention_case(dtype, T, Hq, Hkv, D, softcap, window):
    mask = tuple(x.cuda() for x in forest(T, seed=T))
    inputs = [random(T, heads, D, dtype=dtype) for heads in (Hq, Hkv, Hkv)]
    options = {"scale": D**-0.5, "softcap": softcap, "window": window}
    hold(
        lambda *x: tree_attention(*x, *mask, **options),
        lambda *x: eager_attention(*x, mask, **options),
        lambda *x: tree_attention_reference(*x, *mask, **options),
        inputs,
        [(T, Hq, D)],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [32, 64, 128, 256])
@pytest.mark.parametrize("window", [None, 33])
def test_tree_attention_small(dtype, D, window):
    attention_case(dtype, 63, 4, 2, D, 50.0, window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("softcap", "window"), [(50.0, None), (50.0, 300), (None, None)])
@pytest.mark.parametrize(("Hq", "Hkv", "D"), [(4, 2, 256), (4, 4, 128), (8, 1, 96)])
def test_tree_attention(dtype, Hq, Hkv, D, softcap, window):
    attention_case(dtype, 1000, Hq, Hkv, D, softcap, window)


@pytest.mark.parametrize("scratch_bytes", [0, 3 << 20])
def test_key_gradients_anew_and_one_head_at_a_time(scratch_bytes, monkeypatch):
    monkeypatch.setattr("swirl.kernels.tree_attention.SCRATCH_BYTES", scratch_bytes)
    attention_case(torch.bfloat16, 1000, 6, 3, 256, 50.0, 300)


def require_near(ours, others, slack):
    for x, y in zip(ours, others, strict=True):
        assert ((x.double() - y.double()).norm() / y.double().norm()) <= slack


def test_the_backward_stored_and_recomputed_agree_at_16k_tokens(monkeypatch):
    mask = tuple(x.cuda() for x in forest(16_384, seed=16))
    inputs = [random(16_384, heads, 256, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    weights = [random(16_384, 4, 256, dtype=torch.bfloat16)]
    found = []
    for scratch_bytes in (16 << 30, 0):
        monkeypatch.setattr("swirl.kernels.tree_attention.SCRATCH_BYTES", scratch_bytes)
        attention = lambda *x: tree_attention(*x, *mask, scale=1 / 16, softcap=50.0, window=4096)  # noqa: E731
        found.append(outputs_and_gradients(attention, inputs, weights))
    require_near(*found, SLACK[torch.bfloat16])


def test_tree_attention_of_one_token_small():
    """Not `hold`: with one token the softmax is 1, and the gradients of q and k are 0."""
    mask = tuple(x.cuda() for x in forest(1, seed=0))
    q, k, v = (random(1, 2, 256, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    o = tree_attention(q, k, v, *mask, scale=0.1, softcap=50.0)
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    torch.testing.assert_close(o, v, rtol=1e-2, atol=0)  # the weight 1 is a ratio of two roundings
    torch.testing.assert_close(dv, torch.ones_like(v), rtol=1e-2, atol=0)
    assert dq.abs().max() < 0.5 and dk.abs().max() < 0.5


def test_other_branches_do_not_matter():
    """Changing one branch, lengths kept, leaves the tokens of the others bitwise as they were."""
    end, position = forest(1000, seed=5)
    start = int((end[:-1] < 1000).nonzero()[0])
    branch = slice(start, int(end[start]))
    q, k, v = (random(1000, 2, 256, dtype=torch.bfloat16) for _ in range(3))
    mask = end.cuda(), position.cuda()
    before = tree_attention(q, k, v, *mask, scale=0.06, softcap=50.0)
    k[branch], v[branch] = random(2, branch.stop - branch.start, 2, 256, dtype=torch.bfloat16)
    after = tree_attention(q, k, v, *mask, scale=0.06, softcap=50.0)
    others = torch.ones(1000, dtype=torch.bool)
    others[branch] = False
    assert torch.equal(before[others.cuda()], after[others.cuda()])


def eager_head(hidden, weight, target_ids, softcap, return_entropy):
    """As one writes it in torch: the logits in the inputs' dtype, the rest in float32."""
    logits = (hidden @ weight.T).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(1, target_ids[:, None])[:, 0]
    return (log_probs, -(log_p.exp() * log_p).sum(-1)) if return_entropy else log_probs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize(
    ("M", "d", "V", "softcap"), [(63, 72, 1000, 30.0), (1000, 2304, 5000, 30.0), (700, 256, 33000, None)]
)
def test_linear_log_prob(dtype, return_entropy, M, d, V, softcap):
    target_ids = torch.randint(0, V, (M,), device="cuda")
    options = {"softcap": softcap, "return_entropy": return_entropy}
    hold(
        lambda *x: linear_log_prob(*x, target_ids, **options, extra_bytes=4 << 20),  # several chunks
        lambda *x: eager_head(*x, target_ids, **options),
        lambda *x: linear_log_prob_reference(*x, target_ids, **options),
        [random(M, d, dtype=dtype), random(V, d, dtype=dtype) / 16],
        [(M,)] * (1 + return_entropy),
    )


def test_a_head_over_8k_rows_is_the_same_in_chunks():
    target_ids = torch.randint(0, 33_000, (8192,), device="cuda")
    inputs = [random(8192, 2304, dtype=torch.bfloat16), random(33_000, 2304, dtype=torch.bfloat16) / 16]
    weights = [random(8192, dtype=torch.float32)] * 2
    found = []
    for extra_bytes in (4 << 30, 4 << 20):  # one chunk, many
        options = {"softcap": 30.0, "return_entropy": True, "extra_bytes": extra_bytes}
        head = lambda *x, o=options: linear_log_prob(*x, target_ids, **o)  # noqa: E731
        found.append(outputs_and_gradients(head, inputs, weights))
    require_near(*found, SLACK[torch.bfloat16])
    assert torch.equal(found[0][2], found[1][2]), "d_hidden depends on where chunks end"


def test_a_target_outside_the_vocabulary_has_no_log_prob():
    hidden, weight = random(5, 64, dtype=torch.bfloat16), random(300, 64, dtype=torch.bfloat16)
    target_ids = torch.tensor([0, 300, 299, -1, 7], device="cuda")
    log_probs = linear_log_prob(hidden, weight, target_ids, softcap=30.0)
    assert log_probs.isnan().tolist() == [False, True, False, True, False]


def test_linear_log_prob_memory():
    """Gemma-2 2b's head over 8192 rows: beside the gradients, at most what is allowed."""
    hidden = random(8192, 2304, dtype=torch.bfloat16).requires_grad_()
    weight = (random(256_000, 2304, dtype=torch.bfloat16) / 16).requires_grad_()
    target_ids = torch.randint(0, 256_000, (8192,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    log_probs = linear_log_prob(hidden, weight, target_ids, softcap=30.0, extra_bytes=64 << 20)
    gradients = torch.autograd.grad(log_probs.sum(), (hidden, weight))
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients)
    # the poisoning fixture allocates nothing, and cuBLAS keeps a workspace of its own, 32 MiB on Hopper
    assert extra <= (64 << 20) + (34 << 20), f"{extra / 2**20:.0f} MiB"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (63, 100), (1000, 2304), (33, 4608)])
def test_norm_add_norm_small(dtype, rows, d):
    inputs = [random(*shape, dtype=dtype) for shape in ((rows, d), (d,), (rows, d), (d,))]
    hold(norm_add_norm, norm_add_norm_reference, norm_add_norm_reference, inputs, [(rows, d)] * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (63, 100), (1000, 2304), (33, 4608)])
def test_rms_norm_small(dtype, rows, d):
    inputs = [random(rows, d, dtype=dtype), random(d, dtype=dtype), random(rows, d, dtype=dtype)]
    op, reference = (
        lambda x, weight, residual, f=f: f(x, weight, residual=residual) for f in (rms_norm, rms_norm_reference)
    )
    hold(op, reference, reference, inputs, [(rows, d)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 2), (63, 3, 40), (1000, 8, 256)])
def test_rope_small(dtype, T, H, D):
    position_ids = torch.randint(0, 32_000, (T,), dtype=torch.int32, device="cuda")
    op, single = (lambda x, f=f: f(x, position_ids) for f in (rope, rope_reference))
    # truth in float32: at position 32,000 the angle itself is only that exact
    hold(op, single, lambda x: single(x.float()).double(), [random(T, H, D, dtype=dtype)], [(T, H, D)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (63, 65), (2, 3, 10_000)])
def test_geglu_small(dtype, shape):
    hold(geglu, geglu_reference, geglu_reference, [random(*shape, dtype=dtype) for _ in range(2)], [shape])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "D", "depth", "N"), [(1, 1, 1, 32, 1, 1), (5, 4, 2, 256, 1000, 70), (40, 8, 4, 64, 4000, 3)]
)
def test_tree_decode_small(dtype, window, B, Hq, Hkv, D, depth, N):
    inputs = decode_case(B, Hq, Hkv, D, depth, N, dtype, "cuda")
    options = {"scale": D**-0.5, "softcap": 50.0, "window": window}
    o = tree_decode(*inputs, **options)
    truth = tree_decode_reference(*(x.double() for x in inputs[:3]), *inputs[3:], **options)
    assert torch.equal(o, tree_decode(*inputs, **options))
    assert (o.double() - truth).norm() <= SLACK[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "d", "V", "softcap"), [(1, 8, 3, 30.0), (9, 72, 1000, 30.0), (100, 2304, 33_000, 30.0), (64, 256, 5001, None)]
)
def test_head_draw_small(dtype, B, d, V, softcap):
    hidden, weight, uniforms, temperatures = (x.cuda() for x in head_case(B, d, V, dtype, spread=d**-0.5))
    ids, log_probs = head_draw(hidden, weight, uniforms, temperatures, softcap=softcap)
    again = head_draw(hidden, weight, uniforms, temperatures, softcap=softcap)
    assert torch.equal(ids, again[0]) and torch.equal(log_probs, again[1])
    log_p = tempered(head_logits(hidden.double(), weight.double(), softcap), temperatures).log_softmax(-1)
    log_p_drawn = log_p.gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), log_p_drawn, rtol=1e-4, atol=1e-3)
    beyond = log_p.exp().cumsum(1).gather(1, ids[:, None])[:, 0]
    greedy = temperatures == 0
    inside = (beyond - log_p_drawn.exp() - 1e-4 <= uniforms) & (uniforms <= beyond + 1e-4)
    assert bool((inside | greedy).all())
    # where rounding makes two the likeliest, either may be taken
    assert bool((log_p_drawn[greedy] >= log_p[greedy].amax(1) - 1e-4).all())


def test_head_draw_holds_no_logits():
    """Gemma-2 2b's head, 64 rows: 65 MB of logits would be touched some ten times."""
    hidden, weight, uniforms, temperatures = (x.cuda() for x in head_case(64, 2304, 256_000, torch.bfloat16, 0.02))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    head_draw(hidden, weight, uniforms, temperatures, softcap=30.0)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 << 20


def test_a_replayed_token_step_draws_what_an_eager_one_does(monkeypatch):
    config = GemmaConfig(64, 64, 96, 3, 4, 2, head_dim=32, query_pre_attn_scalar=32, sliding_window=9)
    model = Gemma(config).init_weights(0).cuda()
    states = [[1, 2, 3, *range(i % 7)] for i in range(1, 30)]
    options = dict(seeds=range(29), max_new_tokens=21, temperature=1.0, stop_ids=(5,))
    engine = Engine(model)
    for _ in range(2):
        replayed = engine.sample(states, **options)
        with monkeypatch.context() as patched:
            patched.setattr(passes, "replays", lambda device: False)
            eager = Engine(model).sample(states, **options)
        assert [one.ids for one in replayed] == [one.ids for one in eager]
        batch = pack([(state, one.ids) for state, one in zip(states, replayed)]).to(model.device)
        truth = model.token_log_probs(batch)
        ours = torch.tensor([p for one in replayed for p in one.log_probs], device="cuda")
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
        with torch.no_grad():  # in place: the graphs stay, and read what is there
            for parameter in model.parameters():
                parameter.mul_(1.5)


def test_offsets_beyond_int32():
    """A buffer of more than 2^31 elements: its last rows are read and written like its first."""
    T = (1 << 31) // (8 * 256) + 100
    x = random(100, 8, 256, dtype=torch.bfloat16)
    large = torch.zeros(T, 8, 256, dtype=torch.bfloat16, device="cuda")
    large[-100:] = x
    position_ids = torch.arange(T, dtype=torch.int32, device="cuda") % 1000
    assert torch.equal(rope(large, position_ids)[-100:], rope(x, position_ids[-100:]))
    weight = random(2048, dtype=torch.bfloat16)
    normed = rms_norm(large.view(T, -1), weight)[-100:]
    assert torch.equal(normed, rms_norm(x.reshape(100, -1), weight))
    assert torch.equal(geglu(large, large)[-100:], geglu(x, x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_launch_where_their_tensors_are():
    """Device 0 is current, here and in a new thread; the model lies on device 1. Never run yet: no machine had two."""
    config = GemmaConfig(64, 64, 96, 2, 4, 2, head_dim=32, query_pre_attn_scalar=32, sliding_window=9)
    batch = pack([([1, 2, 3], (4, 5)), ([1, 2, 3], (6,)), ([1, 2], (7, 8))])
    states, options = [[1, 2, 3], [1, 2, 4]], dict(seeds=[0, 1], max_new_tokens=5)
    mask = tuple(x.cuda(1) for x in forest(63, seed=63))

    def made(device):
        model = Gemma(config).init_weights(0).to(device)
        log_probs = model.token_log_probs(batch.to(model.device))
        gradient = torch.autograd.grad(log_probs.sum(), model.model.embed_tokens.weight)[0]
        return log_probs.detach().cpu(), gradient.cpu(), Engine(model).sample(states, temperature=0, **options)

    with ThreadPoolExecutor(1) as thread, torch.cuda.device(0):
        theirs = made("cuda:0")
        for ours in (made("cuda:1"), thread.submit(made, "cuda:1").result()):
            assert torch.equal(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1])
            assert ours[2] == theirs[2]
        q, k, v = (torch.randn(63, 2, 64, device="cuda:1") for _ in range(3))
        o = tree_attention(q, k, v, *mask, scale=0.1)
        torch.testing.assert_close(o, tree_attention_reference(q, k, v, *mask, scale=0.1), rtol=1e-4, atol=1e-4)
        inputs = decode_case(63, 2, 2, 64, 20, 5, torch.float32, "cuda:1")
        o = tree_decode(*inputs, scale=0.1)
        truth = tree_decode_reference(*inputs, scale=0.1)
        torch.testing.assert_close(o, truth, rtol=1e-4, atol=1e-4)
        assert torch.cuda.current_device() == 0
