"""Rollouts: a policy and a tool answer questions step by step, many trajectories in flight.

Each turn the policy calls the tool or answers. A trajectory ends with the answer, at the step limit, at an action
that is neither (nothing can follow it), or when the state no longer fits the policy's context.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec.structs import replace

from swirl.errors import EndpointError, EndpointUnusable
from swirl.rollout.concurrency import as_done
from swirl.rollout.policy import PolicyState, TokenCoder
from swirl.rollout.prompts import ParsedAction, observation_text, parse_action, question_prompt
from swirl.trajectories.record import Question, Step, Trajectory


class Tool(Protocol):
    """What a policy may call: `search` or `calculator`. A fault is a readable result, never an exception."""

    name: str

    async def __call__(self, argument: str) -> str: ...


@dataclass(frozen=True)
class RolloutLimits:
    """`max_queries` is what the prompt allows, `max_steps` ends a trajectory, `max_new_tokens` an action."""

    max_queries: int
    max_steps: int
    max_new_tokens: int = 48
    temperature: float = 1.0


def draw_seed(*names: object) -> int:
    """A 63-bit seed from what names the draw, such as (seed, question id, sample, step); same on every machine."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def trajectory_id(question: Question, sample: int) -> str:
    return f"{question.id}#{sample}"


class Unanswered(msgspec.Struct, frozen=True):
    """A trajectory that could not be made: one request of it failed for good. It is counted, shown and asked again by
    the next run, and never taken for a wrong answer.
    """

    question: Question
    sample: int
    reason: str

    @property
    def id(self) -> str:
        return trajectory_id(self.question, self.sample)


def _why_it_ends(parsed: ParsedAction | None, tool: Tool, *, last: bool) -> str | None:
    """None: the trajectory goes on with the tool's result. In its last step no state can follow, so the tool is not
    asked.
    """
    if parsed is None or parsed.kind not in ("answer", tool.name):
        return "invalid_action"
    if parsed.kind == "answer":
        return "answer"
    return "step_limit" if last else None


async def rollout(
    question: Question,
    sample: int,
    *,
    policy,
    tool: Tool,
    limits: RolloutLimits,
    coder: TokenCoder | None,
    seed: int,
) -> Trajectory:
    """One trajectory. With a `coder`, token ids travel along; ids the policy gives are kept as they are.

    Raises EndpointError as the policy and the tool do.
    """
    prompt = question_prompt(question.question, tool.name, limits.max_queries)
    prompt_ids = tuple(coder.prompt_ids(prompt)) if coder else None
    state = list(prompt_ids or ())
    steps: list[Step] = []
    stop, prediction, retokenized = None, None, False
    context = getattr(policy, "max_state_tokens", None)
    while stop is None:
        action = await policy.act(
            PolicyState(
                prompt=prompt,
                steps=tuple(steps),
                ids=tuple(state) if coder else None,
                seed=draw_seed(seed, question.id, sample, len(steps)),
                temperature=limits.temperature,
                max_new_tokens=limits.max_new_tokens,
            )
        )
        ids, log_probs = (action.ids, action.log_probs) if coder else (None, None)
        if coder and ids is None:
            ids, log_probs, retokenized = tuple(coder.action_ids(action.text)), None, True
        parsed = parse_action(action.text) if action.stopped else None
        stop = _why_it_ends(parsed, tool, last=len(steps) + 1 == limits.max_steps)
        prediction = parsed.argument if stop == "answer" else None
        observation = observation_ids = None
        if stop is None:
            observation = observation_text(parsed.argument, await tool(parsed.argument))
            observation_ids = tuple(coder.observation_ids(observation)) if coder else None
        steps.append(
            Step(
                action=action.text,
                action_ids=ids,
                log_probs=log_probs,
                observation=observation,
                observation_ids=observation_ids,
            )
        )
        state += (ids or ()) + (observation_ids or ())
        if stop is None and context is not None and len(state) + limits.max_new_tokens > context:
            stop = "context_limit"
    return Trajectory(
        id=trajectory_id(question, sample),
        question=question,
        sample=sample,
        prompt=prompt,
        prompt_ids=prompt_ids,
        steps=tuple(steps),
        stop=stop,
        prediction=prediction,
        tokenizer=coder.fingerprint if coder else None,
        retokenized=retokenized,
        policy=policy.name,
    )


def with_ids(trajectory: Trajectory, coder: TokenCoder) -> Trajectory:
    """The trajectory with token ids made from its text, once; `retokenized` says so.

    A step without an observation, before the last, is followed by an empty one: the next action needs its turn opened.
    """
    last = len(trajectory.steps) - 1
    steps = tuple(
        replace(
            step,
            action_ids=tuple(coder.action_ids(step.action)),
            observation_ids=None
            if step.observation is None and k == last
            else tuple(coder.observation_ids(step.observation or "")),
            log_probs=None,
        )
        for k, step in enumerate(trajectory.steps)
    )
    return replace(
        trajectory,
        prompt_ids=tuple(coder.prompt_ids(trajectory.prompt)),
        steps=steps,
        tokenizer=coder.fingerprint,
        retokenized=True,
    )


def rollouts(
    asked: Iterable[tuple[Question, int]],
    *,
    policy,
    tool: Tool,
    limits: RolloutLimits,
    coder,
    seed: int,
    in_flight: int,
    finish: Callable[[Trajectory], Awaitable[Trajectory]] | None = None,
) -> AsyncIterator[Trajectory | Unanswered]:
    """Trajectories of (question, sample) pairs as they end, at most `in_flight` at a time; the input is read lazily.

    `finish` adds to a trajectory (its verdicts, say) while others are still played. Raises EndpointUnusable.
    """

    async def play(question: Question, sample: int) -> Trajectory | Unanswered:
        try:
            made = await rollout(question, sample, policy=policy, tool=tool, limits=limits, coder=coder, seed=seed)
        except EndpointUnusable:
            raise
        except EndpointError as error:
            return Unanswered(question, sample, str(error))
        return await finish(made) if finish else made

    return as_done((play(*pair) for pair in asked), in_flight)
