"""The Triton kernels under Triton's interpreter, against float64 references; and the block schedule.

TRITON_INTERPRET must be set before triton is imported, so `test_under_the_interpreter` runs the functions
named `case_*` in a process of their own. The interpreter's bfloat16 dot multiplies raw bits: float32 and
float16 here.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from swirl.kernels import _triton, cpu, schedule
from swirl.kernels.geglu import geglu, geglu_reference
from swirl.kernels.head_draw import head_draw, head_draw_reference, head_logits, tempered
from swirl.kernels.linear_log_prob import _ChunkedLinearLogProb, linear_log_prob, linear_log_prob_reference
from swirl.kernels.norm_rope import norm_rope, norm_rope_reference
from swirl.kernels.rms_norm import norm_add_norm, norm_add_norm_reference, rms_norm, rms_norm_reference
from swirl.kernels.rope import rope, rope_reference
from swirl.kernels.tree_attention import _CONFIGS, tree_attention, tree_attention_reference, tree_mask
from swirl.kernels.tree_decode import tree_decode, tree_decode_reference
from tests.kernels.decoding import decode_case

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


QUICK = "(rms_norm and not 200) or geglu or layers_share or repeats_bitwise or d_hidden or (head_draw and 1-8-3)"


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("cases", [QUICK, pytest.param("case", marks=pytest.mark.slow)], ids=["quick", "all"])
def test_under_the_interpreter(cases):
    command = [sys.executable, "-m", "pytest", "-q", "-o", "python_functions=case_*", "-k", cases, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def forest(T, seed):
    """A random forest in depth-first order: subtree_end and position_ids, (T,) int32."""
    generator = torch.Generator().manual_seed(seed)
    subtree_end, position_ids, path = [0] * T, [0] * T, []
    for token in range(T):
        if path and torch.rand((), generator=generator) < 0.15:
            keep = int(torch.randint(0, len(path), (), generator=generator))
            for closed in path[keep:]:
                subtree_end[closed] = token
            path = path[:keep]
        position_ids[token] = len(path)
        path.append(token)
    for open_still in path:
        subtree_end[open_still] = T
    return torch.tensor(subtree_end, dtype=torch.int32), torch.tensor(position_ids, dtype=torch.int32)


@pytest.mark.parametrize("rows", ["queries", "keys"])
@pytest.mark.parametrize("T", [1, 63, 1000])
@pytest.mark.parametrize("window", [None, 7])
def test_schedule_visits_every_visible_pair_and_masks_where_it_must(T, window, rows):
    subtree_end, position_ids = forest(T, seed=T)
    mask = tree_mask(subtree_end, position_ids, window)
    block_q, block_k = 16, 32
    blocks = schedule.build(subtree_end, position_ids, block_q, block_k, window, rows)
    visited, unmasked = torch.zeros_like(mask), torch.zeros_like(mask)
    for row in range(blocks.columns.shape[0]):
        num_live, num_full = int(blocks.num_live[row]), int(blocks.num_full[row])
        for n, column in enumerate(blocks.columns[row, :num_live].tolist()):
            q, k = (row, column) if rows == "queries" else (column, row)
            pairs = slice(q * block_q, (q + 1) * block_q), slice(k * block_k, (k + 1) * block_k)
            visited[pairs] = True
            unmasked[pairs] = n < num_full
            assert n >= num_full or mask[pairs].shape == (block_q, block_k)
    assert bool((mask <= visited).all()) and bool((unmasked <= mask).all())
    assert sorted(blocks.order.tolist()) == list(range(blocks.columns.shape[0]))
    assert bool((blocks.num_live[blocks.order.long()].diff() <= 0).all())


@pytest.mark.parametrize("T", [1, 63, 1000])
def test_live_blocks_are_numbered_once_alike_from_both_sides(T):
    mask = (*forest(T, seed=T), 16, 32, 7)
    by_queries, by_keys = schedule.build(*mask, "queries"), schedule.build(*mask, "keys")
    blocks = schedule.number_live_blocks(*mask)
    numbers = {}
    for row, num_live in enumerate(by_queries.num_live.tolist()):
        for n, column in enumerate(by_queries.columns[row, :num_live].tolist()):
            numbers[row, column] = int(blocks.first[row]) + n
    assert sorted(numbers.values()) == list(range(blocks.count))
    for row, num_live in enumerate(by_keys.num_live.tolist()):
        for n, column in enumerate(by_keys.columns[row, :num_live].tolist()):
            assert int(blocks.by_keys[row, n]) == numbers.pop((column, row))
    assert not numbers


def test_schedule_of_separate_trees_is_block_diagonal():
    subtree_end = torch.arange(64, 513, 64, dtype=torch.int32).repeat_interleave(64)
    position_ids = torch.arange(64, dtype=torch.int32).repeat(8)
    blocks = schedule.build(subtree_end, position_ids, 32, 32, None, "queries")
    assert blocks.num_live.tolist() == [1, 2] * 8 and blocks.num_full.tolist() == [0, 1] * 8


def test_schedule_is_built_once_a_batch_and_again_when_the_batch_is_written_to():
    subtree_end, position_ids = forest(100, seed=0)
    first = schedule.schedule_of(subtree_end, position_ids, 16, 16, 9, "keys")
    assert schedule.schedule_of(subtree_end, position_ids, 16, 16, 9, "keys") is first
    assert schedule.schedule_of(subtree_end, position_ids, 16, 16, 8, "keys") is not first
    position_ids.add_(0)
    assert schedule.schedule_of(subtree_end, position_ids, 16, 16, 9, "keys") is not first


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever is allocated without values holds NaN (or 0x7FFF) until a kernel writes it. No C++ stands in."""
    monkeypatch.setattr(cpu, "_extension", lambda: None)

    def poison(allocate):
        def allocated(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else 0x7FFF)

        return allocated

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


def hold(op, reference, inputs, tolerance, num_outputs=1):
    """Outputs and gradients of op on `inputs` against those of `reference` on the same in float64."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, truth = op(*inputs), reference(*wide)
    got, truth = (got, truth) if num_outputs > 1 else ((got,), (truth,))
    weights = [torch.randn(y.shape, dtype=torch.float64) for y in truth]
    gradients = torch.autograd.grad(sum((y * w.to(y.dtype)).sum() for y, w in zip(got, weights)), inputs)
    true_gradients = torch.autograd.grad(
        sum((y * w.to(x.dtype).double()).sum() for y, x, w in zip(truth, got, weights)), wide
    )
    for x, y in zip((*got, *gradients), (*truth, *true_gradients)):
        error = (x.double() - y).norm()
        assert error <= tolerance * max(y.norm(), 0.1 * y.numel() ** 0.5), f"{error:.1e} of {y.norm():.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("T", "Hq", "Hkv", "D", "softcap", "window"),
    [
        (1, 2, 1, 32, 50.0, None),
        (97, 4, 2, 32, 50.0, None),
        (129, 2, 2, 40, None, 9),
        (97, 4, 1, 32, None, None),
        (97, 6, 1, 32, 50.0, 9),
        (63, 2, 1, 256, None, 20),
        (63, 2, 1, 256, 3.0, 20),
    ],
)
def case_tree_attention(poisoned, dtype, T, Hq, Hkv, D, softcap, window):
    torch.manual_seed(T)
    mask = forest(T, seed=T)
    settings = dict(scale=2 * D**-0.5, softcap=softcap, window=window)
    inputs = [torch.randn(T, heads, D).to(dtype) for heads in (Hq, Hkv, Hkv)]
    op = lambda *x: tree_attention(*x, *mask, **settings)  # noqa: E731
    assert "TreeAttention" in str(op(*(x.requires_grad_() for x in inputs)).grad_fn) or D == 40
    hold(op, lambda *x: tree_attention_reference(*x, *mask, **settings), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("architecture", [80, 90])
def case_tree_attention_in_every_tile_shape(poisoned, monkeypatch, architecture):
    torch.manual_seed(0)
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    mask = forest(200, seed=3)
    for D, softcap in ((64, 50.0), (128, 50.0), (128, None), (256, 50.0), (256, None)):
        inputs = [torch.randn(200, heads, D).half() for heads in (2 if D == 256 else 4, 1, 1)]
        settings = dict(scale=D**-0.5, softcap=softcap, window=30)
        hold(
            lambda *x, s=settings: tree_attention(*x, *mask, **s),
            lambda *x, s=settings: tree_attention_reference(*x, *mask, **s),
            inputs,
            TOLERANCE[torch.float16],
        )


def case_scores_without_a_softcap_may_be_of_any_size(poisoned):
    """Hundreds, rising and falling along a row: more than exp takes in float32 unless the maximum runs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(130, 2, 64) for _ in range(3))
    k *= torch.linspace(-20, 30, 130)[:, None, None]
    mask, settings = forest(130, seed=2), dict(scale=1.0, window=100)
    scores = torch.einsum("ihd,jhd->hij", q, k)
    assert scores.abs().max() > 500
    o = tree_attention(q, k, v, *mask, **settings)
    truth = tree_attention_reference(q.double(), k.double(), v.double(), *mask, **settings)
    reference = tree_attention_reference(q, k, v, *mask, **settings)
    assert (o - truth).norm() <= 2 * (reference - truth).norm() + 1e-5 * truth.norm()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("key_heads_at_a_time", "softcap"), [(0, 5.0), (0, None), (1, None), (2, 5.0)])
def case_key_gradients_from_what_is_stored_and_anew(poisoned, monkeypatch, architecture, key_heads_at_a_time, softcap):
    """Three key heads: all anew, one by one, or two and then one; 0 finds no room for any."""
    torch.manual_seed(0)
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    mask = forest(300, seed=1)
    configs = _CONFIGS[architecture, 2][256]
    num_blocks = schedule.live_blocks_of(*mask, configs.dq.block_q, configs.stored.block_k, 100).count
    room = key_heads_at_a_time * 2 * 2 * 2 * num_blocks * configs.dq.block_q * configs.stored.block_k
    monkeypatch.setattr("swirl.kernels.tree_attention.SCRATCH_BYTES", room + 1)
    settings = dict(scale=256**-0.5, softcap=softcap, window=100)
    hold(
        lambda *x: tree_attention(*x, *mask, **settings),
        lambda *x: tree_attention_reference(*x, *mask, **settings),
        [torch.randn(300, heads, 256).half() for heads in (6, 3, 3)],
        TOLERANCE[torch.float16],
    )


def case_layers_share_a_schedule_that_goes_with_the_batch(monkeypatch):
    built, build = [], schedule.build
    monkeypatch.setattr(schedule, "build", lambda *x: built.append(x[2:]) or build(*x))
    before, (subtree_end, position_ids) = len(schedule._kept), forest(50, seed=0)
    x = [torch.randn(50, 1, 32).half().requires_grad_() for _ in range(3)]
    for layer in range(4):
        window = 10 if layer % 2 == 0 else None
        tree_attention(*x, subtree_end, position_ids, scale=0.1, window=window).sum().backward()
    assert len(built) == len(set(built)) == 4  # by queries and by keys, with the window and without
    assert len(schedule._kept) == before + 1
    built.clear()
    del subtree_end
    gc.collect()
    assert len(schedule._kept) == before


def case_tree_attention_repeats_bitwise_and_ignores_other_branches(poisoned):
    torch.manual_seed(0)
    subtree_end = torch.tensor([96] * 32 + [64] * 32 + [96] * 32, dtype=torch.int32)
    position_ids = torch.cat([torch.arange(64), torch.arange(32, 64)]).int()
    q, k, v = (torch.randn(96, 2, 32) for _ in range(3))
    run = lambda: tree_attention(q, k, v, subtree_end, position_ids, scale=0.2, softcap=50.0)  # noqa: E731
    before = run()
    assert torch.equal(before, run())
    k[32:64], v[32:64] = torch.randn(2, 32, 2, 32)
    after = run()
    assert torch.equal(before[64:], after[64:]) and not torch.equal(before[32:64], after[32:64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize(
    ("M", "d", "V", "softcap"),
    [(1, 8, 3, 30.0), (100, 72, 1000, 30.0), (131, 136, 700, None), (63, 64, 256, 5.0)],
)
def case_linear_log_prob(poisoned, monkeypatch, dtype, return_entropy, M, d, V, softcap):
    torch.manual_seed(M)
    monkeypatch.setattr("swirl.kernels.linear_log_prob.EXTRA_BYTES", 0)  # the smallest chunks
    target_ids = torch.randint(0, V, (M,))
    settings = dict(softcap=softcap, return_entropy=return_entropy)
    inputs = [torch.randn(M, d).to(dtype), (0.3 * torch.randn(V, d)).to(dtype)]
    op = lambda *x: linear_log_prob(*x, target_ids, **settings)  # noqa: E731
    reference = lambda *x: linear_log_prob_reference(*x, target_ids, **settings)  # noqa: E731
    monkeypatch.setattr(_ChunkedLinearLogProb, "apply", None)  # the kernels take all of these
    hold(op, reference, inputs, TOLERANCE[dtype], 1 + return_entropy)


def case_d_hidden_is_the_same_to_the_bit_wherever_chunks_end(poisoned):
    torch.manual_seed(0)
    M, d, V = 40, 64, 3000
    hidden, weight = torch.randn(M, d).half(), (0.3 * torch.randn(V, d)).half()
    target_ids, gradients = torch.randint(0, V, (M,)), []
    for extra_bytes in (0, 1 << 30):  # three chunks, one
        x = hidden.clone().requires_grad_()
        linear_log_prob(x, weight, target_ids, softcap=30.0, extra_bytes=extra_bytes).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_entropy_on_the_chunked_path():
    torch.manual_seed(0)
    target_ids = torch.randint(0, 300, (50,))
    settings = dict(softcap=30.0, return_entropy=True)
    hold(
        lambda *x: linear_log_prob(*x, target_ids, **settings),
        lambda *x: linear_log_prob_reference(*x, target_ids, **settings),
        [torch.randn(50, 24).double(), torch.randn(300, 24).double()],
        1e-10,
        num_outputs=2,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (63, 100), (200, 256)])
def case_rms_norm(poisoned, dtype, rows, d):
    torch.manual_seed(rows)
    x, weight, residual = (
        torch.randn(rows, d).to(dtype),
        torch.randn(d).to(dtype),
        torch.randn(rows, d).to(dtype),
    )
    hold(rms_norm, rms_norm_reference, [x, weight], TOLERANCE[dtype])
    hold(
        lambda x, weight, residual: rms_norm(x, weight, residual=residual),
        lambda x, weight, residual: rms_norm_reference(x, weight, residual=residual),
        [x, weight, residual],
        TOLERANCE[dtype],
    )
    inputs = [x, weight, residual, torch.randn(d).to(dtype)]
    hold(norm_add_norm, norm_add_norm_reference, inputs, TOLERANCE[dtype], num_outputs=2)
    total, normed = norm_add_norm(*inputs)
    assert torch.equal(total, rms_norm(x, weight, residual=residual))
    assert torch.equal(normed, rms_norm(total, inputs[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 2), (63, 3, 40), (10, 2, 256)])
def case_rope(poisoned, dtype, T, H, D):
    torch.manual_seed(T)
    position_ids = torch.randint(0, 100, (T,), dtype=torch.int32)
    op, reference = (lambda x, f=f: f(x, position_ids) for f in (rope, rope_reference))
    hold(op, reference, [torch.randn(T, H, D).to(dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "H", "D"), [(1, 1, 2), (63, 3, 40), (10, 2, 256)])
def case_norm_rope(poisoned, dtype, T, H, D):
    torch.manual_seed(T)
    settings = dict(position_ids=torch.randint(0, 100, (T,), dtype=torch.int32), theta=500.0, factor=2.0, eps=1e-4)
    op, reference = (lambda x, w, f=f: f(x, w, **settings) for f in (norm_rope, norm_rope_reference))
    assert "_NormRope" in str(op(torch.ones(T, H, D).to(dtype).requires_grad_(), torch.ones(D).to(dtype)).grad_fn)
    hold(op, reference, [torch.randn(T, H, D).to(dtype), torch.randn(D).to(dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (63, 65), (2, 3, 1000)])
def case_geglu(poisoned, dtype, shape):
    torch.manual_seed(0)
    hold(
        geglu,
        geglu_reference,
        [(3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)],
        TOLERANCE[dtype],
    )


def case_geglu_far_out(poisoned):
    gate = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    truth = torch.tensor([0.0, 0.0, 0.0, 30.0, 1e4])
    torch.testing.assert_close(geglu(gate, torch.ones(5)), truth, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("window", [None, 6, 25])
def test_decode_is_tree_attention_of_the_last_tokens(window):
    """What decoding means, by tree attention: the states' tree, then each sequence's own tokens as a subtree of it."""
    q, keys, values, slots, end, position, states, own_slots, own_lengths = decode_case(9, 4, 2, 8, 30, 7)
    settings = dict(scale=0.3, softcap=5.0, window=window)
    o = tree_decode_reference(q, keys, values, slots, end, position, states, own_slots, own_lengths, **settings)
    for b, (s, n) in enumerate(zip(states.tolist(), own_lengths.tolist())):
        path = [j for j in range(s + 1) if s < end[j]]
        of_sequence = [*slots[path].tolist(), *own_slots[b, :n].tolist()]
        T = len(of_sequence)
        queries = torch.zeros(T, 4, 8, dtype=torch.float64)
        queries[-1] = q[b]
        mask = torch.full((T,), T, dtype=torch.int32), torch.arange(T, dtype=torch.int32)
        truth = tree_attention_reference(queries, keys[of_sequence], values[of_sequence], *mask, **settings)[-1]
        torch.testing.assert_close(o[b], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "D", "depth", "N"), [(1, 1, 1, 32, 1, 1), (5, 4, 2, 64, 60, 40), (40, 4, 1, 32, 21, 3)]
)
def case_tree_decode(poisoned, dtype, window, softcap, B, Hq, Hkv, D, depth, N):
    inputs = decode_case(B, Hq, Hkv, D, depth, N, dtype)
    settings = dict(scale=D**-0.5, softcap=softcap, window=window)
    o = tree_decode(*inputs, **settings)
    truth = tree_decode_reference(*(x.double() for x in inputs[:3]), *inputs[3:], **settings)
    assert (o.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()
    assert torch.equal(o, tree_decode(*inputs, **settings))


def head_case(B, d, V, dtype, spread=0.3):
    """hidden, weight, uniforms at both ends and between, temperatures of 0, next to 0, common and enormous."""
    torch.manual_seed(B)
    uniforms = torch.rand(B, dtype=torch.float64)
    uniforms[::4], uniforms[1::4] = 0.0, 1 - 2**-53
    temperatures = torch.tensor([0.7, 1.0, 0.0, 1.3, 1e-300, 3.0, 1e300, 0.2], dtype=torch.float64)
    return (
        *(torch.randn(B, d).to(dtype), (spread * torch.randn(V, d)).to(dtype)),
        *(uniforms, temperatures.repeat(-(-B // 8))[:B]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("B", "d", "V", "softcap"), [(1, 8, 3, 30.0), (9, 72, 1000, 30.0), (67, 64, 300, None), (16, 64, 256, 5.0)]
)
def case_head_draw(poisoned, dtype, B, d, V, softcap):
    inputs = head_case(B, d, V, dtype)
    ids, log_probs = head_draw(*inputs, softcap=softcap)
    true_ids, truth = head_draw_reference(*(x.double() for x in inputs), softcap=softcap)
    assert ids.dtype == torch.int64 and log_probs.dtype == torch.float32
    # at a uniform of 0 or next to 1 the first or last entry is drawn whose probability is not 0, as rounding has it
    inside = (inputs[2] > 0) & (inputs[2] < 1 - 2**-53) | (inputs[3] == 0)
    assert int((ids != true_ids)[inside].sum()) == 0
    of_drawn = tempered(head_logits(*(x.double() for x in inputs[:2]), softcap), inputs[3]).log_softmax(-1)
    assert torch.equal(ids[inputs[3] == 1e-300], true_ids[inputs[3] == 1e-300])
    torch.testing.assert_close(
        log_probs.double(), of_drawn.gather(1, ids[:, None])[:, 0], rtol=TOLERANCE[dtype], atol=3e-5
    )


def case_head_draw_follows_the_distribution(poisoned, monkeypatch):
    """Every uniform of a grid through one row: each entry as often as its probability says, in its order."""
    n, V = 60, 150
    hidden, weight, *_ = head_case(1, 16, V, torch.float32)
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, _ = head_draw(hidden.expand(n, 16), weight, uniforms, torch.full((n,), 0.8, dtype=torch.float64))
    p = tempered(head_logits(hidden, weight, None), torch.tensor([0.8])).softmax(-1)[0]
    counts = torch.bincount(ids, minlength=V)
    assert bool((ids.diff() >= 0).all()) and float((counts - n * p).abs().max()) <= 1 + 1e-4


def case_head_draw_of_what_is_not_finite_has_no_log_prob(poisoned):
    hidden, weight, uniforms, temperatures = head_case(9, 64, 200, torch.float16)
    hidden[2, 5] = float("nan")
    hidden[6] = float("nan")
    ids, log_probs = head_draw(hidden, weight, uniforms, temperatures, softcap=30.0)
    assert bool(((ids >= 0) & (ids < 200)).all())
    assert log_probs.isnan().tolist() == [b in (2, 6) for b in range(9)]
    weight[150, 0] = float("nan")
    ids, log_probs = head_draw(hidden, weight, uniforms, temperatures, softcap=30.0)
    assert bool(log_probs.isnan().all()) and bool(((ids >= 0) & (ids < 200)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_head_draw_is_the_inverse_cdf(dtype):
    hidden, weight, uniforms, temperatures = head_case(24, 16, 97, dtype)
    ids, log_probs = head_draw(hidden, weight, uniforms, temperatures, softcap=30.0)
    logits = 30 * ((hidden.double() @ weight.double().T) / 30).tanh()
    for b, (uniform, temperature) in enumerate(zip(uniforms.tolist(), temperatures.tolist())):
        log_p = ((logits[b] - logits[b].max()) / (temperature or 1)).log_softmax(-1)
        assert log_probs[b] == pytest.approx(float(log_p[ids[b]]), abs=1e-4)
        beyond = log_p.exp().cumsum(0)
        if temperature == 0:
            assert ids[b] == logits[b].argmax()
        else:
            assert ids[b] == 0 or beyond[ids[b] - 1] <= uniform + 1e-6
            assert beyond[ids[b]] >= uniform - 1e-6


def test_kernel_files_import_and_serve_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from swirl.kernels.geglu import geglu\n"
        "from swirl.kernels import head_draw, linear_log_prob, rms_norm, rope, tree_attention, tree_decode\n"
        "assert geglu(torch.ones(2), torch.ones(2)).shape == (2,)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
