"""Trajectories of random ids, and a small model for them: what the tests of chain attention share.

Only torch, numpy and the model are needed: the GPU tests also run on machines without the rest.
"""

from __future__ import annotations

import numpy as np

from swirl.model.gemma import GemmaConfig

CONFIG = GemmaConfig(64, 32, 48, 3, 4, 2, head_dim=14, query_pre_attn_scalar=20, sliding_window=5)


def chain_of(rng, steps, prompt=None):
    """The (state, action) pairs of one trajectory, `steps` of them, after a prompt."""
    state, pairs = list(prompt or rng.integers(0, 64, rng.integers(1, 9)).tolist()), []
    for _ in range(steps):
        action = rng.integers(0, 64, rng.integers(1, 6)).tolist()
        pairs.append((list(state), action))
        state += action + rng.integers(0, 64, rng.integers(1, 7)).tolist()
    return pairs


def trajectories(seed=0, num=7):
    """Several a question: prompts shared, as in an update on recorded actions."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 64, 6).tolist() for _ in range(3)]
    return [chain_of(rng, int(rng.integers(1, 5)), prompts[i % 3]) for i in range(num)]
