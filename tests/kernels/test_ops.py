"""Each op's public function on the CPU: forward by a definition written anew, gradients by differences.

Fresh memory is filled with NaN throughout, so that nothing can lean on what `torch.empty` happens to hold.
"""

from __future__ import annotations

import collections
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swirl.kernels import cpu
from swirl.kernels import linear as linear_op
from swirl.kernels import linear_log_prob as head_op
from swirl.kernels.geglu import geglu, geglu_reference
from swirl.kernels.linear import linear, linear_reference
from swirl.kernels.linear_kl import linear_kl
from swirl.kernels.linear_log_prob import linear_log_prob, linear_log_prob_reference
from swirl.kernels.norm_rope import norm_rope, norm_rope_reference
from swirl.kernels.rms_norm import norm_add_norm, norm_add_norm_reference, rms_norm, rms_norm_reference
from swirl.kernels.rope import cos_and_sin, rope, rope_reference
from swirl.kernels.transfer import as_one, to_device
from swirl.kernels.tree_attention import tree_attention, tree_attention_reference, tree_mask

NARROW = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0, dtype=torch.float64, requires_grad=False):
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad)


def run(op, inputs, dtype, *rest, **options):
    """The output of `op` on inputs rounded to `dtype`, and its gradients under a fixed random weighting."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = op(*leaves, *rest, **options)
    y.backward(normal(*y.shape, seed=7).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_as_near_as_the_reference(op, reference, inputs, dtype, *rest, **options):
    """No further from float64 truth at the rounded inputs than the reference in `dtype`, and a few ulps.

    The ulps, of the result's own type, are for sums in another order.
    """
    inputs = [x.to(dtype) for x in inputs]
    truths = run(reference, inputs, torch.float64, *rest, **options)
    references = run(reference, inputs, dtype, *rest, **options)
    results = run(op, inputs, dtype, *rest, **options)
    for result, theirs, truth in zip(results, references, truths, strict=True):
        assert result.shape == truth.shape and result.dtype == theirs.dtype
        allowed = (theirs - truth).abs().max() + 4 * torch.finfo(result.dtype).eps * truth.abs().max()
        assert (result - truth).abs().max() <= allowed


# linear


@pytest.mark.parametrize("shape", [(32,), (63,), (5, 13)])
def test_bfloat16_products_go_through_float32_where_a_cpu_has_no_instructions_for_them(shape, monkeypatch):
    monkeypatch.setattr(linear_op, "_computes_bfloat16", lambda: False)
    monkeypatch.setattr(linear_op, "WIDE_ROWS", 20)  # the last piece is ragged
    x, weight = normal(*shape, 17), normal(11, 17)
    assert_as_near_as_the_reference(linear, linear_reference, [x, weight], torch.bfloat16)
    function = linear(x.bfloat16().requires_grad_(), weight.bfloat16()).grad_fn
    assert "WideLinear" in str((function, function.next_functions))


def test_a_frozen_weight_keeps_no_input_for_its_gradient(monkeypatch):
    monkeypatch.setattr(linear_op, "_computes_bfloat16", lambda: False)
    x, weight = normal(40, 6).bfloat16().requires_grad_(), normal(8, 6).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear(x, weight).sum().backward()
    assert kept == [weight.shape] and x.grad is not None


# rms_norm


@pytest.mark.parametrize("shape", [(1, 1), (63, 7), (1000, 5), (2, 3, 17)])
def test_rms_norm_is_its_formula(shape):
    x, weight = normal(*shape), normal(shape[-1])
    rows = []
    for row in x.view(-1, shape[-1]).tolist():
        rstd = 1 / math.sqrt(sum(a * a for a in row) / len(row) + 1e-3)
        rows.append([a * rstd * (1 + w) for a, w in zip(row, weight.tolist(), strict=True)])
    truth = torch.tensor(rows, dtype=torch.float64).view(shape)
    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), truth, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x, weight: rms_norm(x, weight, eps=1e-3),
        (normal(5, shape[-1], requires_grad=True), normal(shape[-1], requires_grad=True)),
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_rms_norm_casts_once(dtype):
    """Gemma's order: the product with 1 + weight is taken before the cast, not after it as in Llama."""
    x, weight = normal(63, 65, dtype=dtype), normal(65, dtype=dtype)
    once = rms_norm(x.float(), weight.float())
    assert rms_norm(x, weight).dtype == dtype
    assert torch.equal(rms_norm(x, weight), once.to(dtype))
    assert_as_near_as_the_reference(rms_norm, rms_norm_reference, [normal(63, 65), normal(65)], dtype)


def test_rms_norm_of_zeros_and_giants():
    weight = normal(9, dtype=torch.float32)
    assert torch.equal(rms_norm(torch.zeros(2, 9), weight), torch.zeros(2, 9))
    giant = torch.full((2, 9), 2e4, dtype=torch.float16)
    torch.testing.assert_close(rms_norm(giant, torch.zeros(9).half()), torch.ones(2, 9).half())
    with pytest.raises(ValueError, match=r"weight \(8,\) does not fit x \(2, 9\)"):
        rms_norm(torch.zeros(2, 9), torch.zeros(8))


# rope


@pytest.mark.parametrize("T, H, D", [(1, 1, 2), (63, 3, 6), (1000, 2, 4)])
def test_rope_turns_each_pair_as_a_complex_number(T, H, D):
    x, positions = normal(T, H, D), torch.arange(T, dtype=torch.int32) * 3 % 101
    frequency = torch.tensor([500.0 ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(T, D // 2).double(), positions[:, None] * frequency)
    turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn[:, None]
    torch.testing.assert_close(
        rope(x, positions, theta=500.0), torch.cat((turned.real, turned.imag), -1), rtol=1e-12, atol=1e-12
    )
    small = normal(4, H, D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([0, 5, 5, 900])), (small,))


def test_rope_dots_depend_on_distance_alone():
    q, k = normal(1, 1, 8).expand(50, 1, 8), normal(1, 1, 8, seed=1).expand(50, 1, 8)
    positions = torch.arange(50)
    near = (rope(q, positions + 3) * rope(k, positions)).sum(-1)
    far = (rope(q, positions + 1003) * rope(k, positions + 1000)).sum(-1)
    torch.testing.assert_close(near, near[:1].expand_as(near))
    torch.testing.assert_close(near, far)
    assert torch.equal(rope(q, torch.zeros(50)), q)


@pytest.mark.parametrize("dtype", NARROW)
def test_rope_narrow_types(dtype):
    """Positions are not rounded to the type: 8191 is not 8192, as it would be in bfloat16."""
    positions = torch.arange(8191 - 62, 8192)
    x = normal(63, 3, 10, dtype=dtype)
    assert torch.equal(rope(x, positions), rope(x.float(), positions).to(dtype))

    truth = rope(x.double(), positions)
    # float32 angles near 8191 carry half an ulp of it, 2.4e-4
    allowed = 2 * torch.finfo(dtype).eps * x.abs().max() + 2e-3
    assert (rope(x, positions).double() - truth).abs().max() <= allowed
    near, inputs = torch.arange(63), [normal(63, 3, 10)]
    assert_as_near_as_the_reference(lambda x: rope(x, near), lambda x: rope_reference(x, near), inputs, dtype)


def test_rope_refuses_shapes():
    with pytest.raises(ValueError, match="even D"):
        rope(torch.zeros(2, 1, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"position_ids \(3,\)"):
        rope(torch.zeros(2, 1, 4), torch.zeros(3))


def test_rope_divides_positions_by_its_factor():
    x, positions = normal(9, 2, 8), torch.arange(0, 72, 8)
    assert torch.equal(rope(x, positions, factor=8.0), rope(x, positions // 8))
    wide = normal(9, 2, 64, dtype=torch.float32)  # where C++ serves
    torch.testing.assert_close(rope(wide, positions, factor=8.0), rope(wide, positions // 8))


def test_cos_and_sin_are_made_once_a_batch_and_again_when_it_is_written_to():
    positions = torch.arange(5, dtype=torch.int32)
    first = cos_and_sin(positions, 4, 500.0, 2.0)
    assert all(a is b for a, b in zip(cos_and_sin(positions, 4, 500.0, 2.0), first, strict=True))
    for other in ((8, 500.0, 2.0), (4, 501.0, 2.0), (4, 500.0, 1.0)):
        assert cos_and_sin(positions, *other)[0] is not first[0]
    positions += 1
    assert not torch.equal(cos_and_sin(positions, 4, 500.0, 2.0)[0], first[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layers_share_cosines_and_sines_whatever_serves_them(dtype):
    q, positions = normal(9, 2, 64, dtype=dtype, requires_grad=True), torch.arange(9, dtype=torch.int32)
    with torch.inference_mode():  # a sampler's pass, say: what it leaves must do for a backward pass
        norm_rope(q.detach(), torch.ones(64, dtype=dtype), positions)
    count = _Count()
    with count:
        rope(q, positions).sum().backward()
        norm_rope(q, torch.ones(64, dtype=dtype), positions)
    assert count.names["cos"] == count.names["sin"] == count.names["arange"] == 0


class _Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, *NARROW])
@pytest.mark.parametrize("d", [9, 48])
def test_norm_add_norm_is_what_three_ops_give_to_the_bit(dtype, d):
    leaves = [normal(*shape, dtype=dtype, requires_grad=True) for shape in ((5, d), (d,), (5, d), (d,))]
    x, weight, residual, next_weight = leaves
    total, normed = norm_add_norm(*leaves, eps=1e-3)
    expected = residual + rms_norm(x, weight, eps=1e-3)
    assert torch.equal(total, expected) and torch.equal(normed, rms_norm(expected, next_weight, eps=1e-3))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(
            lambda *x: norm_add_norm(*x), [leaf[:2] if leaf.dim() > 1 else leaf for leaf in leaves]
        )
        assert torch.equal(norm_add_norm_reference(*leaves)[1], norm_add_norm(*leaves)[1])
    with pytest.raises(ValueError, match="next_weight"):
        norm_add_norm(x, weight, residual, next_weight[1:])
    with pytest.raises(ValueError, match="residual"):
        norm_add_norm(x, weight, residual[1:], next_weight)


# transfer


def test_tensors_that_travel_as_one_arrive_as_they_were_and_aligned():
    sent = [
        torch.arange(3),
        torch.tensor([True]),
        torch.empty(0, 2),
        normal(5, 3).T,
        torch.tensor(7, dtype=torch.int32),
    ]
    arrived = as_one(sent, torch.device("cpu"), pin=False)
    for x, y in zip(sent, arrived, strict=True):
        assert torch.equal(x, y) and x.dtype == y.dtype and y.data_ptr() % 16 == 0
    assert [x.shape for x in to_device(sent, "meta")] == [x.shape for x in sent]
    assert all(x is y for x, y in zip(to_device(sent, "cpu"), sent, strict=True))


# norm_rope


@pytest.mark.parametrize("T, H, D", [(1, 1, 2), (63, 3, 6), (5, 2, 4)])
def test_norm_rope_is_the_norm_of_every_head_and_then_the_turn(T, H, D):
    x, weight, positions = normal(T, H, D), normal(D), torch.arange(T, dtype=torch.int32) * 3 % 101
    settings = dict(theta=500.0, factor=4.0)
    truth = rope(rms_norm(x, weight, eps=1e-3), positions, **settings)
    torch.testing.assert_close(norm_rope(x, weight, positions, eps=1e-3, **settings), truth, rtol=1e-12, atol=1e-12)
    leaves = (normal(4, H, D, requires_grad=True), normal(D, requires_grad=True))
    positions = torch.tensor([0, 5, 5, 900])
    assert torch.autograd.gradcheck(lambda x, w: norm_rope(x, w, positions, eps=1e-3, **settings), leaves)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("D", [10, 32])
def test_norm_rope_casts_once(dtype, D):
    x, weight, positions = normal(63, 3, D, dtype=dtype), normal(D, dtype=dtype), torch.arange(63)
    whole = norm_rope_reference(x.float(), weight.float(), positions)
    torch.testing.assert_close(norm_rope(x, weight, positions), whole.to(dtype))
    inputs = [normal(63, 3, D), normal(D)]
    op, reference = (lambda x, w, f=f: f(x, w, positions) for f in (norm_rope, norm_rope_reference))
    assert_as_near_as_the_reference(op, reference, inputs, dtype)


def test_norm_rope_refuses_shapes():
    for shapes in ((2, 1, 3), (3,), (2,)), ((2, 1, 4), (3,), (2,)), ((2, 1, 4), (4,), (3,)):
        with pytest.raises(ValueError, match=r"do not fit \(T, H, even D\), \(D,\), \(T,\)"):
            norm_rope(*map(torch.zeros, shapes))


# geglu


@pytest.mark.parametrize("shape", [(1, 1), (63, 7), (1000, 3)])
def test_geglu_is_its_formula(shape):
    gate, up = normal(*shape), normal(*shape, seed=1)
    by_hand = [
        0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) * b
        for a, b in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True)
    ]
    torch.testing.assert_close(geglu(gate, up).flatten(), torch.tensor(by_hand, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        geglu, (normal(3, shape[-1], requires_grad=True), normal(3, shape[-1], seed=1, requires_grad=True))
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_geglu_narrow_types(dtype):
    gate, up = normal(63, 33, dtype=dtype), normal(63, 33, seed=1, dtype=dtype)
    assert torch.equal(geglu(gate, up), geglu(gate.float(), up.float()).to(dtype))
    assert_as_near_as_the_reference(geglu, geglu_reference, [normal(63, 33), normal(63, 33, seed=1)], dtype)
    far = torch.tensor([-100.0, 100.0], dtype=dtype)
    assert geglu(far, torch.ones(2, dtype=dtype)).tolist() == [0, 100]
    with pytest.raises(ValueError, match=r"gate \(2,\) and up \(3,\) differ"):
        geglu(torch.zeros(2), torch.zeros(3))


# linear_log_prob


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("M, d, V", [(1, 1, 1), (63, 5, 17), (1000, 3, 7)])
def test_linear_log_prob_is_its_formula(M, d, V, softcap, monkeypatch):
    hidden, weight = normal(M, d, requires_grad=True), normal(V, d, requires_grad=True)
    target_ids = torch.arange(M) % V
    monkeypatch.setattr(head_op, "CHUNK_BYTES", 8 * V * 19)  # chunks of 19 rows, the last one ragged
    log_probs = linear_log_prob(hidden, weight, target_ids, softcap=softcap)
    for i in range(0, M, 7):
        logits = [sum(a * b for a, b in zip(hidden[i].tolist(), row, strict=True)) for row in weight.tolist()]
        logits = logits if softcap is None else [softcap * math.tanh(x / softcap) for x in logits]
        truth = logits[target_ids[i]] - math.log(sum(map(math.exp, logits)))
        assert abs(log_probs[i].item() - truth) < 1e-12
    weights = normal(M, seed=3)
    found = torch.autograd.grad((log_probs * weights).sum(), (hidden, weight))
    by_autograd = linear_log_prob_reference(hidden, weight, target_ids, softcap=softcap)
    truths = torch.autograd.grad((by_autograd * weights).sum(), (hidden, weight))
    for gradient, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_linear_log_prob_gradcheck(softcap):
    target_ids = torch.tensor([3, 0, 3, 6, 1])
    inputs = (normal(5, 3, requires_grad=True), normal(7, 3, requires_grad=True))
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_log_prob(hidden, weight, target_ids, softcap=softcap), inputs
    )


class LargestResult(TorchDispatchMode):
    """Records the most elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


def test_linear_log_prob_never_holds_more_than_a_chunk(monkeypatch):
    M, d, V = 1000, 2, 300
    monkeypatch.setattr(head_op, "CHUNK_BYTES", 8 * V * 10)
    hidden, weight = (normal(n, d, requires_grad=True) for n in (M, V))
    with LargestResult() as largest:
        linear_log_prob(hidden, weight, torch.arange(M) % V, softcap=3.0).sum().backward()
    assert max(M, V) * d < largest.numel <= 10 * V
    with LargestResult() as largest:
        linear_log_prob_reference(hidden, weight, torch.arange(M) % V, softcap=3.0).sum().backward()
    assert largest.numel == M * V


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", ["chunked", "default"])
def test_linear_log_prob_narrow_types(dtype, softcap, path, monkeypatch):
    if path == "chunked":
        monkeypatch.setattr(cpu, "supports_linear_log_prob", lambda hidden, weight: False)
    target_ids = torch.arange(63) * 5 % 101
    inputs = [normal(63, 33), normal(101, 33)]
    log_probs = linear_log_prob(*(x.to(dtype) for x in inputs), target_ids, softcap=softcap)
    assert log_probs.dtype == torch.float32
    assert_as_near_as_the_reference(
        linear_log_prob, linear_log_prob_reference, inputs, dtype, target_ids, softcap=softcap
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", ["log_prob", "kl"])
def test_a_frozen_head_costs_no_gradient_of_its_own(op, dtype):
    hidden, weight, other = (normal(n, 32, seed=n).to(dtype) for n in (40, 70, 41))

    def d_hidden(trained):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        if op == "kl":
            linear_kl(leaf, head, other[:40], weight.flip(0), softcap=3.0).sum().backward()
        else:
            linear_log_prob(leaf, head, torch.arange(40), softcap=3.0).sum().backward()
        assert (head.grad is not None) == trained
        return leaf.grad

    assert torch.equal(d_hidden(False), d_hidden(True))


def test_linear_log_prob_of_nothing_and_of_shapes_that_do_not_fit():
    hidden, weight = torch.zeros(0, 3, requires_grad=True), normal(5, 3, requires_grad=True)
    log_probs = linear_log_prob(hidden, weight, torch.zeros(0, dtype=torch.int64))
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and not weight.grad.any()
    for M, d, num_targets in (2, 4, 2), (2, 3, 3):
        with pytest.raises(ValueError, match="do not fit"):
            linear_log_prob(torch.zeros(M, d), weight, torch.zeros(num_targets, dtype=torch.int64))
    for target in (-1, 5):
        with pytest.raises(ValueError, match=r"target_ids must lie in \[0, 5\)"):
            linear_log_prob(normal(2, 3), weight, torch.tensor([0, target]))


# tree_attention, on whichever path the CPU takes and on the reference


@pytest.fixture(params=["reference", "default"])
def attention_path(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(cpu, "supports", lambda q: False)


def random_tree(T, seed=0, fork=0.3, root=0.05):
    """(subtree_end, position_ids) of a forest: each token goes on from the last, forks, or starts a tree."""
    generator = torch.Generator().manual_seed(seed)
    ancestors, position_ids, subtree_end = [], [], [T] * T
    for i in range(T):
        draw = torch.rand(2, generator=generator).tolist()
        keep = len(ancestors)
        if i and draw[0] < root:
            keep = 0
        elif i and draw[0] < root + fork:
            keep = int(draw[1] * len(ancestors))
        for closed in ancestors[keep:]:
            subtree_end[closed] = i
        ancestors = [*ancestors[:keep], i]
        position_ids.append(keep)
    return torch.tensor(subtree_end, dtype=torch.int32), torch.tensor(position_ids, dtype=torch.int32)


def attention_by_hand(q, k, v, subtree_end, position_ids, *, scale, softcap, window):
    """Query by query and head by head, over the list of ancestors."""
    T, Hq, _ = q.shape
    out = torch.empty_like(q)
    for i in range(T):
        keys = [j for j in range(i + 1) if i < subtree_end[j]]
        keys = [j for j in keys if window is None or position_ids[i] - position_ids[j] < window]
        for h in range(Hq):
            kv = h * k.shape[1] // Hq
            scores = torch.stack([scale * torch.dot(q[i, h], k[j, kv]) for j in keys])
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            p = scores.exp() / scores.exp().sum()
            out[i, h] = sum(p[n] * v[j, kv] for n, j in enumerate(keys))
    return out


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_tree_attention_is_its_definition(softcap, window, attention_path):
    tree = random_tree(23)
    q, k, v = normal(23, 4, 5), normal(23, 2, 5), normal(23, 2, 5, seed=1)
    options = {"scale": 0.7, "softcap": softcap, "window": window}
    torch.testing.assert_close(
        tree_attention(q, k, v, *tree, **options),
        attention_by_hand(q, k, v, *tree, **options),
        rtol=1e-12,
        atol=1e-12,
    )
    small = [normal(7, 4, 3), normal(7, 2, 3), normal(7, 2, 3, seed=1)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: tree_attention(q, k, v, *random_tree(7, seed=2), **options),
        [x.requires_grad_() for x in small],
    )


@pytest.mark.parametrize(
    "T, heads, D, softcap, window",
    [
        (1, (1, 1), 1, None, None),
        (63, (6, 2), 10, 5.0, 7),
        (63, (3, 3), 33, None, 1),
        (1000, (2, 1), 6, 50.0, 40),
        (1000, (2, 2), 4, None, None),
    ],
)
def test_tree_attention_at_odd_sizes(T, heads, D, softcap, window):
    tree = random_tree(T, fork=0.05, root=0.01)
    inputs = [normal(T, heads[0], D), normal(T, heads[1], D), normal(T, heads[1], D, seed=1)]
    options = {"scale": D**-0.5, "softcap": softcap, "window": window}
    found = run(tree_attention, inputs, torch.float64, *tree, **options)
    truths = run(tree_attention_reference, inputs, torch.float64, *tree, **options)
    for result, truth in zip(found, truths, strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", NARROW)
def test_tree_attention_narrow_types(dtype):
    tree = random_tree(63)
    inputs = [normal(63, 4, 12), normal(63, 2, 12), normal(63, 2, 12, seed=1)]
    y = tree_attention(*(x.to(dtype) for x in inputs), *tree, scale=0.3)
    assert y.dtype == dtype
    assert_as_near_as_the_reference(
        tree_attention, tree_attention_reference, inputs, dtype, *tree, scale=0.3, softcap=5.0, window=9
    )


def test_tree_attention_takes_strided_inputs(attention_path):
    tree = random_tree(63)
    whole = normal(63, 8, 6, requires_grad=True)
    q, k, v = whole[:, :4], whole[:, 4:6], whole[:, 6:].flip(1)
    tree_attention(q, k, v, *tree, scale=1.0, softcap=2.0).square().sum().backward()
    found, whole.grad = whole.grad, None
    q, k, v = (x.contiguous() for x in (whole[:, :4], whole[:, 4:6], whole[:, 6:].flip(1)))
    tree_attention_reference(q, k, v, *tree, scale=1.0, softcap=2.0).square().sum().backward()
    torch.testing.assert_close(found, whole.grad)


def test_tree_mask_of_a_forest():
    #      0 - 1 - 2      the first tree, with a branch 3 off 0
    #        \ 3
    #      4 - 5          the second
    subtree_end, position_ids = torch.tensor([4, 3, 3, 4, 6, 6]), torch.tensor([0, 1, 2, 1, 0, 1])
    seen = [[0], [0, 1], [0, 1, 2], [0, 3], [4], [4, 5]]
    mask = tree_mask(subtree_end, position_ids)
    assert [row.nonzero().flatten().tolist() for row in mask] == seen
    mask = tree_mask(subtree_end, position_ids, window=2)
    assert [row.nonzero().flatten().tolist() for row in mask] == [[0], [0, 1], [1, 2], [0, 3], [4], [4, 5]]


def test_tree_attention_refuses_what_does_not_fit():
    q, k = torch.zeros(4, 4, 2), torch.zeros(4, 2, 2)
    tree = torch.full((4,), 4, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    unfit = [(q, k, torch.zeros(4, 2, 3)), (q, torch.zeros(4, 3, 2), torch.zeros(4, 3, 2)), (q, k[:3], k[:3])]
    for inputs in unfit:
        with pytest.raises(ValueError, match=r"do not fit \(T, H, D\)"):
            tree_attention(*inputs, *tree, scale=1.0)
    with pytest.raises(ValueError, match=r"must be \(4,\), one entry a packed token"):
        tree_attention(q, k, k, tree[0][:3], tree[1], scale=1.0)
    for options in {"softcap": 0.0}, {"window": 0}, {"softcap": -1.0}:
        with pytest.raises(ValueError, match="must be positive, or None"):
            tree_attention(q, k, k, *tree, scale=1.0, **options)
