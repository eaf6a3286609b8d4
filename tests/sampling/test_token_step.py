"""The token step over tensors that stay where they are: padded as a GPU's buckets are, and when it is captured anew."""

from __future__ import annotations

import asyncio
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swirl import Gemma, GemmaConfig
from swirl.kernels import _triton, geglu, head_draw, norm_rope, rms_norm, rope, tree_decode
from swirl.sampling import cache as cache_module
from swirl.sampling import engine as engine_module
from swirl.sampling import passes as passes_module
from swirl.sampling.cache import KeyCache
from swirl.sampling.draw import SamplingParams
from swirl.sampling.engine import Engine
from swirl.sampling.passes import LayerPasses
from swirl.sampling.token_step import TokenStep, rounded_up
from tests.sampling.test_engine import (
    BASE,
    THIRD,
    assert_log_probs_are_the_models,
    forest,
    loud_gemma,
    sample,
    uninitialised_memory_is_nan,
)


def test_sizes_are_rounded_up_to_few():
    assert [rounded_up(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 25, 385, 512)] == [1, 2, 3, 4, 6, 8, 12, 16, 32, 512, 512]
    assert [rounded_up(n, 256) for n in (1, 256, 257, 385, 513)] == [256, 256, 384, 512, 768]
    assert all(n <= rounded_up(n) <= max(2, 1.5 * n) for n in range(1, 2000))


@pytest.fixture
def captures(monkeypatch):
    """The sizes that are captured while decoding goes as on a GPU; but what is captured runs as it is."""
    found = []

    def capture(step, pool, stream):
        found.append((*step._own_slots.shape, step._tree[0].numel(), step.ids.shape[1]))
        step._one_token()  # before what is captured, one runs for nothing

    monkeypatch.setattr(engine_module, "passes_for", LayerPasses)
    monkeypatch.setattr(passes_module, "replays", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
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
    with uninitialised_memory_is_nan():
        assert sample(model, states) == expected


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


class Launches(TorchDispatchMode):
    """Counts what would be launched on a device, and refuses what a capture would: copies from the host and to it."""

    count = 0

    def __getitem__(self, grid):  # a Triton kernel
        return lambda **arguments: setattr(self, "count", self.count + 1)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        assert devices in ({"meta"}, {"cpu"}, set()), f"{op} copies between host and device"
        if devices == {"meta"} and not op.is_view and "empty" not in op.name():
            self.count += 1
        return result


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("changes", [{}, THIRD])
def test_a_step_asks_nothing_of_the_host_and_launches_17_kernels_a_layer(changes, monkeypatch):
    launches = Launches()
    monkeypatch.setattr(_triton, "takes", lambda *tensors: True)
    monkeypatch.setattr(_triton, "architecture", lambda device: 90)
    for module in (geglu, head_draw, norm_rope, rms_norm, rope, tree_decode):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, launches)
    with torch.device("meta"):
        model = Gemma(GemmaConfig(**BASE | changes | dict(hidden_size=32, head_dim=32))).bfloat16()
    cache = KeyCache(model, 1000)
    cache.hold(cache.take(500))
    weight, softcap = model.model.embed_tokens.weight, model.config.final_logit_softcapping
    draw = partial(head_draw.head_draw, softcap=softcap)
    with torch.no_grad():  # under inference_mode ops would not come in their parts
        step = TokenStep(model, cache, lambda x, *numbers: draw(x, weight, *numbers), 4, 256, 64, 8)
        step()  # makes tables that are kept
        launches.count = 0
        with launches:
            step()
    assert launches.count <= 17 * model.config.num_hidden_layers + 19
