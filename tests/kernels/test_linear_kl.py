"""The KL between two heads: against its definition, forward and gradients, in chunks of one row and of all."""

import pytest
import torch

from swirl.kernels import linear_kl as op
from swirl.kernels.linear_kl import linear_kl, linear_kl_reference


def heads(M, V, d=24, d_reference=16, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    made = [torch.randn(shape, dtype=dtype) for shape in ((M, d), (V, d), (M, d_reference), (V, d_reference))]
    return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("M, V, chunk_bytes", [(1, 2, 1), (63, 100, 1), (63, 100, 4096), (5, 1000, 1 << 20)])
def test_forward_and_gradients_are_those_of_the_definition(M, V, chunk_bytes, softcap, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", chunk_bytes)
    ours, theirs = heads(M, V), heads(M, V)
    upstream = torch.randn(M, dtype=torch.float64)
    got, expected = linear_kl(*ours, softcap=softcap), linear_kl_reference(*theirs, softcap=softcap)
    (got * upstream).sum().backward()
    (expected * upstream).sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_heads_are_no_further_from_the_truth_than_the_definition_in_their_dtype(dtype):
    narrow = [x.detach().to(dtype).requires_grad_(i < 2) for i, x in enumerate(heads(40, 200))]
    again = [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(narrow)]
    truth = [x.detach().double().requires_grad_(i < 2) for i, x in enumerate(narrow)]
    results = []
    for function, of in ((linear_kl, narrow), (linear_kl_reference, again), (linear_kl_reference, truth)):
        kl = function(*of, softcap=30.0)
        kl.sum().backward()
        results.append([kl.detach(), of[0].grad, of[1].grad])
    for got, plain, exact in zip(*results, strict=True):
        assert (got - exact).abs().max() <= (plain - exact).abs().max() + 1e-5 * exact.abs().max()


def test_a_policy_that_is_its_reference_has_neither_kl_nor_gradient():
    hidden, weight, *_ = heads(9, 50)
    kl = linear_kl(hidden, weight, hidden.detach(), weight.detach(), softcap=30.0)
    kl.sum().backward()
    assert kl.abs().max() < 1e-12 and hidden.grad.abs().max() < 1e-12 and weight.grad.abs().max() < 1e-12


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, reference_hidden, reference_weight = heads(3, 7)
    for wrong in ((hidden, weight[:5]), (hidden[:2], weight), (hidden, weight[:, :4])):
        with pytest.raises(ValueError, match="do not fit"):
            linear_kl(*wrong, reference_hidden, reference_weight)
