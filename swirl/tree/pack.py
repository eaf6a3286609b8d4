"""The packed tree: every set of sub-trajectories is a prefix tree, laid out once for one forward pass.

    pack([(state_ids, action_ids), ...])      one PackedBatch; what is shared is found, not declared
    separate(...)                             one PackedBatch a pair: the baseline and the oracle
    pack_micro_batches(..., budget)           cut into batches of at most `budget` packed tokens
    pack_chains(trajectories, budget)         nothing shared between trajectories, so that no tree forks
    pack_states(states)                       the tree of bare states, and where each of their tokens lies in it

A radix tree of the token ids is grown pair by pair (each token is read once, each fork found by one hash
probe), its nodes are laid out in depth-first order, children in order of first appearance, and the rows
of the action tokens are read off by walking from each pair's last node to the root.
Cost: O(tokens read) time; no Python loop over tokens.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch

from swirl.kernels.chain_attention import ForkError, chain_lengths
from swirl.tree.batch import PackedBatch, PackedStates
from swirl.tree.radix import cheapest_cuts, fill_paths, fill_rows, fill_tree, layout, radix_tree, shared_with_previous

_log = logging.getLogger(__name__)
MAX_TOKEN_ID = 2**31 - 1


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
    sub_trajectories: Iterable[tuple[Sequence[int], Sequence[int]]],
    tokens_per_micro_batch: int,
    *,
    num_batches: int | None = None,
) -> list[tuple[PackedBatch, np.ndarray]]:
    """Cut the pairs into micro-batches of at most `tokens_per_micro_batch` packed tokens.

    With `num_batches`, at least as many as the limit needs, they are cut at the smallest limit that needs no more, so
    that they are of like sizes; there are fewer where pairs or places to cut are.

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
    tree = radix_tree(ids, offsets)
    laid_out = layout(*tree)
    (*_, last_node), (_, place, *_) = tree, laid_out
    order = np.argsort(place[last_node], kind="stable")
    lengths, shared = np.diff(offsets)[order], shared_with_previous(ids, offsets, order)
    limit = tokens_per_micro_batch
    if num_batches is not None:
        limit = _smallest_limit(lengths, shared, limit, num_batches)
    bounds = cheapest_cuts(lengths, shared, limit)

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
    if bounds.size == 2:
        return [(_filled(ids, offsets, state_lengths, tree, laid_out), np.arange(state_lengths.size))]
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


def pack_states(states: Sequence[np.ndarray]) -> PackedStates:
    """The tree of at least one bare state, each a flat int32 array of at least one token id; none is checked.

    A state may be given many times, and be the beginning of another: all of it lies in the tree once.
    """
    lengths = np.fromiter(map(len, states), np.int64, len(states))
    offsets = np.zeros(lengths.size + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    ids = np.concatenate(states)
    start, length, parent, last_node = radix_tree(ids, offsets)
    order, place, depth, subtree = layout(start, length, parent, last_node)
    tree = fill_tree(ids, start, length, order, place, depth, subtree)
    return PackedStates(*tree, fill_paths(offsets, length, parent, last_node, place, depth), offsets)


def _smallest_limit(lengths, shared, limit, num_batches):
    """The least number of tokens, by bisection up to `limit`, that cuts the pairs into at most num_batches."""
    low = max(-(-int((lengths - shared).sum()) // num_batches), min(limit, int(lengths.max())))
    while low < limit:
        middle = (low + limit) // 2
        if cheapest_cuts(lengths, shared, middle).size - 1 <= num_batches:
            limit = middle
        else:
            low = middle + 1
    return limit


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
    tree = radix_tree(ids, offsets)
    return _filled(ids, offsets, state_lengths, tree, layout(*tree))


def _filled(ids, offsets, state_lengths, tree, laid_out):
    """The batch of a radix tree and its layout."""
    start, length, parent, last_node = tree
    order, place, depth, subtree = laid_out
    fields = fill_tree(ids, start, length, order, place, depth, subtree)
    rows = fill_rows(ids, offsets, state_lengths, parent, last_node, place, depth)
    return PackedBatch(*map(torch.from_numpy, (*fields, *rows)), state_lengths.size, ids.size)
