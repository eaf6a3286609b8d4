"""The C++ ops against the references in float64: forests, sizes, windows, dtypes, threads, instructions."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from swirl.kernels import cpu
from swirl.kernels.geglu import geglu_reference
from swirl.kernels.linear_log_prob import linear_log_prob, linear_log_prob_reference
from swirl.kernels.norm_rope import norm_rope, norm_rope_reference
from swirl.kernels.rms_norm import rms_norm_reference
from swirl.kernels.rope import angles, rope_reference
from swirl.kernels.tree_attention import tree_attention, tree_attention_reference

pytestmark = pytest.mark.skipif(not cpu.isas(), reason="the C++ ops are not built")


def forest(T, seed, branch=0.1, new_tree=0.02):
    """Random subtree_end, position_ids (T,) int32 of a forest in depth-first order."""
    rng = random.Random(seed)
    path, end, position = [], [T] * T, []
    for i in range(T):
        chance = rng.random()
        keep = len(path)
        if chance < new_tree:
            keep = 0
        elif chance < new_tree + branch:
            keep = rng.randint(0, len(path))
        for token in path[keep:]:
            end[token] = i
        del path[keep:]
        position.append(len(path))
        path.append(i)
    return torch.tensor(end, dtype=torch.int32), torch.tensor(position, dtype=torch.int32)


def tensors(T, Hq, Hkv, D, seed=0, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(T, Hq, D), (T, Hkv, D), (T, Hkv, D), (T, Hq, D)]
    normal = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(size * x).to(dtype) for x in normal]


def run(op, q, k, v, d_out, mask, **options):
    """Output and the three gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = op(*leaves, *mask, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def truth(q, k, v, d_out, mask, **options):
    return run(tree_attention_reference, *(x.double() for x in (q, k, v, d_out)), mask, **options)


def error(*inputs, **options):
    """Largest error of output and gradients, as a share of the largest value (1 where that is less)."""
    results, expected = run(tree_attention, *inputs, **options), truth(*inputs, **options)
    return share_of_largest(results, expected)


def share_of_largest(results, expected):
    assert all(x.isfinite().all() for x in results)
    errors = [(x.double() - y).abs().max() / y.abs().max().clamp_min(1) for x, y in zip(results, expected)]
    return max(errors).item()


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0, 500.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_every_instruction_set_agrees_with_the_reference(monkeypatch, isa, window, softcap, dtype, tolerance):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    mask = forest(200, seed=1)
    inputs = tensors(200, 4, 2, 32, dtype=dtype, size=2.0)
    assert error(*inputs, mask, scale=0.3, softcap=softcap, window=window) < tolerance


@pytest.mark.parametrize("T", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("Hq,Hkv,D", [(1, 1, 8), (4, 1, 32), (4, 2, 64), (2, 2, 96), (4, 2, 5), (2, 1, 256)])
def test_sizes(T, Hq, Hkv, D):
    mask = forest(T, seed=T)
    inputs = tensors(T, Hq, Hkv, D, seed=D)
    assert error(*inputs, mask, scale=D**-0.5, softcap=50.0, window=40) < 4e-6


@pytest.mark.parametrize("D, window", [(256, 512), (128, 1024)])
def test_gemma_3_shapes(D, window):
    """No softcap, scores of tens that rise along a row (the maximum runs), the windows and heads of the checkpoints."""
    T = window + 200
    q, k, v, d_out = tensors(T, 2, 1, D)
    k *= torch.linspace(0.1, 3, T)[:, None, None]
    for mask in forest(T, 1, branch=0.003, new_tree=0), forest(T, 2, branch=0.05, new_tree=0.01):
        assert error(q, k, v, d_out, mask, scale=4 * D**-0.5, window=window) < 1e-5
        assert error(q, k, v, d_out, mask, scale=4 * D**-0.5) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_forests_of_every_kind(seed):
    """Chains, bushes of one-token branches, many small trees; windows shorter than they are deep."""
    branch, new_tree = [(0, 0), (0.9, 0), (0.1, 0.3), (0.02, 0.003), (0.5, 0.01), (0, 1)][seed]
    mask = forest(330, seed, branch, new_tree)
    inputs = tensors(330, 2, 1, 32, seed)
    for window in (None, 1, 100):
        for softcap in (20.0, None):
            assert error(*inputs, mask, scale=0.2, softcap=softcap, window=window) < 2e-6


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [32, 7])
@pytest.mark.parametrize("softcap", [50.0, None])
def test_half_precision_is_no_worse_than_the_reference(monkeypatch, isa, dtype, D, softcap):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    mask = forest(300, seed=3)
    *inputs, d_out = tensors(300, 4, 2, D, dtype=dtype)
    options = dict(scale=D**-0.5, softcap=softcap, window=60)
    expected = truth(*inputs, d_out, mask, **options)
    ours = run(tree_attention, *inputs, d_out, mask, **options)
    reference = run(tree_attention_reference, *inputs, d_out, mask, **options)
    for mine, theirs, exact in zip(ours, reference, expected):
        assert mine.dtype == dtype
        scale = exact.abs().max()
        assert (mine.double() - exact).abs().max() <= (theirs.double() - exact).abs().max() + 1e-5 * scale
        assert (mine.double() - exact).square().mean() <= (theirs.double() - exact).square().mean() * 1.001


def test_scores_at_the_cap_and_far_beyond():
    mask = forest(150, seed=5)
    *inputs, d_out = tensors(150, 2, 2, 32, size=30.0)
    for softcap in (30.0, 50.0, 64.0, 65.0, None):
        options = dict(scale=1.0, softcap=softcap)
        results = run(tree_attention, *inputs, d_out, mask, **options)
        reference = run(tree_attention_reference, *inputs, d_out, mask, **options)
        expected = truth(*inputs, d_out, mask, **options)
        for mine, theirs, exact in zip(results, reference, expected):
            scale = exact.abs().max()
            assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-5 * scale + 1e-5


def test_inputs_that_are_not_contiguous():
    mask = forest(100, seed=6)
    fused = torch.randn(100, 8, 3, 32)
    q, k, v = fused[:, :4, 0], fused[:, ::4, 1], fused[:, 1::4, 2]
    d_out = torch.randn(4, 100, 32).transpose(0, 1)
    ends = torch.stack(mask, 1).long()
    options = dict(scale=0.2, softcap=None)
    assert error(q, k, v, d_out, (ends[:, 0], ends[:, 1]), **options) < 2e-6


def test_the_thread_count_changes_no_bit():
    mask = forest(700, seed=7)
    *inputs, d_out = tensors(700, 4, 2, 32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(tree_attention, *inputs, d_out, mask, scale=0.2, softcap=50.0, window=90))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


@pytest.mark.parametrize("softcap", [50.0, None])
def test_tokens_out_of_sight_change_no_bit(softcap):
    """Three branches on a trunk: new keys and values in the second leave the others' outputs as they were."""
    T, second = 210, slice(97, 150)
    end = torch.full((T,), T, dtype=torch.int32)
    end[50:97], end[second], end[150:] = 97, 150, T
    depth = torch.arange(T, dtype=torch.int32)
    depth[second] -= 47
    depth[150:] -= 100
    q, k, v, _ = tensors(T, 4, 2, 32)
    options = dict(scale=0.2, softcap=softcap)
    before = tree_attention(q, k, v, end, depth, **options)
    for x in (q, k, v):
        x[second] = torch.randn_like(x[second]) * 3
    after = tree_attention(q, k, v, end, depth, **options)
    assert not torch.equal(before[second], after[second])
    assert torch.equal(before[:97], after[:97]) and torch.equal(before[150:], after[150:])


def poison(monkeypatch):
    """Outputs are allocated empty; from here on they come full of NaN."""

    def poisoned(allocate):
        return lambda *args, **options: allocate(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def test_nothing_is_left_from_uninitialised_memory(monkeypatch):
    poison(monkeypatch)
    mask = forest(70, seed=8)
    *inputs, d_out = tensors(70, 2, 1, 20)
    results = run(tree_attention, *inputs, d_out, mask, scale=0.2, softcap=50.0)
    monkeypatch.undo()
    assert share_of_largest(results, truth(*inputs, d_out, mask, scale=0.2, softcap=50.0)) < 2e-6


def test_no_tokens():
    q = torch.empty(0, 2, 8, requires_grad=True)
    mask = (torch.empty(0, dtype=torch.int32),) * 2
    out = tree_attention(q, q, q, *mask, scale=1.0)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 2, 8)


def test_hostile_masks_stay_in_bounds():
    """Ends and positions that no packing makes: no crash, and tokens that are sound keep their values."""
    q, k, v, _ = tensors(90, 2, 1, 16)
    end, position = forest(90, seed=9)
    sound = tree_attention(q, k, v, end, position, scale=0.2, window=2**31 - 1)
    assert torch.equal(sound, tree_attention(q, k, v, end, position, scale=0.2))
    end[80:] = torch.tensor([2**31 - 1, -(2**31), 0, -1, 90, 91, 2**31 - 1, 0, 0, 90])
    position[80:] = 2**31 - 1
    out = tree_attention(q, k, v, end, position, scale=0.2, softcap=50.0, window=5)
    assert out.shape == q.shape and out[:80].isfinite().all()


def test_the_module_refuses_what_does_not_fit():
    from swirl.kernels import _cpu

    q, k, v, out = tensors(8, 2, 1, 4)
    mask, softmax, rest = forest(8, 0), torch.empty(2, 2, 8), (1.0, 0.0, 0, 1, "")
    with pytest.raises(ValueError, match="choose from .*plain"):
        _cpu.tree_attention_fwd(q, k, v, *mask, out, softmax, None, *rest[:-1], "sse9")
    with pytest.raises(ValueError, match="v has not the shape"):
        _cpu.tree_attention_fwd(q, k, v[:7].contiguous(), *mask, out, softmax, None, *rest)
    with pytest.raises(ValueError, match="subtree_end"):
        _cpu.tree_attention_fwd(q, k, v, mask[0].long(), mask[1], out, softmax, None, *rest)
    with pytest.raises(ValueError, match="float32, float64 or bfloat16"):
        _cpu.tree_attention_fwd(q.half(), k.half(), v.half(), *mask, out.half(), softmax, None, *rest)
    with pytest.raises(ValueError, match="multiple"):
        _cpu.tree_attention_fwd(k, q, q, *mask, v, softmax[:, :1].contiguous(), None, *rest)


def test_absent_ops_say_so_once_and_the_reference_serves(monkeypatch):
    q, k, v, _ = tensors(20, 2, 1, 8)
    mask = forest(20, 0)
    expected = tree_attention_reference(q, k, v, *mask, scale=0.3)
    monkeypatch.setitem(__import__("sys").modules, "swirl.kernels._cpu", None)
    monkeypatch.delattr("swirl.kernels._cpu", raising=False)
    cpu._extension.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slow reference") as record:
            results = [tree_attention(q, k, v, *mask, scale=0.3) for _ in range(2)]
        assert len(record) == 1
        assert all(torch.equal(x, expected) for x in results)
    finally:
        monkeypatch.undo()
        cpu._extension.cache_clear()


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("M,N,K", [(1, 1, 1), (7, 64, 33), (64, 128, 32), (530, 70, 100), (257, 160, 5)])
def test_linear(monkeypatch, isa, M, N, K):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    x, w, dy = (torch.randn(shape, dtype=torch.float64) for shape in ((M, K), (N, K), (M, N)))
    leaves = [x.float().requires_grad_(), w.float().requires_grad_()]
    y = cpu.linear(*leaves)
    results = [y.detach(), *torch.autograd.grad(y, leaves, dy.float())]
    expected = [x @ w.T, dy @ w, dy.T @ x]
    assert [r.shape for r in results] == [e.shape for e in expected]
    assert share_of_largest(results, expected) < 2e-6


def test_linear_keeps_rows_apart_and_ignores_threads():
    x, w, dy = torch.randn(3, 101, 48), torch.randn(96, 48), torch.randn(3, 101, 96)
    leaves = [x.requires_grad_(), w.requires_grad_()]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = cpu.linear(*leaves)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, three) for one, three in zip(*results))
    other = x.detach().clone()
    other[1] = torch.randn(101, 48)
    y = cpu.linear(other, w)
    assert torch.equal(y[::2], results[0][0][::2]) and not torch.equal(y[1], results[0][0][1])
    assert torch.equal(cpu.linear(x[1, 5:70], w), results[0][0][1, 5:70])  # nor on where it lies


def test_linear_is_offered_where_it_is_the_faster():
    w = torch.randn(32, 48)
    fast = any("avx512" in isa for isa in cpu.isas())
    assert cpu.supports_linear(torch.randn(2, 50, 48), w) == fast
    assert not cpu.supports_linear(torch.randn(5, 48), w)
    assert not cpu.supports_linear(torch.randn(100, 48).bfloat16(), w.bfloat16())
    assert not cpu.supports_linear(torch.randn(100, 2), torch.empty(1 << 21, 2))


def head(M, d, V, seed=0, dtype=torch.float32):
    """hidden, weight, target_ids and the gradients of log-probs and entropies; logits of some units."""
    generator = torch.Generator().manual_seed(seed)
    normal = [torch.randn(shape, generator=generator) for shape in ((M, d), (V, d), (M,), (M,))]
    target_ids = torch.randint(0, V, (M,), generator=generator)
    return normal[0].to(dtype), (normal[1] * 2 * d**-0.5).to(dtype), target_ids, *normal[2:]


def run_head(op, hidden, weight, target_ids, d_log_probs, d_entropies, softcap, entropy):
    """Log-probs, entropies where wanted, and the gradients of hidden and weight."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    out = op(*leaves, target_ids, softcap=softcap, return_entropy=entropy)
    out = out if entropy else (out,)
    loss = sum((x * dx.to(x)).sum() for x, dx in zip(out, (d_log_probs, d_entropies)))
    return [x.detach() for x in out] + list(torch.autograd.grad(loss, leaves))


def true_head(hidden, weight, *rest):
    return run_head(linear_log_prob_reference, hidden.double(), weight.double(), *rest)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0, 30.0, 500.0])
def test_log_probs_agree_with_the_reference(monkeypatch, isa, softcap, entropy):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    monkeypatch.setattr(cpu, "isas", lambda: ["avx2"])  # offered whatever this machine has
    problem = *head(130, 33, 1100), softcap, entropy
    assert share_of_largest(run_head(linear_log_prob, *problem), true_head(*problem)) < 1e-6


@pytest.mark.parametrize(
    "M, d, V",
    [(1, 1, 1), (1, 63, 63), (63, 128, 1000), (65, 1, 2048), (64, 2304, 63), (1000, 5, 64), (3, 16, 256_000)],
)
def test_log_probs_at_odd_sizes(M, d, V):
    for softcap, entropy in (30.0, True), (None, False):
        problem = *head(M, d, V), softcap, entropy
        assert share_of_largest(run_head(linear_log_prob, *problem), true_head(*problem)) < 2e-6


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("M, d, V, softcap", [(100, 64, 1500, 30.0), (70, 7, 300, None)])
def test_log_probs_of_bfloat16_are_no_worse_than_the_reference(monkeypatch, isa, M, d, V, softcap):
    """The reference computes in float32 and rounds gradients once: nothing but the order of its sums may differ."""
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    monkeypatch.setattr(cpu, "isas", lambda: ["avx2"])
    problem = *head(M, d, V, dtype=torch.bfloat16), softcap, True
    expected = true_head(*problem)
    ours, theirs = run_head(linear_log_prob, *problem), run_head(linear_log_prob_reference, *problem)
    for mine, reference, exact in zip(ours, theirs, expected):
        assert mine.dtype == reference.dtype
        rounding = 1e-6 * exact.abs().max()  # of float32
        assert (mine - exact).abs().max() <= (reference - exact).abs().max() + rounding
        assert (mine - exact).square().mean() <= (reference - exact).square().mean() * 1.001 + rounding**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [30.0, None])
def test_a_log_prob_depends_on_its_own_row_alone(dtype, softcap):
    """Not on other rows, on how many there are, on where it stands, or on the threads; nor do its gradients."""
    hidden, weight, *rest = head(200, 40, 1300, dtype=dtype)
    results = run_head(linear_log_prob, hidden, weight, *rest, softcap, True)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 5):
            torch.set_num_threads(threads)
            again = run_head(linear_log_prob, hidden, weight, *rest, softcap, True)
            assert all(torch.equal(x, y) for x, y in zip(results, again))
    finally:
        torch.set_num_threads(before)
    part = run_head(linear_log_prob, hidden[67:150], weight, *(x[67:150] for x in rest), softcap, True)
    assert all(torch.equal(x[67:150], y) for x, y in zip(results[:3], part))
    alone = run_head(linear_log_prob, hidden[9:10], weight, *(x[9:10] for x in rest), softcap, True)
    assert all(torch.equal(x[9:10], y) for x, y in zip(results[:3], alone))
    other = hidden.clone()
    other[67:] = float("nan")
    other = run_head(linear_log_prob, other, weight, *rest, softcap, True)
    assert all(torch.equal(x[:67], y[:67]) and y[67:].isnan().all() for x, y in zip(results[:3], other))
    without = run_head(linear_log_prob, hidden, weight, *rest, softcap, False)
    assert torch.equal(without[0], results[0])


@pytest.mark.parametrize("softcap", [30.0, 64.0, 65.0, None])
def test_log_probs_of_logits_far_out(monkeypatch, softcap):
    """Logits of thousands, where float32 holds three digits after the point: no further out than torch in chunks."""
    hidden, weight, *rest = head(60, 9, 500)
    problem = hidden * 1e3, weight, *rest, softcap, True
    results, expected = run_head(linear_log_prob, *problem), true_head(*problem)
    monkeypatch.setattr(cpu, "supports_linear_log_prob", lambda hidden, weight: False)
    chunked = run_head(linear_log_prob, *problem)
    for mine, theirs, exact in zip(results, chunked, expected):
        assert (mine - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6 * exact.abs().max()


def test_log_probs_lean_on_no_memory_left_behind(monkeypatch):
    """Outputs come poisoned, and the scratch memory full of a larger problem's NaN."""
    hidden, weight, *rest = head(200, 40, 1500)
    run_head(linear_log_prob, hidden * float("nan"), weight, *rest, 30.0, True)
    poison(monkeypatch)
    problem = *head(70, 20, 1050), 30.0, True
    results = run_head(linear_log_prob, *problem)
    monkeypatch.undo()
    assert share_of_largest(results, true_head(*problem)) < 1e-6


def test_log_prob_gradients_that_nobody_needs_are_not_made():
    hidden, weight, target_ids, d_log_probs, _ = problem = head(70, 20, 300)
    both = run_head(linear_log_prob, *problem, 30.0, False)
    for needed in (0, 1):
        leaves = [hidden.clone(), weight.clone()]
        leaves[needed].requires_grad_()
        linear_log_prob(*leaves, target_ids, softcap=30.0).backward(d_log_probs)
        assert torch.equal(leaves[needed].grad, both[1 + needed]) and leaves[1 - needed].grad is None


def test_log_prob_inputs_that_do_not_fit():
    from swirl.kernels import _cpu

    hidden, weight, target_ids, *_ = head(5, 4, 9)
    for wrong in (-1, 9, 2**40):
        hostile = target_ids.clone()
        hostile[3] = wrong
        with pytest.raises(ValueError, match=r"target_ids must lie in \[0, 9\)"):
            linear_log_prob(hidden, weight, hostile)
    log_z, rest = torch.empty(5), (0.0, 1, "")
    with pytest.raises(ValueError, match=r"must lie in \[0, V\)"):
        _cpu.linear_log_prob_fwd(hidden, weight, hostile, torch.empty(5), log_z, None, *rest)
    with pytest.raises(ValueError, match="target_ids has not the shape or dtype"):
        linear_log_prob(hidden, weight, target_ids.int())
    with pytest.raises(ValueError, match="weight has not the shape"):
        _cpu.linear_log_prob_fwd(hidden, weight[:, :3].contiguous(), target_ids, log_z, log_z, None, *rest)
    with pytest.raises(ValueError, match="out of range"):
        _cpu.linear_log_prob_fwd(hidden[:0], weight, target_ids[:0], log_z[:0], log_z[:0], None, *rest)
    with pytest.raises(ValueError, match="out of range"):
        linear_log_prob(hidden, weight, target_ids, softcap=-1.0)
    with pytest.raises(ValueError, match="go together"):
        _cpu.linear_log_prob_bwd(hidden, weight, target_ids, log_z, None, log_z, log_z, None, None, *rest)


def test_log_probs_hold_no_logits():
    """(M, V) logits would be 512 MB, thrice over."""
    code = """
import resource, torch
from swirl.kernels.linear_log_prob import linear_log_prob
def run(M, V):
    hidden, weight = torch.randn(M, 16).requires_grad_(), torch.randn(V, 16).requires_grad_()
    linear_log_prob(hidden, weight, torch.arange(M), softcap=30.0).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(-run(64, 64) + run(4096, 32_768))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 10  # KiB


def test_log_probs_are_offered_where_they_are_the_faster():
    hidden, weight, *_ = head(5, 4, 9)
    fast = any("avx" in isa for isa in cpu.isas())
    assert cpu.supports_linear_log_prob(hidden, weight) == fast
    assert cpu.supports_linear_log_prob(hidden.bfloat16(), weight.bfloat16()) == fast
    for dtype in (torch.float64, torch.float16):
        assert not cpu.supports_linear_log_prob(hidden.to(dtype), weight.to(dtype))
    assert not cpu.supports_linear_log_prob(hidden.bfloat16(), weight)
    assert not cpu.supports_linear_log_prob(hidden[:0], weight)


def compare(op, reference, leaves, dy, tolerance=2e-6):
    """Value and gradients of op in float32 against the reference's in float64."""
    leaves = [x.requires_grad_() for x in leaves]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y, expected = op(*leaves), reference(*wide)
    results = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    truths = [expected.detach(), *torch.autograd.grad(expected, wide, dy.double())]
    assert [r.shape for r in results] == [t.shape for t in truths]
    assert share_of_largest(results, truths) < tolerance


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("shape", [(1, 16), (65, 128), (3, 50, 48)])
def test_pointwise(monkeypatch, isa, shape):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    x, up, dy, weight = *torch.randn(3, *shape), torch.randn(shape[-1])
    assert cpu.supports_pointwise(x, weight)
    compare(cpu.rms_norm, rms_norm_reference, [x * 3, weight], dy)
    compare(cpu.rms_norm, rms_norm_reference, [x * 1e-4, weight], dy * 1e-4)  # eps counts
    compare(cpu.geglu, geglu_reference, [x * 3, up], dy)
    compare(cpu.geglu, geglu_reference, [x * 30, up], dy)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("T,H,D", [(1, 1, 32), (37, 3, 64)])
def test_rope(monkeypatch, isa, T, H, D):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    positions = torch.randint(0, 5000, (T,))
    angle = positions[:, None].double() * 10_000.0 ** (-torch.arange(D // 2).double() / (D / 2))
    cos, sin = angle.cos().float(), angle.sin().float()
    x, dy = torch.randn(H, T, D).transpose(0, 1), torch.randn(H, T, D).transpose(0, 1)
    compare(lambda x: cpu.rope(x, cos, sin), lambda x: rope_reference(x, positions), [x], dy)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("T,H,D", [(1, 1, 32), (37, 3, 64), (150, 2, 256)])
def test_norm_rope(monkeypatch, isa, T, H, D):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    positions, settings = torch.randint(0, 5000, (T,)), dict(theta=777.0, factor=4.0)
    # float32 angles of a few hundred are an ulp of them off: what the rotation makes of those is rope's own test
    cos, sin = (x.float() for x in (angles(positions, D // 2, 777.0, 4.0, torch.float64).cos(),
                                    angles(positions, D // 2, 777.0, 4.0, torch.float64).sin()))  # fmt: skip
    x, dy, weight = torch.randn(H, T, D).transpose(0, 1), torch.randn(H, T, D).transpose(0, 1), torch.randn(D)
    reference = lambda x, weight: norm_rope_reference(x, weight, positions, **settings)  # noqa: E731
    for size in (3.0, 1e-4):  # of the latter, eps counts
        op = lambda x, weight: cpu.norm_rope(x, weight, cos, sin, eps=1e-6)  # noqa: E731
        compare(op, reference, [x * size, weight], dy * min(size, 1.0), tolerance=4e-6)


def test_the_thread_count_changes_no_bit_of_a_norm_with_rotation():
    x, dy, weight, positions = torch.randn(300, 3, 64), torch.randn(300, 3, 64), torch.randn(64), torch.arange(300)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [x.requires_grad_(), weight.requires_grad_()]
            y = norm_rope(*leaves, positions)
            assert "cpu" in type(y.grad_fn)._forward_cls.__module__
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


def test_pointwise_ops_are_offered_where_they_fit():
    x = torch.randn(4, 32)
    assert cpu.supports_pointwise(x) and not cpu.supports_pointwise(x.double())
    assert not cpu.supports_pointwise(x, x.bfloat16())
    assert not cpu.supports_pointwise(x[:, :24]) and not cpu.supports_pointwise(x[:0])
