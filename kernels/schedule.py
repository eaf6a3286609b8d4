"""Which blocks of a tree attention are visited: dead ones never, full ones without a mask.

Two integers a token say everything (docs/structure.md, "The packed tree"), so their extremes in a block say
it for the block: a key block is dead for a query block if all its subtrees end before that, or if it lies
beyond the window, and full if every pair is visible. What lies between is masked pair by pair; "live" may
overestimate, but never misses. Where the batch came from the host (`came_from`) they are made there, each when it is
first wanted, and sent after it: the device is asked for nothing.
Source: the block skipping of FlashMask (arXiv:2410.01359), with windows measured by position, not by index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .transfer import to_device


@dataclass(frozen=True)
class BlockSchedule:
    """For each row of blocks, the columns to visit. All int32, on the device of the batch.

    columns (rows, num_columns): full columns, then partial ones, each ascending, then the dead, never read.
    num_full, num_live (rows,): where the full and the partial ones end.
    order (rows,): the rows by falling number of live columns, so that the longest start first.
    """

    columns: torch.Tensor
    num_full: torch.Tensor
    num_live: torch.Tensor
    order: torch.Tensor

    def to(self, device: torch.device) -> BlockSchedule:
        return BlockSchedule(*to_device([self.columns, self.num_full, self.num_live, self.order], device))


def _extremes(x, block, beyond_min, beyond_max):
    num_blocks = -(-x.numel() // block)
    short = num_blocks * block - x.numel()
    low = torch.nn.functional.pad(x, (0, short), value=beyond_min).view(num_blocks, block).amin(1)
    high = torch.nn.functional.pad(x, (0, short), value=beyond_max).view(num_blocks, block).amax(1)
    return low, high


def live_and_full(subtree_end, position_ids, block_q, block_k, window):
    """Two bool (query blocks, key blocks) maps: some pair may be visible; every pair is."""
    T, device = subtree_end.numel(), subtree_end.device
    far = torch.iinfo(torch.int32).max
    end_min, end_max = _extremes(subtree_end, block_k, 0, 0)  # keys beyond T: their subtree is over at once
    q_min, q_max = _extremes(position_ids, block_q, far, -far)
    k_min, k_max = _extremes(position_ids, block_k, far, -far)
    q_first = torch.arange(0, T, block_q, device=device)[:, None]
    k_first = torch.arange(0, T, block_k, device=device)[None, :]
    live = (k_first < q_first + block_q) & (end_max[None, :] > q_first)
    # end <= T, so a query block that runs beyond T is never full
    full = (k_first + block_k - 1 <= q_first) & (end_min[None, :] >= q_first + block_q)
    if window is not None:
        live &= q_min[:, None].long() - k_max[None, :].long() < window
        full &= q_max[:, None].long() - k_min[None, :].long() < window
    return live, full & live


def build(subtree_end, position_ids, block_q, block_k, window, rows) -> BlockSchedule:
    """The schedule with `rows` "queries" (forward, dQ) or "keys" (dK, dV). The host waits for nothing."""
    live, full = live_and_full(subtree_end, position_ids, block_q, block_k, window)
    if rows == "keys":
        live, full = live.T.contiguous(), full.T.contiguous()
    rank = 2 - live.to(torch.int8) - full.to(torch.int8)
    num_live = live.sum(1, dtype=torch.int32)
    return BlockSchedule(
        columns=rank.argsort(dim=1, stable=True).to(torch.int32),
        num_full=full.sum(1, dtype=torch.int32),
        num_live=num_live,
        order=num_live.argsort(descending=True, stable=True).to(torch.int32),
    )


@dataclass(frozen=True)
class LiveBlocks:
    """Numbers for the live blocks, from 0: row of queries by row, each in the order of its schedule. All int32.

    first (query blocks,): the number of a row's first block. by_keys (key blocks, query blocks): the numbers in the
    order of the schedule by keys. count: how many there are; the host waits for it where they were made on a device.
    """

    first: torch.Tensor
    by_keys: torch.Tensor
    count: int

    def to(self, device: torch.device) -> LiveBlocks:
        return LiveBlocks(*to_device([self.first, self.by_keys], device), self.count)


def number_live_blocks(subtree_end, position_ids, block_q, block_k, window) -> LiveBlocks:
    """Of the schedules of that mask, by queries and by keys."""
    mask = (subtree_end, position_ids, block_q, block_k, window)
    by_queries, by_keys = schedule_of(*mask, "queries"), schedule_of(*mask, "keys")
    ends = by_queries.num_live.cumsum(0, dtype=torch.int32)
    first = ends - by_queries.num_live
    numbers = first[:, None] + by_queries.columns.argsort(1).to(torch.int32)
    return LiveBlocks(first, numbers.T.gather(1, by_keys.columns.long()), int(ends[-1]))


def _version(x):
    return None if x.is_inference() else x._version


class _Kept:
    """What was made of one mask, as long as subtree_end lives and neither tensor is written to."""

    def __init__(self, stamp, position_ids, on_host):
        self.stamp, self.on_host, self.made = stamp, on_host, {}
        self.position_ids = position_ids  # held, so that its id cannot come to mean another tensor
        known = position_ids if on_host is None else on_host[1]
        # No two tokens of a path are as far apart: those of the deepest, where that is to be had without waiting.
        self.depth = int(known.max()) + 1 if known.device.type == "cpu" else known.numel()


_kept = WeakIdKeyDictionary()  # subtree_end -> _Kept; gone with the batch


def _kept_of(subtree_end, position_ids, on_host=None) -> _Kept:
    stamp = (id(position_ids), _version(subtree_end), _version(position_ids))
    found = _kept.get(subtree_end)
    if found is None or found.stamp != stamp:
        found = _kept[subtree_end] = _Kept(stamp, position_ids, on_host)
    return found


def came_from(subtree_end, position_ids, on_host: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Says that the first two, of at least one token, are copies on a device of the two on the host."""
    _kept_of(subtree_end, position_ids, on_host)


def effective_window(subtree_end, position_ids, window: int | None) -> int | None:
    """The window, or None where no path is so deep that it hides anything: then all layers share a schedule."""
    return None if window is None or window >= _kept_of(subtree_end, position_ids).depth else window


def _once_a_batch(make, subtree_end, position_ids, block_q, block_k, window, *more):
    window = effective_window(subtree_end, position_ids, window)
    kept, key = _kept_of(subtree_end, position_ids), (make.__name__, block_q, block_k, window, *more)
    if key not in kept.made:
        if kept.on_host is None:
            kept.made[key] = make(subtree_end, position_ids, block_q, block_k, window, *more)
        else:
            made = _once_a_batch(make, *kept.on_host, block_q, block_k, window, *more)
            kept.made[key] = made.to(subtree_end.device)
    return kept.made[key]


def schedule_of(subtree_end, position_ids, block_q, block_k, window, rows) -> BlockSchedule:
    """`build`, once a batch."""
    return _once_a_batch(build, subtree_end, position_ids, block_q, block_k, window, rows)


def live_blocks_of(subtree_end, position_ids, block_q, block_k, window) -> LiveBlocks:
    """`number_live_blocks`, once a batch."""
    return _once_a_batch(number_live_blocks, subtree_end, position_ids, block_q, block_k, window)
