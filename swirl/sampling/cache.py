"""Keys and values of tokens, kept where they lie: a token has a slot, and sequences that share a prefix share slots.

Slots count the sequences that hold them; one that none holds is free. Slot 0 belongs to none: it takes what is
written for no one.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from mmap import mmap

import numpy as np
import torch

from swirl.kernels.tree_decode import tree_decode
from swirl.model.gemma import Gemma
from swirl.tree.batch import PackedStates
from swirl.tree.pack import pack_states

FIRST_SLOTS = 1024  # the pools double from here
MAX_PATHS = 16  # times max_tokens: what finished sequences have as ids, the tokens they share counted in each


class KeyCache:
    """Per layer, pools of keys and values, each (slots, Hkv, D); `max_tokens` bounds the slots in use."""

    def __init__(self, model: Gemma, max_tokens: int):
        self._model, self.max_tokens = model, max_tokens
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.clear()

    def clear(self) -> None:
        """Forget all: of other weights nothing is worth keeping. The pools stay, unless the model has moved."""
        embedding = self._model.model.embed_tokens.weight
        if self.keys and (self.keys[0].dtype, self.keys[0].device) != (embedding.dtype, embedding.device):
            self.keys, self.values = [], []
        size = self.keys[0].shape[0] if self.keys else 1
        self._holders = np.zeros(size, np.int32)
        self._free = np.arange(1, size, dtype=np.int32)
        self._finished: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._num_finished = self._path_tokens = 0

    @property
    def num_used(self) -> int:
        """Slots that some sequence holds, those of finished ones included."""
        return self._holders.size - 1 - self._free.size

    def take(self, count: int) -> np.ndarray | None:
        """(count,) int32 slots, free no more, for the caller to `hold`; finished sequences make room, oldest first.

        None where there is no room.
        """
        while count > self.max_tokens - self.num_used:
            if not self._finished:
                return None
            self._forget_oldest()
        if count > self._free.size:
            self._grow(count)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def hold(self, slots: np.ndarray) -> None:
        """One more sequence holds these, distinct, slots."""
        self._holders[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """One sequence fewer does."""
        self._holders[slots] -= 1
        self._free = np.concatenate((slots[self._holders[slots] == 0], self._free))

    def keep_finished(self, ids: np.ndarray, slots: np.ndarray) -> None:
        """Take over what a finished sequence holds, for states that go on from it, until room is wanted."""
        self._finished[self._num_finished] = ids, slots
        self._num_finished += 1
        self._path_tokens += ids.size
        while self._path_tokens > MAX_PATHS * self.max_tokens:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._forget(next(iter(self._finished)))

    def _forget(self, key: int) -> None:
        ids, slots = self._finished.pop(key)
        self._path_tokens -= ids.size
        self.release(slots)

    def find(self, states: Sequence[np.ndarray], running: Sequence[tuple[np.ndarray, np.ndarray]]):
        """(PackedStates of the states, (T,) slot of each of its tokens, -1 where it has none yet).

        Looked for in finished sequences and the (ids, slots) of running ones; finished ones that another goes on from,
        or repeats, are forgotten, once what the states share with them is held by the caller's states: see
        `drop_prefixes`.
        """
        held = [*self._finished.values(), *running]
        packed = pack_states([*(ids for ids, _ in held), *states])
        slot = np.full(packed.input_ids.size, -1, np.int32)
        if held:
            slot[packed.paths[: packed.offsets[len(held)]]] = np.concatenate([slots for _, slots in held])
        newest = {at: key for key, at in zip(self._finished, packed.last.tolist())}
        leaves = {key for at, key in newest.items() if packed.subtree_end[at] == at + 1}
        self._prefixes = [key for key in self._finished if key not in leaves]
        offsets = packed.offsets[len(held) :]
        paths = packed.paths[offsets[0] :]
        packed = PackedStates(packed.input_ids, packed.position_ids, packed.subtree_end, paths, offsets - offsets[0])
        return packed, slot

    def drop_prefixes(self) -> None:
        """Forget finished sequences that `find` saw to be the beginning of others, or the same."""
        for key in self._prefixes:
            if key in self._finished:
                self._forget(key)
        self._prefixes = []

    def _grow(self, count: int) -> None:
        size = self._holders.size
        larger = min(max(2 * size, size + count, FIRST_SLOTS), self.max_tokens + 1)
        config, embedding = self._model.config, self._model.model.embed_tokens.weight
        shape = (larger, config.num_key_value_heads, config.head_dim)
        try:
            for pools in (self.keys, self.values):
                for layer in range(config.num_hidden_layers):
                    pool = _empty(shape, embedding)
                    if layer < len(pools):
                        pool[:size] = pools[layer]
                        pools[layer] = pool
                    else:
                        pools.append(pool)
        except BaseException:
            self.keys, self.values = [], []  # their sizes may differ: `clear` begins anew
            raise
        self._holders = np.concatenate((self._holders, np.zeros(larger - size, np.int32)))
        self._free = np.concatenate((self._free, np.arange(size, larger, dtype=np.int32)))


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Memory of its own on a CPU, which goes back when the pool is outgrown, whatever malloc keeps of what is freed."""
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.frombuffer(mmap(-1, math.prod(shape) * like.itemsize), dtype=like.dtype).view(shape)


class Attend:
    """The attention of one pass, called by the layers in turn: keys and values into their slots `write`, then who sees
    what: of `seen`, the integers that `tree_decode` takes.
    """

    def __init__(self, cache: KeyCache, write: torch.Tensor, seen: list[torch.Tensor]):
        self._pools, self._write, self._seen = iter(zip(cache.keys, cache.values)), write.long(), seen

    def __call__(self, q, k, v, *, scale, softcap, window):
        keys, values = next(self._pools)
        keys[self._write] = k
        values[self._write] = v
        return tree_decode(q, keys, values, *self._seen, scale=scale, softcap=softcap, window=window)
