"""Random decoding problems: states of unequal depth in a forest, keys scattered over a pool, NaN where none lies."""

from __future__ import annotations

import numpy as np
import torch

from swirl.tree.pack import pack_states


def decode_case(B, Hq, Hkv, D, depth, N, dtype=torch.float64, device="cpu", seed=0):
    """The positional arguments of tree_decode: B states of up to `depth` tokens, up to N own tokens each (0 too)."""
    rng = np.random.default_rng(seed)
    trunk = rng.integers(0, 5, depth)
    states = []
    for _ in range(B):
        shared, own = rng.integers(0, depth), rng.integers(1, depth + 1)
        states.append(np.concatenate((trunk[:shared], rng.integers(0, 5, own)))[:depth].astype(np.int32))
    packed = pack_states(states)
    T, own_lengths = packed.input_ids.size, rng.integers(0, N + 1, B)
    slots = rng.permutation(T + B * N + 3)
    own_slots = slots[T : T + B * N].reshape(B, N)
    pools = []
    for _ in range(2):
        pool = torch.full((slots.size, Hkv, D), float("nan"), dtype=dtype)
        written = np.concatenate((slots[:T], *(row[:n] for row, n in zip(own_slots, own_lengths))))
        pool[written] = torch.from_numpy(rng.standard_normal((written.size, Hkv, D))).to(dtype)
        pools.append(pool.to(device))
    q = torch.from_numpy(rng.standard_normal((B, Hq, D))).to(dtype).to(device)
    integers = (slots[:T], packed.subtree_end, packed.position_ids, packed.last, own_slots, own_lengths)
    return [q, *pools, *(torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(device) for x in integers)]
