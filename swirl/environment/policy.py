"""Policies: what proposes the next action.

A policy is any object with a `name` and `async def act(self, state: PolicyState) -> PolicyAction`.
"""

from __future__ import annotations

import msgspec

from swirl.trajectory import Step


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """State s_k: the prompt and the steps before k, each with its observation.

    `ids` are the state's token ids for policies that run in this process, None for those over the wire.
    `seed` makes the draw repeatable; `temperature` 0 is greedy; `max_new_tokens` bounds the action.
    """

    prompt: str
    steps: tuple[Step, ...]
    ids: tuple[int, ...] | None = None
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256


class PolicyAction(msgspec.Struct, frozen=True, kw_only=True):
    """Action a_k. `ids` and `log_probs` (natural log, one per id) are None where the endpoint gives none.

    `stopped` is False where `max_new_tokens` cut the action off.
    """

    text: str
    ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    stopped: bool = True
