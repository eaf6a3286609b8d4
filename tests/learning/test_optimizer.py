import sys

import pytest
import torch

from swirl.app.planning import plan_run
from swirl.app.preparing import prepared
from swirl.config import TrainConfig
from swirl.errors import ConfigError, NonFiniteError
from swirl.learning.optimizer import (
    Optimizer,
    clip_grad_norm,
    make_optimizer,
    make_optimizers_from_nothing,
    set_learning_rate,
)
from swirl.model.checkpoint import read_json
from swirl.model.gemma import Gemma
from swirl.sampling.engine import Engine
from tests.learning.test_updates import learn, some_trajectories
from tests.learning.updates import accumulate, some_actions, some_model

HALVES = [torch.bfloat16, torch.float16]


class Weights(torch.nn.Module):
    """A matrix, an embedding and a norm whose values and gradients bfloat16 holds exactly."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        shapes = {"embedding": (7, 6), "matrix": (5, 6), "norm": (6,)}
        values = {name: (torch.randn(shape).bfloat16() + 1).bfloat16() for name, shape in shapes.items()}
        for name, value in values.items():
            setattr(self, name, torch.nn.Parameter(value.to(dtype)))

    def gradients(self, update):
        torch.manual_seed(1 + update)
        for weight in self.parameters():
            drift = torch.linspace(-1, 1, weight.numel()).view(weight.shape)
            weight.grad = (drift + 0.1 * torch.randn(weight.shape)).bfloat16().to(weight.grad_dtype)


def adamw(model):
    return [make_optimizer(model, learning_rate=1.0, weight_decay=0.1)]


def from_nothing(model):
    return make_optimizers_from_nothing(model, embedding=model.embedding, learning_rate=1.0, weight_decay=0.1)


def train(dtype, make, updates=200):
    model = Weights(dtype)
    optimizers = make(model)
    for update in range(updates):
        model.gradients(update)
        for optimizer in optimizers:
            set_learning_rate(optimizer, 6e-5 if update < 150 else 1e-4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        assert all(weight.grad is None for weight in model.parameters())
    return [weight.detach() for weight in model.parameters()]


@pytest.mark.parametrize("make", [adamw, from_nothing])
@pytest.mark.parametrize("dtype", HALVES)
def test_many_tiny_steps_are_those_of_float32_rounded_once(dtype, make):
    start = Weights(dtype)
    for weight, wide, first in zip(train(dtype, make), train(torch.float32, make), start.parameters()):
        assert weight.dtype == dtype and torch.equal(weight, wide.to(dtype))
        assert (wide - first.float()).abs().max() > 1e-3 and not torch.equal(weight, first)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_of_micro_batches_are_summed_in_float32_and_stepped_on_as_they_are(dtype):
    model = Weights(dtype)
    weight, x = model.matrix, torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    one_by_one = []
    for row in x:  # a fresh leaf for each: its gradient is one micro-batch's, in the weight's dtype
        leaf = weight.detach().clone().requires_grad_()
        (row.to(dtype) @ leaf.T).sum().backward()
        one_by_one.append(leaf.grad.float())
    optimizer = make_optimizer(model, learning_rate=1e-3)
    for row in x:
        (row.to(dtype) @ weight.T).sum().backward()
    assert weight.grad.dtype == torch.float32
    exact = one_by_one[0]
    for gradient in one_by_one[1:]:
        exact = exact + gradient
    assert torch.equal(weight.grad, exact)
    assert not torch.equal(exact, exact.to(dtype).float())  # the dtype of the weight could not have held it
    stepped_on = []
    copy = next(copy for one, copy in optimizer._copies if one is weight)
    optimizer._torch.register_step_pre_hook(lambda *_: stepped_on.append(copy.grad.data_ptr()))
    optimizer.step()
    assert stepped_on == [weight.grad.data_ptr()] and copy.grad is None


def test_without_copies_they_would_all_be_rounded_away():
    def plain(model):
        return [torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]

    stalled = [w.abs() > 0.1 for w in Weights(torch.bfloat16).parameters()]
    for weight, first, still in zip(train(torch.bfloat16, plain), Weights(torch.bfloat16).parameters(), stalled):
        assert torch.equal(weight[still], first[still]) and still.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_are_stepped_on_as_by_torch_itself(dtype):
    def plain(model):
        settings = dict(lr=1e-5, betas=(0.9, 0.95), eps=1e-8, fused=True)
        groups = [([model.embedding, model.matrix], 0.1), ([model.norm], 0.0)]
        return [torch.optim.AdamW([{"params": p, "weight_decay": decay} for p, decay in groups], **settings)]

    for ours, theirs in zip(train(dtype, adamw), train(dtype, plain), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_may_be_kept_as_zeros_and_absent_ones_move_nothing():
    model = Weights(torch.bfloat16)
    optimizer = make_optimizer(model, learning_rate=1.0)
    model.gradients(0)
    optimizer.zero_grad(set_to_none=False)
    assert all(not weight.grad.any() for weight in model.parameters())
    optimizer.zero_grad()
    before = [weight.clone() for weight in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_an_update_in_bfloat16_clips_learns_and_refuses_what_is_not_finite(tmp_path):
    model = some_model(torch.bfloat16)
    start = [weight.detach().clone() for weight in model.parameters()]
    accumulate(model, some_actions())
    assert clip_grad_norm(model, 1e-3) > 1e-3  # as the loop does
    assert torch.stack([w.grad.float().norm() for w in model.parameters()]).norm() < 1.01e-3
    model.zero_grad(set_to_none=True)
    settings = {"learning_rate": 1e-5, "final_learning_rate": 1.0, "max_grad_norm": 1e-3}
    updates = [some_trajectories(seed) for seed in range(8)]
    learn(model, updates, tmp_path / "run", **settings)
    moved = [weight.detach().clone() for weight in model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    again, broken = some_model(torch.bfloat16), some_trajectories(9, rewards=float("inf"))
    with pytest.raises(NonFiniteError, match="update 9: loss"):
        learn(again, [*updates, broken], tmp_path / "broken", **settings)
    assert all(torch.equal(a, b) for a, b in zip(moved, again.parameters(), strict=True))
    with torch.no_grad():
        model.save_pretrained(tmp_path / "saved")
    assert read_json(tmp_path / "saved" / "config.json")["torch_dtype"] == "bfloat16"
    back = Gemma.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(moved, back.parameters(), strict=True))
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert size < 2.5 * sum(weight.numel() for weight in moved) + 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drawn_after_a_step_is_drawn_by_the_new_weights(dtype, tiny_folder):
    """torch's fused AdamW leaves a weight's version as it was: the sampler went on with keys of the old weights."""
    model = Gemma.from_pretrained(tiny_folder, dtype=dtype)
    engine, states = Engine(model), [[1, 5, 9, 30, 7], [1, 5, 9, 30, 8, 4]]
    settings = {"seeds": [0, 1], "max_new_tokens": 6, "temperature": 1.0}
    engine.sample(states, **settings)
    optimizer = make_optimizer(model, learning_rate=0.1)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight, dtype=weight.grad_dtype)
    optimizer.step()
    assert engine.sample(states, **settings) == Engine(model).sample(states, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_on_another_device_are_stepped_on_there_and_copied_back(dtype):
    """On one device, so that no GPU is needed: copies of all weights, gradients moved, moments with them."""
    plain, moved = Weights(dtype), Weights(dtype)
    a = make_optimizer(plain, learning_rate=1e-3, weight_decay=0.1)
    groups = [{"params": [moved.embedding, moved.matrix], "weight_decay": 0.1},
              {"params": [moved.norm], "weight_decay": 0.0}]  # fmt: skip
    make = lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)  # noqa: E731
    b = Optimizer(make, groups, copies_on=torch.device("cpu"))
    assert len(b._copies) == 3
    for update in range(5):
        for model, optimizer in ((plain, a), (moved, b)):
            model.gradients(update)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(plain.parameters(), moved.parameters(), strict=True))
    assert "0.copy" in b.state_tensors()


def large_and_small(dtype):
    generator = torch.Generator().manual_seed(4)
    shapes = ((96, 64), (64,))
    return torch.nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_8_bits_step_nearly_as_those_of_float32_and_take_a_quarter(dtype):
    pytest.importorskip("bitsandbytes")
    found = {}
    for kind in ("adamw", "adamw-8bit"):
        weights, generator = large_and_small(dtype), torch.Generator().manual_seed(5)
        optimizer = make_optimizer(weights, learning_rate=1e-3, weight_decay=0.1, kind=kind)
        for _ in range(60):
            for weight in weights:  # a gradient with a mean, as learning has
                weight.grad = weight.detach().to(weight.grad_dtype) + torch.randn(weight.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
        state = {name: value for name, value in optimizer.state_tensors().items() if not name.endswith("copy")}
        found[kind] = [weight.detach().float() for weight in weights], state
    (wide, wide_state), (narrow, narrow_state) = found["adamw"], found["adamw-8bit"]
    for a, b, first in zip(wide, narrow, large_and_small(dtype), strict=True):
        moved = (a - first.detach().float()).norm()
        assert (a - b).norm() < 0.1 * moved
    kept = (wide_state, narrow_state)
    held = [sum(value.nbytes for name, value in state.items() if name.startswith("0.")) for state in kept]
    tables = 2 * 1024  # of what the 256 values mean
    assert held[0] >= 8 * 96 * 64 and held[1] < 2.1 * 96 * 64 + tables


def test_moments_of_8_bits_are_kept_and_put_back_to_the_bit():
    pytest.importorskip("bitsandbytes")

    def steps(weights, optimizer, updates):
        for update in updates:
            for weight in weights:
                generator = torch.Generator().manual_seed(update)
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()

    whole, first = large_and_small(torch.bfloat16), large_and_small(torch.bfloat16)
    for weights, updates in ((whole, range(6)), (first, range(3))):
        optimizer = make_optimizer(weights, learning_rate=1e-2, kind="adamw-8bit")
        steps(weights, optimizer, updates)
    kept = {name: value.clone() for name, value in optimizer.state_tensors().items()}
    assert all(isinstance(value, torch.Tensor) for value in kept.values())
    again = large_and_small(torch.bfloat16)
    again.load_state_dict(first.state_dict())
    optimizer = make_optimizer(again, learning_rate=1e-2, kind="adamw-8bit")
    optimizer.load_state_tensors(kept)
    steps(again, optimizer, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_bitsandbytes_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="needs bitsandbytes: pip install 'swirl\\[adamw-8bit\\]'"):
        make_optimizer(large_and_small(torch.float32), learning_rate=1.0, kind="adamw-8bit")
    config, device, _ = prepared(TrainConfig(optimizer="adamw-8bit", device="cpu"))
    with pytest.raises(ConfigError, match="needs bitsandbytes"):  # a run asks before it loads anything
        plan_run(config, device, say=print)
