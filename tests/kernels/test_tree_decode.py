"""Decoding on the packed tree in C++, held to its definition."""

from __future__ import annotations

import pytest
import torch

from swirl.kernels import cpu
from swirl.kernels.tree_decode import tree_decode, tree_decode_reference
from tests.kernels.decoding import decode_case

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, 6, 1000])
@pytest.mark.parametrize("softcap", [None, 2.0, 50.0])
@pytest.mark.parametrize(
    ("B", "Hq", "Hkv", "D", "depth", "N"),
    [(1, 1, 1, 2, 1, 1), (1, 6, 3, 10, 63, 0), (37, 4, 2, 32, 90, 20), (16, 3, 1, 17, 200, 1), (50, 2, 2, 64, 9, 70)],
)
def test_cpp_is_the_reference(isa, dtype, window, softcap, B, Hq, Hkv, D, depth, N, monkeypatch):
    monkeypatch.setenv("SWIRL_CPU_ISA", isa)
    inputs = decode_case(B, Hq, Hkv, D, depth, N, dtype)
    settings = dict(scale=D**-0.5, softcap=softcap, window=window)
    o = tree_decode(*inputs, **settings)
    truth = tree_decode_reference(*(x.double() for x in inputs[:3]), *inputs[3:], **settings)
    assert (o.double() - truth).norm() <= TOLERANCE[dtype] * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("softcap", [None, 50.0])
def test_a_sequence_is_its_own_to_the_last_bit(dtype, softcap):
    q, keys, values, *tree, states, own_slots, own_lengths = decode_case(45, 4, 2, 32, 150, 20, dtype)
    settings = dict(scale=0.2, softcap=softcap, window=40)
    together = tree_decode(q, keys, values, *tree, states, own_slots, own_lengths, **settings)
    for rows in ([3], [44, 1, 7], list(range(44, -1, -2))):
        some = tree_decode(q[rows], keys, values, *tree, states[rows], own_slots[rows], own_lengths[rows], **settings)
        assert torch.equal(some, together[rows])


def test_gradients_are_the_references():
    inputs = decode_case(3, 4, 2, 8, 12, 5)
    inputs = [torch.nan_to_num(x) if i < 3 else x for i, x in enumerate(inputs)]
    leaves = [x.requires_grad_() for x in inputs[:3]]
    tree_decode(*leaves, *inputs[3:], scale=0.3).sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in leaves)


@pytest.mark.parametrize("broken", range(1, 9))
def test_shapes_that_do_not_fit_are_refused(broken):
    inputs = decode_case(5, 4, 2, 8, 12, 5)
    inputs[broken] = inputs[broken][:-1] if broken in (1, 2) else inputs[broken][:-1]
    if broken in (1, 2):
        with pytest.raises(ValueError):
            tree_decode(*inputs, scale=1.0)
    else:
        with pytest.raises(ValueError, match="do not fit"):
            tree_decode(*inputs, scale=1.0)


def test_what_points_outside_is_refused():
    for broken, value in ((3, 10_000), (6, 10_000), (7, 10_000), (8, 100), (3, -1)):
        inputs = decode_case(5, 4, 2, 8, 12, 5)
        inputs[8][:] = torch.clamp(inputs[8], min=1)
        inputs[broken].view(-1)[0] = value
        with pytest.raises(ValueError, match="outside its range"):
            tree_decode(*inputs, scale=1.0)
