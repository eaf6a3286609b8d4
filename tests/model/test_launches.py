"""What the passes of an update ask of a GPU: how many launches, and never that the host wait."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from swirl.config import TrainConfig
from swirl.kernels import _triton, schedule
from swirl.learning.batches import SubTrajectory
from swirl.learning.objective import Objective
from swirl.model.config import PRESETS
from swirl.model.gemma import Gemma
from swirl.trajectories.record import Step
from swirl.tree.pack import pack
from tests.kernels.recording import MetaOps, recorded

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
STATE, ACTION, OTHER = list(range(300)), list(range(200)), list(range(7, 90))


def meta_model(preset: str, layers: int, **changes) -> Gemma:
    config = PRESETS[preset]
    kinds = config.layer_types[:layers]
    with torch.device("meta"):
        return Gemma(replace(config, num_hidden_layers=layers, layer_types=kinds, **changes)).to(torch.bfloat16)


def launches_of_a_layer(monkeypatch, preset: str) -> tuple[Counter, Counter]:
    """Of a forward and of a backward pass, by name; what three layers have more than one, half of it."""
    launches, batch, counts = recorded(monkeypatch, 90), pack([(STATE, ACTION)]).to("meta"), []
    for layers in (1, 3):
        model = meta_model(preset, layers)
        model.token_log_probs(batch).sum().backward()  # makes what is made once
        model.zero_grad()
        launches.clear()
        with MetaOps() as ops:
            loss = model.token_log_probs(batch).sum()
            forward = ops.names + Counter(kernel.fn.__name__ for kernel, _ in launches)
            launches.clear(), ops.names.clear()
            loss.backward()
        backward = ops.names + Counter(kernel.fn.__name__ for kernel, _ in launches)
        launches.clear()
        counts.append((forward, backward))
    return tuple(Counter({name: n // 2 for name, n in (b - a).items()}) for a, b in zip(*counts, strict=True))


def test_launches_of_a_layer(monkeypatch):
    forward, backward = launches_of_a_layer(monkeypatch, "gemma-2-2b")
    assert forward == Counter(
        mm=7, _rms_norm_fwd_kernel=3, _rope_kernel=2, _tree_attention_fwd_kernel=1, _geglu_fwd_kernel=1
    )
    assert backward == Counter(
        mm=14, add=4, sum=3, _to_copy=3, _rms_norm_bwd_kernel=3, _rope_kernel=2, _geglu_bwd_kernel=1,
        _tree_attention_dq_kernel=1, _stored_dkv_kernel=2,
    )  # fmt: skip


def compiled_for(kernel, arguments) -> tuple:
    """What Triton's just-in-time compiler would compile this launch for, as far as a batch can change it."""
    of_launch = []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if isinstance(value, _triton.TensorDescriptor):
            value = value.base.dtype, tuple(value.block_shape)
        elif isinstance(value, torch.Tensor):
            value = value.dtype
        elif isinstance(value, int) and not parameter.is_constexpr:
            value = "int" if parameter.do_not_specialize else (value == 1, value % 16 == 0)
        of_launch.append(value)
    return kernel.fn.__name__, *of_launch


def test_kernels_are_compiled_once_whatever_the_sizes_of_a_batch(monkeypatch):
    launches, compiled = recorded(monkeypatch, 90), set()
    model = meta_model("gemma-2-2b", 2)
    for state, action in ((1, 1), (300, 3), (16, 128), (11, 1500), (100, 5001)):
        model.token_log_probs(pack([(range(state), range(action))]).to("meta")).sum().backward()
        compiled |= {compiled_for(*launch) for launch in launches}
        launches.clear()
    # Rotations: there and back, of queries and of keys. Attention where windows hide something, and where not. Norms:
    # alone, into a sum, and with the norm of that sum; the second has the first's backward.
    of_kernel = {"_rope_kernel": 4, "_tree_attention_fwd_kernel": 2, "_tree_attention_dq_kernel": 2}
    of_kernel |= {"_rms_norm_fwd_kernel": 3, "_rms_norm_bwd_kernel": 2}
    expected = dict.fromkeys({name for name, *_ in compiled}, 1) | of_kernel | {"_stored_dkv_kernel": 2}  # dK, dV
    assert Counter(name for name, *_ in compiled) == expected


@pytest.mark.parametrize(
    "settings",
    [
        dict(mode="sampled", kl_coefficient=0.1),
        dict(mode="recorded", proximal_every=2),
        dict(mode="imitation", activation_checkpointing="cheap"),
        dict(mode="imitation", activation_checkpointing="layers"),
    ],
)
def test_nothing_waits_for_the_device_from_one_micro_batch_to_the_next(monkeypatch, settings):
    recorded(monkeypatch, 90)
    config = TrainConfig(**settings)
    model = meta_model("gemma-2-2b", 3, vocab_size=1000)
    model.activation_checkpointing = config.activation_checkpointing
    objective = Objective(config, model)
    objective.refresh(model, 0)
    for actions in ([ACTION, OTHER], [ACTION]):
        steps = [Step(action="", action_ids=ids, log_probs=[-1.0] * len(ids)) for ids in actions]
        members = [SubTrajectory(0, 0, STATE, step, 0.5) for step in steps]
        loss, measured = objective(model, pack([(STATE, ids) for ids in actions]).to(model.device), members)
        loss.backward()
        assert set(measured) == set(objective.measures)
    with pytest.raises((RuntimeError, NotImplementedError)):
        loss.item()  # this device does tell


@pytest.mark.parametrize(("window", "num_kinds"), [(400, 2), (500, 1), (4096, 1)])
def test_a_batch_from_the_host_brings_its_schedules_and_those_no_path_outgrows_are_one(monkeypatch, window, num_kinds):
    launches, built, build = recorded(monkeypatch, 90), [], schedule.build
    monkeypatch.setattr(schedule, "build", lambda end, *x: built.append((end.device.type, *x[1:])) or build(end, *x))
    model = meta_model("gemma-2-2b", 4, sliding_window=window)
    batch = pack([(STATE, ACTION), (STATE, OTHER), (OTHER, ACTION)]).to("meta")  # 500 tokens deep, more in all
    for _ in range(2):
        model.token_log_probs(batch).sum().backward()
    assert len(built) == len(set(built)) == 3 * num_kinds  # forward, dQ, dK and dV
    assert {device for device, *_ in built} == {"cpu"}
    assert len({arguments["WINDOW"] for _, arguments in launches if "WINDOW" in arguments}) == num_kinds


def test_a_batch_that_was_written_to_on_its_device_is_not_what_came_from_the_host():
    host = pack([(STATE, ACTION)])
    batch = host.to("meta")
    assert schedule.effective_window(batch.subtree_end, batch.position_ids, 500) is None
    batch.position_ids.add_(1)
    assert schedule.effective_window(batch.subtree_end, batch.position_ids, 499) == 499
    assert np.array_equal(host.position_ids, np.arange(500))
