"""Weights, gradients and optimizer state in shards over ranks: FSDP2, a group a layer and one for the rest.

Between passes a rank holds its rows of every weight (DTensors, float32). A forward or backward pass gathers a layer's
weights in the dtype it computes in, and frees them behind it; gradients are summed over ranks and micro-batches in
float32, each rank keeping its rows. The embedding, which is the head too, stays gathered from the beginning of a
forward pass to the end of its backward pass. To sample, all weights are gathered, and freed afterwards.
With adapters it is the frozen weights that lie in shards, in the dtype of the passes; adapters, their gradients and
their optimizer's state are whole on every rank, as without shards.
Source: torch.distributed.fsdp.fully_shard; layouts as in PyTorch FSDP (arXiv:2304.11277).
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from swirl.learning import distributed, usage
from swirl.model.gemma import Gemma
from swirl.model.lora import add_lora
from swirl.model.tensor_file import Deferred, own_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Shard = Literal["auto", "none", "node", "all"]
LARGE = 1_000_000_000  # weights from which on `auto` shards


@dataclass(frozen=True)
class Sharding:
    """Over which ranks weights are sharded, and the dtype that passes compute in."""

    mesh: DeviceMesh
    dtype: torch.dtype


def shard_as_asked(model: Gemma, shard: Shard, device_type: str) -> Gemma:
    """`shard_model` as a flag says: not on one rank; `auto` is `node` for a model of LARGE weights or more that are
    trained.
    """
    if shard == "auto":
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        shard = "node" if trained >= LARGE else "none"
    if shard == "none" or distributed.world_size() == 1:
        return model
    return shard_model(model, Sharding(mesh_over(shard, device_type), model.dtype))


def mesh_over(shard: Shard, device_type: str) -> DeviceMesh:
    """`all`: one dimension, all ranks. `node`: hosts times ranks of a host, sharded over the latter alone (HSDP)."""
    from torch.distributed.device_mesh import init_device_mesh

    ranks = distributed.world_size()
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if shard == "all" or per_node >= ranks:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (ranks // per_node, per_node), mesh_dim_names=("replicate", "shard"))


def shard_model(model: Gemma, sharding: Sharding) -> Gemma:
    """Lay the model's weights out in shards, in place; on the meta device nothing is held yet.

    They become float32 (float64 where passes compute in it), but frozen ones stay in the dtype of the passes.
    """
    if sharding.mesh.device_type == "cpu":
        usage.unmap_what_is_freed()
    # 1.6 s of imports, which runs without shards do not wait for
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    wide = torch.promote_types(sharding.dtype, torch.float32)
    model.to(wide if any(weight.requires_grad for weight in model.parameters()) else sharding.dtype)
    policy = MixedPrecisionPolicy(param_dtype=sharding.dtype, reduce_dtype=wide, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=sharding.mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)  # sums, not means: the loss is divided by the tokens of all ranks
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
    register_fsdp_forward_method(model, "action_hidden")
    model.sharding = sharding
    return model


def reduce_over_hosts(model: Gemma, now: bool) -> None:
    """Whether the next backward pass sums gradients over hosts too, or leaves that to a later one."""
    if model.sharding is not None:
        model.set_requires_all_reduce(now)


def free(model: Gemma | None) -> None:
    """Drop the gathered weights that a pass without a backward pass has left."""
    if model is not None and model.sharding is not None:
        for module in (*model.model.layers, model):
            module.reshard()


def frozen_copy(model: Gemma) -> Gemma:
    """The model as it is now, without gradients, sharded as it is, then in the dtype of its passes; weights that the
    model does not train either are the same tensors in both.
    """
    if model.sharding is None:
        shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        return copy.deepcopy(model, memo=shared).requires_grad_(False)
    with torch.device("meta"):
        twin = Gemma(model.config)
    twin.attention = model.attention
    shard_model(twin.requires_grad_(False), model.sharding).to_empty(device=model.device)
    if model.lora:
        add_lora(twin, model.lora).requires_grad_(False)
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            own_rows(mine)[0].copy_(own_rows(theirs)[0])
    return twin


def trains_shards(model: Gemma) -> bool:
    """Whether weights that are trained lie in shards, so that no rank has a whole copy of what is learned."""
    return any(is_sharded(weight) for weight in model.parameters() if weight.requires_grad)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor: this rank's rows of a larger one."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor gathered, on every rank; all take part. Others are returned as they are."""
    with distributed.meeting():
        return tensor.full_tensor() if is_sharded(tensor) else tensor


class Gathers:
    """Sharded tensors that all ranks gather together, one at a time and in one order: the main rank as it writes them,
    the others, and a main rank that could not go on writing, in `finish`.
    """

    def __init__(self):
        self._waiting: deque[Callable[[], torch.Tensor]] = deque()
        self._tensors: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor, dtype: torch.dtype) -> Deferred:
        """The whole of a tensor, next in order, as `dtype`. One that is not sharded is no one's to wait for."""
        if not is_sharded(tensor):
            return Deferred(tuple(tensor.shape), dtype, lambda: tensor.to(dtype))

        def gather() -> torch.Tensor:
            return whole(tensor.detach().to(dtype))

        def make() -> torch.Tensor:
            if self._waiting.popleft() is not gather:
                raise RuntimeError("expected sharded tensors to be written in their order")
            return gather()

        self._waiting.append(gather)
        self._tensors.append(tensor)
        return Deferred(tuple(tensor.shape), dtype, make)

    def is_finite(self) -> bool:
        """Whether no number that this rank holds of them is NaN or infinite."""
        return all(bool(own_rows(tensor)[0].isfinite().all()) for tensor in self._tensors)

    def finish(self) -> None:
        """Gather those that are left, for the other ranks' sake."""
        while self._waiting:
            self._waiting.popleft()()


@torch.no_grad()
def sharded_like(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A whole tensor laid out as a sharded weight of its shape; where shapes differ, or none is sharded, as it is."""
    if not is_sharded(weight) or tensor.shape != weight.shape:
        return tensor.to(weight.device)
    from torch.distributed.tensor import DTensor

    mine, first = own_rows(weight)
    rows = tensor[first : first + len(mine)].to(mine.device, copy=True)
    layout = {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(rows, weight.device_mesh, weight.placements, run_check=False, **layout)


def sampler_of(model: Gemma) -> Gemma:
    """What an engine samples from: the model itself, or, of a sharded one, a plain model that `gathered` fills."""
    if model.sharding is None:
        return model
    with torch.device("meta"):
        sampler = Gemma(model.config)
    if model.lora:
        add_lora(sampler, model.lora)
    sampler.origin = model.origin
    return sampler.requires_grad_(False)


@contextmanager
def gathered(model: Gemma, into: Gemma, changed: Callable[[], object]) -> Iterator[None]:
    """While the body runs, `into` (`sampler_of` the model) has the model's weights of now, whole on every rank; then
    they are freed. All ranks take part. `changed` is called after each; nothing is done where both are one model.
    """
    if into is model:
        yield
        return
    with torch.no_grad():
        weights = {
            name: whole(weight.to(model.dtype)) if is_sharded(weight) else weight.detach()
            for name, weight in model.named_parameters()
        }
    into.load_state_dict(weights, assign=True)
    del weights
    changed()
    try:
        yield
    finally:
        into.to_empty(device="meta")
        changed()
