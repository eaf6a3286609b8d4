"""The token step over tensors that stay where they are: padded as a GPU's buckets are, and when it is captured anew."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from swirl.sampling import cache as cache_module
from swirl.sampling import engine as engine_module
from swirl.sampling import passes as passes_module
from swirl.sampling import token_step as token_step_module
from swirl.sampling.draw import SamplingParams
from swirl.sampling.engine import Engine
from swirl.sampling.passes import LayerPasses
from swirl.sampling.token_step import TokenStep, rounded_up
from tests.sampling.test_engine import THIRD, assert_log_probs_are_the_models, forest, loud_gemma, sample


def test_sizes_are_rounded_up_to_few():
    assert [rounded_up(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 25, 385, 512)] == [1, 2, 3, 4, 6, 8, 12, 16, 32, 512, 512]
    assert [rounded_up(n, 256) for n in (1, 256, 257, 385, 513)] == [256, 256, 384, 512, 768]
    assert all(n <= rounded_up(n) <= max(2, 1.5 * n) for n in range(1, 2000))


@pytest.fixture
def captures(monkeypatch):
    """The sizes that are captured while decoding goes as on a GPU; but what is captured runs as it is."""
    found = []

    def capture(step, pool):
        found.append((*step._own_slots.shape, step._tree[0].numel(), step.ids.shape[1]))
        step._one_token()  # before what is captured, one runs for nothing

    monkeypatch.setattr(engine_module, "passes_for", LayerPasses)
    monkeypatch.setattr(passes_module, "replays", lambda device: True)
    monkeypatch.setattr(token_step_module.torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(TokenStep, "capture", capture)
    return found


@pytest.mark.parametrize("changes", [{}, THIRD, dict(attn_logit_softcapping=None, sliding_window=1)])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_padded_to_buckets_the_same_is_drawn(changes, temperature, captures, monkeypatch):
    model, states = loud_gemma(**changes).double(), forest(count=40)
    padded = sample(model, states, temperature=temperature)
    assert captures
    monkeypatch.setattr(passes_module, "replays", lambda device: False)
    exact = sample(model, states, temperature=temperature)
    assert [one.ids for one in padded] == [one.ids for one in exact]
    for ours, theirs in zip(padded, exact, strict=True):
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, rtol=1e-12, atol=1e-12)


def test_what_lies_in_slots_of_no_one_is_never_read(captures):
    model, states = loud_gemma().double(), forest()
    expected = sample(model, states)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert sample(model, states) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_one_capture_a_bucket_as_long_as_weights_and_pools_stay(captures, monkeypatch):
    monkeypatch.setattr(cache_module, "FIRST_SLOTS", 4096)
    model, states = loud_gemma().double(), forest()
    engine = Engine(model)
    options = dict(seeds=range(len(states)), max_new_tokens=19, temperature=1.0, stop_ids=())
    engine.sample(states, **options)
    assert len(set(captures)) == len(captures) < 6
    captures.clear()
    engine.sample(states, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # in place, as an optimizer's step
    drawn = engine.sample(states, **options)
    assert not captures
    assert_log_probs_are_the_models(model, states, drawn, 1e-9)
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach() * 1.1)
    assert_log_probs_are_the_models(model, states, engine.sample(states, **options), 1e-9)
    assert captures
    captures.clear()
    many = forest(1, 200)  # more tokens than the pools take: they grow, and lie elsewhere
    drawn = engine.sample(many, **options | dict(seeds=range(len(many))))
    assert_log_probs_are_the_models(model, many, drawn, 1e-9)
    assert captures


def test_draws_that_leave_tokens_out_are_not_captured(captures):
    params = SamplingParams(9, 0.8, top_k=5)
    drawn = asyncio.run(Engine(loud_gemma().double()).generate([1, 2, 3], seed=0, params=params))
    assert len(drawn.ids) == 9 and not captures
