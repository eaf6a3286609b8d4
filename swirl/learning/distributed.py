"""Plain data parallelism under torchrun: trees assigned to ranks by cost, gradients summed, rank-0 logging.

Without torchrun every function is the identity of a world of one, so callers read the same either way.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from swirl.errors import NonFiniteError


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this rank prints, logs and writes files."""
    return rank() == 0


def launched_as_main() -> bool:
    """`is_main` before the process group exists: by torchrun's environment."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def process_group(device: torch.device):
    """Join torchrun's processes (NCCL on CUDA, gloo on CPU) for the body; a world of one joins nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        dist.barrier()  # a rank that leaves first would tear the connections of the others
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """The device of this rank: `auto` is this rank's CUDA device where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def assign(costs: Sequence[float]) -> list[list[int]]:
    """Indices for each rank, the costliest first to the rank with the least so far. Same on every rank."""
    heap = [(0.0, r) for r in range(world_size())]
    assigned: list[list[int]] = [[] for _ in heap]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, r = heapq.heappop(heap)
        assigned[r].append(index)
        heapq.heappush(heap, (load + costs[index], r))
    return [sorted(indices) for indices in assigned]


def my_share(items: Sequence) -> list:
    """Every world_size-th item, from this rank's number on; `gather_shares` puts them back in order."""
    return list(items[rank() :: world_size()])


def gather_shares(share: list) -> list:
    """The inverse of `my_share` over all ranks: the whole list, in order, on every rank. Items are pickled."""
    if world_size() == 1:
        return share
    shares: list[list] = [[] for _ in range(world_size())]
    dist.all_gather_object(shares, share)
    whole = [None] * sum(map(len, shares))
    for r, part in enumerate(shares):
        whole[r :: world_size()] = part
    return whole


def from_main(value):
    """The main rank's value, on every rank. Pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_scalars(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over ranks, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(model: torch.nn.Module) -> None:
    """Sum gradients over ranks in one flat buffer, so that every rank steps alike; absent ones count as zero."""
    if world_size() == 1:
        return
    weights = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().float() for p in weights])
    dist.all_reduce(flat)
    for weight, grad in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        weight.grad = grad.view_as(weight).to(weight.dtype)


def require_finite(what: str, value: float) -> None:
    """Raise NonFiniteError on every rank alike; `value` must already be the same on all (a reduced one)."""
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(f"{what} is {value}: the update was refused, the weights are those before it")
