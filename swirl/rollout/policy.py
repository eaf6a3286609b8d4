"""What a policy is: anything that proposes the next action of a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from swirl.trajectories.record import Step


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """State s_k: the prompt and the steps before k, each with its observation.

    `ids` are the state's token ids where they are known. `seed` makes the draw repeatable; `temperature` 0 is
    greedy; `max_new_tokens` bounds the action, which also ends where it completes one of `stop_texts`.
    `top_log_probs` asks for that many alternatives at each token.
    """

    prompt: str
    steps: tuple[Step, ...] = ()
    ids: tuple[int, ...] | None = None
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    stop_texts: tuple[str, ...] = ()
    top_log_probs: int = 0


class Policy(Protocol):
    """Proposes actions. One that has a context limit says so in an attribute `max_state_tokens`."""

    name: str

    async def act(self, state: PolicyState) -> Step:
        """Action a_k as a step without observation: its text, whether it was truncated, and its ids and log-probs where
        they are known. What the action does is read by the rollout, which knows the tools.
        """
        ...


class TurnTokenizer(Protocol):
    """How turns become token ids; swirl.model.tokenizer.Tokenizer is one."""

    fingerprint: str
    end_of_turn_id: int
    eos_id: int

    def prompt_ids(self, prompt: str) -> list[int]: ...
    def action_ids(self, action: str) -> list[int]: ...
    def observation_ids(self, observation: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
