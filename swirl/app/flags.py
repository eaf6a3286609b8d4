"""Groups of flags that several commands have, each with its sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from swirl.app import command
from swirl.app.resolve import open_policy, tokens_in_an_action
from swirl.config import MAX_CACHE_TOKENS
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.rollout.rollout import RolloutSpec
from swirl.rollout.task import Task


@dataclass(frozen=True, kw_only=True)
class PolicyFlags:
    """Who answers, and how."""

    policy: str = "almanac"
    """`almanac` (ships with swirl), a checkpoint's folder or its name on the Hugging Face hub, or a server's URL such
    as http://127.0.0.1:8000/v1#model."""
    tokenizer: Path | None = None
    """For a URL, the folder of its model's tokenizer.json, or its name on the hub: token ids then travel with the text,
    and those that the server gives are kept with their log-probs. Without it training tokenizes the text."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. Ours."""
    max_steps: int | None = None
    """Steps in a trajectory at most; default: as many as the task allows queries (the paper's 5 with search, 10 with
    the calculator), and to evaluate one more, for the answer."""
    max_new_tokens: int | None = None
    """Tokens in an action at most; default: 48, enough for `almanac`, or 512 for a model of more than 10M weights or
    behind a URL. Ours."""
    malformed: Literal["end", "continue"] = "end"
    """What an action that is neither a call nor an answer does: end the trajectory (ours), or count as a thought, after
    which the model is asked again (as the paper's pseudo-code does)."""
    stop_at_tag: bool = False
    """End an action at its closing tag: nothing can follow it, and the end of turn is context, not drawn or learned."""
    in_flight: int = 1024
    """Trajectories in flight at a time. Ours."""
    seed: int = 0
    """Of all draws: a trajectory's depend on it, its question and its sample alone."""
    device: str = "auto"
    """Where a checkpoint runs: auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in; auto: bfloat16 on cuda, else float32."""
    max_cache_tokens: int = MAX_CACHE_TOKENS
    """Tokens whose keys and values the sampler holds at most, of all sequences in flight and of finished ones."""

    def check_policy(self) -> None:
        """Raises ConfigError on a value that cannot be meant; called by the config that inherits the group."""
        command.require_at_least(1, self, "max_steps", "max_new_tokens", "in_flight", "max_cache_tokens")
        command.require_at_least(0, self, "temperature")

    def open_policy(self, client: Client, limits: EndpointLimits):
        """(policy, tokenizer or None). Raises CheckpointError, ConfigError."""
        where = {"device": self.device, "dtype": self.dtype, "max_cache_tokens": self.max_cache_tokens}
        return open_policy(self.policy, **where, client=client, limits=limits, tokenizer=self.tokenizer)

    def spec(self, task: Task, policy, tokenizer, *, max_steps: int) -> RolloutSpec:
        """The rollout of a task; `max_steps` unless the flag says otherwise."""
        return RolloutSpec(
            task=task,
            policy=policy,
            tokenizer=tokenizer,
            max_steps=self.max_steps or max_steps,
            max_new_tokens=tokens_in_an_action(self.max_new_tokens, self.policy),
            temperature=self.temperature,
            malformed=self.malformed,
            stop_at_tag=self.stop_at_tag,
            seed=self.seed,
            in_flight=self.in_flight,
        )
