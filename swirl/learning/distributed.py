"""Plain data parallelism under torchrun: trees assigned to ranks by cost, gradients summed, rank-0 logging.

Without torchrun every function is the identity of a world of one, so callers read the same either way.
"""

from __future__ import annotations

import heapq
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from swirl.errors import NonFiniteError, RankError, SwirlError

Item = TypeVar("Item")
_DEATH_S = 2.0
_processes: list[tuple[str, int]] = []  # host name and process id of each rank, in a world of more than one


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
def process_group(device: torch.device, *, timeout_s: float = 600.0) -> Iterator[None]:
    """Join torchrun's processes (NCCL on CUDA, gloo on CPU) for the body; a world of one joins nothing.

    Where ranks wait for one another longer than `timeout_s`, or lose one, all that live raise RankError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RankError(f"the ranks did not all join: {str(error).splitlines()[0]}") from None
    try:
        _processes[:] = [tuple(json.loads(each)) for each in _gather_bytes(_this_process())]
        yield
        _meet()  # a rank that leaves first would tear the connections of the others
    finally:
        _processes.clear()
        dist.destroy_process_group()


def _this_process() -> bytes:
    return json.dumps([socket.gethostname(), os.getpid()]).encode()


def lost_ranks() -> list[str]:
    """Of the ranks on this host, those that have ended or are stopped, in words: `rank 1 was killed, or failed`."""
    words = {"T": "is stopped", "t": "is stopped", "Z": "was killed, or failed", "": "was killed, or failed"}
    return [
        f"rank {number} {words[state]}"
        for number, (host, process) in enumerate(_processes)
        if host == socket.gethostname() and number != rank() and (state := _process_state(process)) in words
    ]


def _process_state(process: int) -> str:
    """The letter that the kernel has for it, such as R or T; "" where there is none any more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "" if Path("/proc/self/stat").exists() else "?"


@contextmanager
def meeting(*, only: bool = False) -> Iterator[None]:
    """In the body ranks meet, and with `only` nothing else happens there. Where one is lost or waits too long RankError
    is raised: its line is one rank's to print. Other errors are raised as they are.
    """
    try:
        yield
    except RuntimeError as error:
        is_theirs = only or any(name in str(error).lower() for name in ("gloo", "nccl", "timed out"))
        if not is_theirs or isinstance(error, SwirlError):
            raise
        end = time.monotonic() + _DEATH_S
        while not (lost := lost_ranks()) and time.monotonic() < end:
            time.sleep(0.02)  # its connections close before it counts as dead
        lowest = min(number for number in range(world_size()) if not any(f"rank {number} " in one for one in lost))
        if rank() != lowest:
            sys.exit(1)
        why = ", ".join(lost) or f"none on this host is lost: {str(error).splitlines()[0]}"
        raise RankError(f"the ranks lost one another: {why}") from None


def _collective(function: Callable) -> Callable:
    """All ranks take part: `meeting`."""

    @wraps(function)
    def met(*args, **kwargs):
        with meeting(only=True):
            return function(*args, **kwargs)

    return met


@_collective
def _meet() -> None:
    dist.barrier()


@_collective
def _gather_bytes(content: bytes) -> list[bytes]:
    """What each rank gives, on every rank; as tensors, since what is pickled could run as a program."""
    device = _device()
    size = torch.tensor([len(content)], device=device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    longest = max(1, *(int(one) for one in sizes))
    mine = torch.zeros(longest, dtype=torch.uint8)
    mine[: len(content)] = torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)]
    parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, mine.to(device))
    return [part[: int(one)].cpu().numpy().tobytes() for part, one in zip(parts, sizes, strict=True)]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


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
    """Indices for each rank, so that the ranks' sums of `costs` differ little. Same on every rank.

    Largest differencing: of partial assignments, one an item at first, the two that are most uneven are merged, the
    fullest part of one with the emptiest of the other, until one is left.
    Source: Karmarkar and Karp, "The differencing method of set partitioning", 1982.
    """
    ranks = world_size()
    heap = []
    for index, cost in enumerate(costs):
        parts = [(cost, [index]), *[(0, [])] * (ranks - 1)]  # fullest first
        heapq.heappush(heap, (-cost, index, parts))
    while len(heap) > 1:
        (_, index, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(one, reversed(other), strict=True)
        parts = sorted(((a + b, x + y) for (a, x), (b, y) in pairs), key=lambda part: -part[0])
        heapq.heappush(heap, (parts[-1][0] - parts[0][0], index, parts))
    return [sorted(indices) for _, indices in heap[0][2]] if heap else [[] for _ in range(ranks)]


def my_share(items: Sequence) -> list:
    """Every world_size-th item, from this rank's number on; `gather_shares` puts them back in order."""
    return list(items[rank() :: world_size()])


def gather_shares(share: list[Item], kind: type[Item]) -> list[Item]:
    """The inverse of `my_share` over all ranks: the whole list, in order, on every rank.

    Items travel as MessagePack and are read as `kind`, anything that msgspec decodes.
    """
    if world_size() == 1:
        return share
    import msgspec  # for ranks that meet alone: benchmarks/gpu.sh updates on machines that lack it

    shares = [msgspec.msgpack.decode(part, type=list[kind]) for part in _gather_bytes(msgspec.msgpack.encode(share))]
    whole = [None] * sum(map(len, shares))
    for r, part in enumerate(shares):
        whole[r :: world_size()] = part
    return whole


def from_main(value: Item, kind: type[Item] = object) -> Item:
    """The main rank's value, on every rank; as `gather_shares` would send it."""
    if world_size() == 1:
        return value
    import msgspec

    content = msgspec.msgpack.encode(value) if is_main() else b""
    return msgspec.msgpack.decode(_gather_bytes(content)[0], type=kind)


@_collective
def _broadcast(tensor: torch.Tensor) -> None:
    dist.broadcast(tensor, src=0)


def tensors_from_main(tensors: Iterable[tuple[str, torch.Tensor]] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The main rank's (name, tensor), on every rank, one at a time; the others' argument is not looked at."""
    if world_size() == 1:
        yield from tensors
        return
    coming = iter(tensors or ())
    while True:
        name, tensor = next(coming, (None, None)) if is_main() else (None, None)
        known = None if name is None else (name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if (known := from_main(known, tuple[str, list[int], str] | None)) is None:
            return
        name, shape, dtype = known
        travelling = torch.empty(shape, dtype=getattr(torch, dtype)) if tensor is None else tensor
        travelling = travelling.to(_device()).contiguous()
        _broadcast(travelling)
        yield name, travelling


@_collective
def _sum(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


def sum_scalars(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over ranks, in float64."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    _sum(total)
    return total.tolist()


def most(count: int) -> int:
    """The largest of the ranks' counts."""
    return max(gather_shares([count], int))


def sum_gradients(model: torch.nn.Module) -> None:
    """Sum gradients over ranks in one flat float32 buffer, so that every rank steps alike; absent ones count as zero.

    A gradient stays in the dtype that the weight's are summed in (`grad_dtype`), float32 for bfloat16 weights. Those of
    sharded weights have been summed by the backward passes.
    """
    weights = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "device_mesh")]
    if world_size() == 1 or not weights:
        return
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten().to(wide) for p in weights])
    _sum(flat)
    for weight, grad in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        weight.grad = grad.view_as(weight).to(weight.grad_dtype)


def agreed(topic: str, value: object, *, within_s: float = 10.0) -> bool:
    """Whether every rank says the same of `topic`, so far said by none; by the store that they joined by, so that no
    rank is waited for in vain that does not come here at all.
    """
    if world_size() == 1:
        return True
    store, keys = dist.distributed_c10d._get_default_store(), [f"{topic}/{r}" for r in range(world_size())]
    try:
        store.set(keys[rank()], str(value))
        store.wait(keys, timedelta(seconds=within_s))
        return {store.get(key) for key in keys} == {str(value).encode()}
    except RuntimeError:  # they did not all come, or the store is gone with its rank
        return False


def require_finite(what: str, value: float) -> None:
    """Raise NonFiniteError on every rank alike; `value` must already be the same on all (a reduced one)."""
    if not torch.isfinite(torch.tensor(value)):
        raise NonFiniteError(f"{what} is {value}: the update was refused, the weights are those before it")
