"""The packed tree: every set of sub-trajectories is a prefix tree, laid out once for one forward pass.

    pack([(state_ids, action_ids), ...])      one PackedBatch; what is shared is found, not declared
    separate(...)                             one PackedBatch a pair: the baseline and the oracle
    pack_micro_batches(..., budget)           cut into batches of at most `budget` packed tokens
    pack_chains(trajectories, budget)         nothing shared between trajectories, so that no tree forks

A radix tree of the token ids is grown pair by pair (each token is read once, each fork found by one hash
probe), its nodes are laid out in depth-first order, children in order of first appearance, and the rows
of the action tokens are read off by walking from each pair's last node to the root.
Cost: O(tokens read) time; no Python loop over tokens.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain

import numpy as np
import torch
from numba import njit

from swirl.kernels.chain_attention import ForkError, chain_lengths

_log = logging.getLogger(__name__)
MAX_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sub-trajectories as one packed forest of T tokens, with M action tokens to predict.

    Query i sees key j  <=>  j <= i < subtree_end[j]  and  position_ids[i] - position_ids[j] < window.
    M runs pair by pair in the order given to `pack`, each in token order; at a fork one source row serves
    several targets, and two identical pairs share their tree tokens but have rows of their own.
    """

    input_ids: torch.Tensor  # (T,) int64: each distinct prefix token once, depth first
    position_ids: torch.Tensor  # (T,) int32: depth in its tree, from 0
    subtree_end: torch.Tensor  # (T,) int32: one past the last packed index that descends from this token
    source_rows: torch.Tensor  # (M,) int64: packed index of the token before each action token
    target_ids: torch.Tensor  # (M,) int64: the action token predicted there
    sub_trajectory: torch.Tensor  # (M,) int64: the pair it belongs to, in [0, S)
    num_sub_trajectories: int  # S
    num_separate_tokens: int  # what S separate passes would process: the sum of all pairs' lengths
    chain_lengths: tuple[int, ...] | None = None  # tokens of each tree where known not to fork (`pack_chains`)

    @property
    def num_tokens(self) -> int:
        """T, the packed tokens."""
        return self.input_ids.numel()

    @property
    def num_action_tokens(self) -> int:
        """M, duplicates counted."""
        return self.target_ids.numel()

    @property
    def token_ratio(self) -> float:
        """Separate tokens over packed tokens: the speed-up if time were tokens."""
        return self.num_separate_tokens / self.num_tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)})


def pack(sub_trajectories: Iterable[tuple[Sequence[int], Sequence[int]]]) -> PackedBatch:
    """Pack (state_ids, action_ids) pairs, each a list, tuple, numpy array or tensor of token ids.

    Ids are in [0, 2^31). A state and an action have at least one token each. Raises ValueError naming the
    pair's index where that does not hold, and where there is no pair at all.
    """
    return pack_flat(*_flatten(sub_trajectories))


def pack_flat(ids: np.ndarray, offsets: np.ndarray, state_lengths: np.ndarray) -> PackedBatch:
    """As `pack`, from flat arrays: pair s is ids[offsets[s]:offsets[s + 1]], state_lengths[s] of them state.

    ids (N,), offsets (S + 1,) from 0 to N, state_lengths (S,): integers. Raises ValueError as `pack` does.
    """
    ids, offsets, state_lengths = _check(ids, offsets, state_lengths)
    return _pack(ids, offsets, state_lengths)


def separate(sub_trajectories: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[PackedBatch]:
    """Every pair alone, in order: what `--no-packed` runs. Raises ValueError as `pack` does."""
    ids, offsets, state_lengths = _check(*_flatten(sub_trajectories))
    return [_pack(*_take(ids, offsets, state_lengths, np.array([s]))) for s in range(state_lengths.size)]


def pack_micro_batches(
    sub_trajectories: Iterable[tuple[Sequence[int], Sequence[int]]], tokens_per_micro_batch: int
) -> list[tuple[PackedBatch, np.ndarray]]:
    """Cut the pairs into micro-batches of at most `tokens_per_micro_batch` packed tokens.

    Returns (batch, indices) in depth-first order of the whole forest: pair i of `batch` is pair indices[i]
    of the input, indices ascending; each pair is in exactly one batch. No pairs, no batches.

    Prompts share at least <bos>, often an instruction, so trees by root would be one tree. The cuts are
    instead chosen along the depth-first order, where what two neighbours share is all that a cut between
    them repeats: of all ways to cut, the one that repeats the fewest tokens, then that of fewest batches.
    Whole trees thus stay whole wherever they fit, and one too large is cut at its thinnest places.
    A pair that alone exceeds the limit never shares with those within it; several such share micro-batches
    no larger than the longest of them, which has to fit in memory anyhow.
    The log says how many tokens are repeated, and warns of pairs beyond the limit.
    Raises ValueError as `pack` does, and for a limit below 1.
    """
    if tokens_per_micro_batch < 1:
        raise ValueError(f"tokens_per_micro_batch must be at least 1, got {tokens_per_micro_batch}")
    sub_trajectories = list(sub_trajectories)
    if not sub_trajectories:
        return []
    ids, offsets, state_lengths = _check(*_flatten(sub_trajectories))
    *nodes, last_node = _radix_tree(ids, offsets)
    _, place, *_ = _layout(*nodes, last_node)
    order = np.argsort(place[last_node], kind="stable")
    lengths, shared = np.diff(offsets)[order], _shared_with_previous(ids, offsets, order)
    bounds = _cheapest_cuts(lengths, shared, tokens_per_micro_batch)

    if lengths.max() > tokens_per_micro_batch:
        _log.warning(
            "%d sub-trajectories exceed tokens_per_micro_batch = %d (number %d has %d): they go apart",
            np.count_nonzero(lengths > tokens_per_micro_batch),
            tokens_per_micro_batch,
            order[lengths.argmax()],
            lengths.max(),
        )
    if bounds.size > 2:
        once, again = int((lengths - shared).sum()), int(shared[bounds[1:-1]].sum())
        _log.info("%d micro-batches: %d packed tokens, and %d repeated at cuts", bounds.size - 1, once, again)
    indices = [np.sort(part) for part in np.split(order, bounds[1:-1])]
    return [(_pack(*_take(ids, offsets, state_lengths, part)), part) for part in indices]


def pack_chains(
    trajectories: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], tokens_per_micro_batch: int
) -> list[tuple[PackedBatch, np.ndarray]]:
    """Pack each trajectory's pairs by themselves and lay them end to end, for attention that knows no forks.

    The pairs of recorded actions are a chain: each state begins with the state and action before it. Two
    trajectories of a question share their prompt, which `pack` would make a fork; here it is repeated.
    Returns (batch, indices) as `pack_micro_batches` does, pairs counted through all trajectories; longest
    trajectories first, each whole, into the first micro-batch with room. One beyond the limit goes alone.
    Raises ValueError as `pack_micro_batches` does, and ForkError where a trajectory's pairs are no chain.
    """
    if tokens_per_micro_batch < 1:
        raise ValueError(f"tokens_per_micro_batch must be at least 1, got {tokens_per_micro_batch}")
    trajectories = [list(pairs) for pairs in trajectories]
    if not trajectories:
        return []
    if not all(trajectories):
        raise ValueError(f"trajectory {trajectories.index([])}: expected at least one sub-trajectory")
    ids, offsets, state_lengths = _check(*_flatten(chain.from_iterable(trajectories)))
    bounds = np.cumsum([0, *map(len, trajectories)])
    owner = np.repeat(np.arange(len(trajectories)), np.diff(bounds))
    begins, roots = ids[offsets[:-1]], ids[offsets[bounds[:-1]]]
    if (begins != roots[owner]).any():
        raise ForkError(0, f"trajectory {owner[np.argmax(begins != roots[owner])]}")
    ids[offsets[:-1]] = owner  # none begins as another does, so that nothing is merged between them
    lengths = np.maximum.reduceat(np.diff(offsets), bounds[:-1])

    bins, room = [], []
    for trajectory in np.argsort(-lengths, kind="stable"):
        place = next((i for i, tokens in enumerate(room) if tokens >= lengths[trajectory]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(tokens_per_micro_batch)
        bins[place].append(trajectory)
        room[place] -= lengths[trajectory]
    if lengths.max() > tokens_per_micro_batch:
        _log.warning(
            "%d trajectories exceed tokens_per_micro_batch = %d (number %d has %d): each goes alone",
            np.count_nonzero(lengths > tokens_per_micro_batch),
            tokens_per_micro_batch,
            lengths.argmax(),
            lengths.max(),
        )
    made = []
    for members in map(sorted, bins):
        indices = np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in members])
        batch = _pack(*_take(ids, offsets, state_lengths, indices))
        starts = (batch.position_ids == 0).nonzero()[:, 0]
        try:
            found = chain_lengths(batch.subtree_end, batch.position_ids)
        except ForkError as fork:
            i = int((starts <= fork.token).sum()) - 1
            raise ForkError(fork.token - int(starts[i]), f"trajectory {members[i]}") from None
        batch.input_ids[starts] = torch.from_numpy(roots[members]).long()
        made.append((replace(batch, chain_lengths=found), indices))
    return made


# From pairs to flat, checked arrays.


def _flatten(sub_trajectories):
    """(ids, offsets, state_lengths) of the pairs, shapes and types checked, values not yet."""
    pairs = list(sub_trajectories)
    if not pairs:
        raise ValueError("expected at least one sub-trajectory")
    try:
        parts = [ids for state_ids, action_ids in pairs for ids in (state_ids, action_ids)]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts)).reshape(-1, 2)
        if set(map(type, parts)) <= {list, tuple}:
            ids = _from_python(list(chain.from_iterable(parts)))
        else:
            ids = np.concatenate([_from_any(part) for part in parts])
    except (TypeError, ValueError, OverflowError):
        for index, pair in enumerate(pairs):
            _refuse_malformed(index, pair)
        raise
    offsets = np.zeros(len(pairs) + 1, np.int64)
    np.cumsum(lengths.sum(1), out=offsets[1:])
    if ids.size != offsets[-1]:
        raise ValueError("expected pairs whose lengths do not change while they are read")
    return ids, offsets, lengths[:, 0]


def _from_python(ids):
    # array refuses floats and negative ids, and is three times as fast as np.array
    return np.frombuffer(array("I", ids), np.uint32) if ids else np.empty(0, np.uint32)


def _from_any(ids):
    if isinstance(ids, (list, tuple)):
        return _from_python(ids)
    ids = ids.numpy(force=True) if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if ids.ndim != 1 or ids.size and ids.dtype.kind not in "iu":
        raise TypeError(f"expected flat integers, got {ids.ndim}-dimensional {ids.dtype}")
    # uint64 beside int64 would make floats; beyond 2^63 it turns negative and is refused as such
    return ids.astype(np.int64) if ids.dtype == np.uint64 or not ids.size else ids


def _refuse_malformed(index, pair):
    """Raise the ValueError that says what is wrong with this pair, if anything is."""
    try:
        state_ids, action_ids = pair
    except (TypeError, ValueError):
        raise ValueError(f"sub-trajectory {index}: expected a pair (state_ids, action_ids)") from None
    for name, ids in ("state", state_ids), ("action", action_ids):
        try:
            _from_any(ids)
        except OverflowError:
            raise ValueError(f"sub-trajectory {index}: expected {name} ids in [0, {MAX_TOKEN_ID}]") from None
        except (TypeError, ValueError):
            raise ValueError(
                f"sub-trajectory {index}: expected the {name} as a flat sequence of integer token ids"
            ) from None


def _check(ids, offsets, state_lengths):
    """The same arrays as (int32, int64, int64), or a ValueError naming the first pair at fault."""
    ids, offsets, state_lengths = np.asarray(ids), np.asarray(offsets), np.asarray(state_lengths)
    if any(a.ndim != 1 or a.dtype.kind not in "iu" for a in (ids, offsets, state_lengths)):
        raise ValueError("expected ids, offsets and state_lengths as flat integer arrays")
    offsets, state_lengths = offsets.astype(np.int64), state_lengths.astype(np.int64)
    if offsets.size != state_lengths.size + 1 or offsets.size < 2:
        sizes = f"{state_lengths.size} and {offsets.size}"
        raise ValueError(f"expected S >= 1 state lengths and S + 1 offsets, got {sizes}")
    if offsets[0] != 0 or offsets[-1] != ids.size or ids.size > MAX_TOKEN_ID:
        raise ValueError(f"expected offsets from 0 to the {ids.size} ids, at most 2^31 - 1")
    action_lengths = np.diff(offsets) - state_lengths
    for name, lengths in ("state", state_lengths), ("action", action_lengths):
        if lengths.min() < 1:
            index = int(np.argmax(lengths < 1))
            raise ValueError(f"sub-trajectory {index}: expected at least one {name} token, got none")
    if ids.min() < 0 or ids.max() > MAX_TOKEN_ID:  # compared before the cast: id 2^32 must not become 0
        at = int(np.argmax((ids < 0) | (ids > MAX_TOKEN_ID)))
        index = int(np.searchsorted(offsets, at, side="right")) - 1
        raise ValueError(f"sub-trajectory {index}: expected ids in [0, {MAX_TOKEN_ID}], got {ids[at]}")
    return ids.astype(np.int32), offsets, state_lengths


def _take(ids, offsets, state_lengths, indices):
    """The flat arrays of the pairs named by `indices` (S',), in that order."""
    part = np.concatenate([ids[offsets[s] : offsets[s + 1]] for s in indices])
    part_offsets = np.zeros(indices.size + 1, np.int64)
    np.cumsum(np.diff(offsets)[indices], out=part_offsets[1:])
    return part, part_offsets, state_lengths[indices]


def _pack(ids, offsets, state_lengths):
    start, length, parent, last_node = _radix_tree(ids, offsets)
    order, place, depth, subtree = _layout(start, length, parent, last_node)
    tree = _fill_tree(ids, start, length, order, place, depth, subtree)
    rows = _fill_rows(ids, offsets, state_lengths, parent, last_node, place, depth)
    return PackedBatch(*map(torch.from_numpy, (*tree, *rows)), state_lengths.size, ids.size)


# The tree. Node 0 is an empty root above the forest; node n spells ids[start[n] : start[n] + length[n]].


def _compiled(function):
    """By numba, kept on disk; anew in every process where no folder can be written to."""
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


@_compiled
def _probe(keys, node, token):
    """Slot of the child of `node` that begins with `token`, or the empty slot where it belongs."""
    key = (np.int64(node) << 31) | np.int64(token)
    mask = keys.size - 1
    # Fibonacci hashing: the high bits of the product are the well-mixed ones
    slot = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while keys[slot] != -1 and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot, key


@_compiled
def _radix_tree(ids, offsets):
    """(start, length, parent, last_node): nodes of the radix tree, and the node that ends with each pair."""
    S = offsets.size - 1
    capacity = 2 * S + 1  # a pair adds at most its own leaf and one split
    start, length = np.zeros(capacity, np.int64), np.zeros(capacity, np.int64)
    parent, last_node = np.full(capacity, -1, np.int64), np.empty(S, np.int64)
    num_slots = 1
    while num_slots < 2 * capacity:
        num_slots *= 2
    keys, children = np.full(num_slots, -1, np.int64), np.empty(num_slots, np.int64)
    num_nodes = 1
    for s in range(S):
        at, end, node = offsets[s], offsets[s + 1], 0
        while at < end:
            slot, key = _probe(keys, node, ids[at])
            if keys[slot] == -1:
                keys[slot], children[slot] = key, num_nodes
                start[num_nodes], length[num_nodes], parent[num_nodes] = at, end - at, node
                node = num_nodes
                num_nodes += 1
                break
            child = children[slot]
            edge, most = start[child], min(length[child], end - at)
            common = 1
            while common < most and ids[edge + common] == ids[at + common]:
                common += 1
            if common < length[child]:
                # the lower part keeps the name: pairs that end at `child` and its children stay right
                upper = num_nodes
                num_nodes += 1
                start[upper], length[upper], parent[upper] = edge, common, node
                children[slot] = upper
                start[child], length[child], parent[child] = edge + common, length[child] - common, upper
                slot, key = _probe(keys, upper, ids[edge + common])
                keys[slot], children[slot] = key, child
                child = upper
            node = child
            at += common
        last_node[s] = node
    return start[:num_nodes], length[:num_nodes], parent[:num_nodes], last_node


@_compiled
def _layout(start, length, parent, last_node):
    """(order, place, depth, subtree): the nodes, parents first; and of each node the packed index and the
    depth of its first token, and its tokens, descendants included.

    `order` meets nodes as the pairs do, so siblings are laid out in order of first appearance.
    """
    num_nodes = start.size
    order, place = np.empty(num_nodes, np.int64), np.full(num_nodes, -1, np.int64)
    depth, subtree = np.zeros(num_nodes, np.int64), length.copy()
    place[0], order[0], met = 0, 0, 1
    for s in range(last_node.size):
        node, first = last_node[s], met
        while place[node] == -1:
            place[node], order[met] = 0, node
            met += 1
            node = parent[node]
        order[first:met] = order[first:met][::-1].copy()
    for i in range(num_nodes - 1, 0, -1):
        subtree[parent[order[i]]] += subtree[order[i]]
    free = np.zeros(num_nodes, np.int64)  # packed index where the next child of a node goes
    for i in range(1, num_nodes):
        node, above = order[i], parent[order[i]]
        place[node], depth[node] = free[above], depth[above] + length[above]
        free[above] += subtree[node]
        free[node] = place[node] + length[node]
    return order, place, depth, subtree


@_compiled
def _fill_tree(ids, start, length, order, place, depth, subtree):
    """(input_ids, position_ids, subtree_end), each (T,)."""
    T = subtree[0]
    input_ids = np.empty(T, np.int64)
    position_ids, subtree_end = np.empty(T, np.int32), np.empty(T, np.int32)
    for i in range(1, order.size):
        node = order[i]
        p, edge = place[node], start[node]
        for t in range(length[node]):
            input_ids[p + t] = ids[edge + t]
            position_ids[p + t] = depth[node] + t
            subtree_end[p + t] = p + subtree[node]
    return input_ids, position_ids, subtree_end


@_compiled
def _fill_rows(ids, offsets, state_lengths, parent, last_node, place, depth):
    """(source_rows, target_ids, sub_trajectory), each (M,)."""
    S = state_lengths.size
    M = offsets[S] - state_lengths.sum()
    source_rows, target_ids = np.empty(M, np.int64), np.empty(M, np.int64)
    sub_trajectory = np.empty(M, np.int64)
    row_end = 0
    for s in range(S):
        begin, first, last = offsets[s], state_lengths[s], offsets[s + 1] - offsets[s]
        row = row_end - first  # row + t is the row of the token at depth t
        row_end += last - first
        for t in range(first, last):
            target_ids[row + t] = ids[begin + t]
            sub_trajectory[row + t] = s
        # sources are the tokens one level higher, found from the last node up
        node, below = last_node[s], last - 1
        while below >= first:
            low = max(depth[node], first - 1)
            for t in range(low, below):
                source_rows[row + t + 1] = place[node] + t - depth[node]
            below = min(below, low)
            node = parent[node]
    return source_rows, target_ids, sub_trajectory


# Cuts along the depth-first order of the pairs.


@_compiled
def _shared_with_previous(ids, offsets, order):
    """(S,) tokens a pair shares with the one before it in `order`: all that it shares with any before."""
    shared = np.zeros(order.size, np.int64)
    for i in range(1, order.size):
        a, b = offsets[order[i - 1]], offsets[order[i]]
        most = min(offsets[order[i - 1] + 1] - a, offsets[order[i] + 1] - b)
        common = 0
        while common < most and ids[a + common] == ids[b + common]:
            common += 1
        shared[i] = common
    return shared


@_compiled
def _cheapest_cuts(lengths, shared, budget):
    """Bounds (0, ..., S) of runs that fit and repeat the fewest tokens in all, then of fewest runs.

    A run i..j-1 packs lengths[i] tokens, then lengths - shared for each other pair. It fits within `budget`,
    or within the longest pair if all of its pairs exceed the budget. A part of what fits fits too, so the
    starts that fit end j form a window that only moves on: a monotone queue finds every best start in O(S).
    """
    S, longest, last_within = lengths.size, lengths.max(), -1
    packed = np.zeros(S + 1, np.int64)  # tokens of the forest before each pair
    packed[1:] = np.cumsum(lengths - shared)
    cost = np.zeros(S + 1, np.int64)  # of the best cuts before j: repeated tokens * (S + 1) + runs
    best_start = np.zeros(S + 1, np.int64)
    queue, head, tail = np.empty(S, np.int64), 0, 0
    through = np.empty(S, np.int64)  # cost of a run that starts at i
    for j in range(1, S + 1):
        i = j - 1
        through[i] = cost[i] + (shared[i] * (S + 1) if i else 0) + 1
        while tail > head and through[queue[tail - 1]] > through[i]:
            tail -= 1
        queue[tail] = i
        tail += 1
        if lengths[i] <= budget:
            last_within = i
        while True:
            run = packed[j] - packed[queue[head]] + shared[queue[head]]
            if run <= budget or run <= longest and queue[head] > last_within:
                break
            head += 1
        best_start[j], cost[j] = queue[head], through[queue[head]]
    num_runs = 0
    j = S
    while j > 0:
        num_runs, j = num_runs + 1, best_start[j]
    bounds = np.zeros(num_runs + 1, np.int64)
    j = S
    for n in range(num_runs, 0, -1):
        bounds[n], j = j, best_start[j]
    return bounds
