"""What a policy is: anything that proposes the next action of a state.

A policy is any object with a `name` and `async def act(self, state: PolicyState) -> PolicyAction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from swirl.trajectories.record import Step

TopLogProbs = tuple[tuple[tuple[str, float], ...], ...]


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """State s_k: the prompt and the steps before k, each with its observation.

    `ids` are the state's token ids where they are known. `seed` makes the draw repeatable; `temperature` 0 is
    greedy; `max_new_tokens` bounds the action. `top_log_probs` asks for that many alternatives at each token.
    """

    prompt: str
    steps: tuple[Step, ...] = ()
    ids: tuple[int, ...] | None = None
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    top_log_probs: int = 0


class PolicyAction(msgspec.Struct, frozen=True, kw_only=True):
    """Action a_k. `ids` and `log_probs` (natural log, one per id) are None where the endpoint gives none.

    `stopped` is False where `max_new_tokens`, or a server's safety filter, cut the action off.
    `top_log_probs` holds (token, log-prob) alternatives for each token of the text where they were asked for
    and given.
    """

    text: str
    ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    stopped: bool = True
    top_log_probs: TopLogProbs | None = None


class TokenCoder(Protocol):
    """How turns become token ids; swirl.model.tokenizer.Tokenizer is one."""

    fingerprint: str
    end_of_turn_id: int
    eos_id: int

    def prompt_ids(self, prompt: str) -> list[int]: ...
    def action_ids(self, action: str) -> list[int]: ...
    def observation_ids(self, observation: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
