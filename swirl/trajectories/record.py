"""Questions, steps and trajectories, and their JSONL form: one trajectory a line.

Token ids travel with the text, so nothing is tokenised again between turns:
state s_k = prompt_ids + (action_ids + observation_ids of every step before k).
`observation_ids` holds the whole turn around the result, as the next state continues with it.
"""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Mapping
from typing import Literal

import msgspec
from msgspec.structs import replace

from swirl.errors import InputError
from swirl.trajectories.actions import TAGS, Call, parse_action, tools_in_text

SCHEMA_VERSION = 1
TRUNCATED = "it was truncated"
Verdict = Literal["GOOD", "BAD"]
TopLogProbs = tuple[tuple[tuple[str, float], ...], ...]


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is asked. `answer` is the golden answer, None where there is none; `hops` the known number of steps."""

    id: str
    task: str
    question: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    hops: int | None = None


class Judged(enum.Enum):
    """What became of a judgement that was asked for."""

    ANSWERED = "answered"  # a verdict or a reward was given
    UNREADABLE = "unreadable"  # the judge answered, but without a verdict: asking again would not change that
    UNANSWERED = "unanswered"  # no answer came: the next run asks again


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One action and what came back: the one record of an action, from its draw to the loss.

    `call` is what the action does, None where the environment refuses it; `invalid` then says why. `truncated`: the
    action hit its token limit (or a server's filter) before its end: its text and ids end where it was truncated, and
    no end of turn is added. `stop_text` is the closing tag at which generation was stopped, where it was: the last id
    completes it, and no end of turn is added either. `judged` is None where no judge was asked.

    `log_probs` are the behaviour policy's, one natural log per action id, under the distribution the action was drawn
    from (its temperature within); greedy actions have those of temperature 1. A server's are kept as it gives them:
    where those are of temperature 1 whatever it draws at, the importance ratio corrects for the model alone.
    `top_log_probs` holds (token, log-prob) alternatives at each token, the drawn one first, where a judge asked its
    model for them; no trajectory has them.
    """

    action: str
    observation: str | None = None
    action_ids: tuple[int, ...] | None = None
    observation_ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    truncated: bool = False
    stop_text: str | None = None
    call: Call | None = None
    invalid: str | None = None
    verdict: Verdict | None = None
    judged: Judged | None = None
    reason: str | None = None
    reward: float | None = None
    top_log_probs: TopLogProbs | None = None

    @property
    def leaves_turn_open(self) -> bool:
        """Whether the model did not write the end of its turn: the next state has it as context, not the action."""
        return self.truncated or self.stop_text is not None


def with_call(step: Step, tools: Mapping[str, str] = TAGS) -> Step:
    """The step with `call` or `invalid`, read from its text, where `tools` are on offer (tool to tag)."""
    call, invalid = (None, TRUNCATED) if step.truncated else parse_action(step.action, tools)
    return replace(step, call=call, invalid=invalid)


class Trajectory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """K steps answering one question. `stop` says why it ended; `prediction` is the answer given, if any.

    `tools` are those on offer, each with its tag: {"search": "search_query"}.
    `tokenizer` is the fingerprint of the tokenizer that made the ids (None: no ids).
    `outcome` says whether the final answer is correct, `dropped` why a filter let the trajectory go;
    `judged` is UNREADABLE or UNANSWERED where that was for want of a judgement.
    `retokenized` says the ids were made from text once, because the policy's endpoint gave none.
    """

    id: str
    question: Question
    prompt: str
    steps: tuple[Step, ...]
    stop: Literal["answer", "step_limit", "invalid_action", "context_limit"]
    sample: int = 0
    prediction: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    tokenizer: str | None = None
    retokenized: bool = False
    policy: str | None = None
    outcome: bool | None = None
    dropped: str | None = None
    judged: Judged | None = None
    tools: dict[str, str] = {}
    schema: int = SCHEMA_VERSION

    def state_ids(self, k: int) -> list[int]:
        """Token ids of state k (from 0), all before action k. Raises ValueError where ids are absent."""
        if self.prompt_ids is None:
            raise ValueError(f"trajectory {self.id} carries no token ids")
        ids = list(self.prompt_ids)
        for step in self.steps[:k]:
            ids += (step.action_ids or ()) + (step.observation_ids or ())
        return ids

    def sub_trajectories(self) -> list[tuple[list[int], list[int]]]:
        """The k (state_ids, action_ids) pairs of a trajectory of k actions."""
        return [(self.state_ids(k), list(step.action_ids or ())) for k, step in enumerate(self.steps)]


_decoder = msgspec.json.Decoder(Trajectory)
_encoder = msgspec.json.Encoder()


def decode_trajectory(text: bytes | str, file: str | os.PathLike = "<memory>", line: int | None = None) -> Trajectory:
    """Parse and validate one line. Raises InputError naming file, line and field."""
    try:
        trajectory = _decoder.decode(text)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        raise InputError(file, message, line=line, field=path.strip("`.") or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(file, f"expected one JSON object a line, in UTF-8 ({error})", line=line) from None
    _validate(trajectory, file, line)
    return with_calls(trajectory)


def with_calls(trajectory: Trajectory) -> Trajectory:
    """The trajectory with its tools and what each action does, where it does not say: lines that were written before
    these were stored, or by others. What it says is kept.
    """
    if all(step.call or step.invalid for step in trajectory.steps):
        return trajectory
    tools = trajectory.tools or tools_in_text(trajectory.prompt, [step.action for step in trajectory.steps])
    steps = [step if step.call or step.invalid else with_call(step, tools or TAGS) for step in trajectory.steps]
    if trajectory.stop == "invalid_action" and steps[-1].call:  # a valid action that ended it: it was truncated
        steps[-1] = with_call(replace(steps[-1], truncated=True))
    return replace(trajectory, tools=tools, steps=tuple(steps))


def _validate(trajectory: Trajectory, file, line) -> None:
    def refuse(field, expected):
        raise InputError(file, expected, line=line, field=field)

    if trajectory.schema != SCHEMA_VERSION:
        refuse("schema", f"expected {SCHEMA_VERSION}, got {trajectory.schema}")
    if not trajectory.steps:
        refuse("steps", "expected at least one step")
    has_ids = trajectory.prompt_ids is not None
    if has_ids and not trajectory.prompt_ids:
        refuse("prompt_ids", "expected at least one token id")
    if has_ids and min(trajectory.prompt_ids) < 0:
        refuse("prompt_ids", "expected token ids >= 0")
    last = len(trajectory.steps) - 1
    for k, step in enumerate(trajectory.steps):
        if has_ids != (step.action_ids is not None):
            refuse(f"steps[{k}].action_ids", "expected ids on the prompt and on every action, or on none")
        if has_ids and not step.action_ids:
            refuse(f"steps[{k}].action_ids", "expected at least one token id")
        if has_ids and k < last and not step.observation_ids:
            refuse(f"steps[{k}].observation_ids", "expected token ids of what follows the action")
        for name in ("action_ids", "observation_ids"):
            if getattr(step, name) and min(getattr(step, name)) < 0:
                refuse(f"steps[{k}].{name}", "expected token ids >= 0")
        if step.log_probs is not None and len(step.log_probs) != len(step.action_ids or ()):
            refuse(f"steps[{k}].log_probs", f"expected {len(step.action_ids or ())} values, one per action id")
        for log_prob in step.log_probs or ():
            if not -math.inf < log_prob <= 0:
                refuse(f"steps[{k}].log_probs", f"expected finite log-probs of at most 0, got {log_prob}")
        if step.reward is not None and not 0 <= step.reward <= 1:
            refuse(f"steps[{k}].reward", f"expected a reward in [0, 1], got {step.reward}")


def encode_trajectory(trajectory: Trajectory) -> bytes:
    """One line of JSON, newline included."""
    return _encoder.encode(trajectory) + b"\n"
