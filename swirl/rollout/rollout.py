"""Rollouts: a policy and a task's tools answer questions step by step, many trajectories in flight.

Each turn the policy calls a tool or answers. A trajectory ends with the answer, at the step limit, at an action that is
neither (unless it may go on: then that is what it reads), or when the state no longer fits the policy's context.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec.structs import replace

from swirl.errors import EndpointError, EndpointUnusable
from swirl.rollout.concurrency import as_done
from swirl.rollout.policy import Policy, PolicyState, TurnTokenizer
from swirl.rollout.task import Task
from swirl.trajectories.actions import ANSWER, closing_tags, observation_text
from swirl.trajectories.record import Question, Step, Trajectory, with_call


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """All that a rollout needs but the question: who plays what, how long, and with which draws.

    With a `tokenizer` token ids travel along with the text. `max_steps` ends a trajectory, `max_new_tokens` an action;
    a draw depends on `seed`, the question, the sample and the step alone. A `malformed` action, neither a call nor an
    answer, ends the trajectory, or the model is told so and asked again. With `stop_at_tag` an action ends where it
    completes a closing tag. `in_flight` trajectories run at a time.
    """

    task: Task
    policy: Policy
    tokenizer: TurnTokenizer | None = None
    max_steps: int
    max_new_tokens: int = 48
    temperature: float = 1.0
    malformed: Literal["end", "continue"] = "end"
    stop_at_tag: bool = False
    seed: int = 0
    in_flight: int = 1024


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


def _why_it_ends(step: Step, malformed: str, *, last: bool) -> str | None:
    """None: the trajectory goes on with an observation. In its last step no state can follow, so no tool is asked."""
    if step.call is None and malformed == "end":
        return "invalid_action"
    if step.call is not None and step.call.tool == ANSWER:
        return "answer"
    return "step_limit" if last else None


async def rollout(question: Question, sample: int, spec: RolloutSpec) -> Trajectory:
    """One trajectory. Ids that the policy gives are kept as they are. Raises EndpointError as policy and tools do."""
    task, tokenizer = spec.task, spec.tokenizer
    tools = {tool.name: tool for tool in task.tools}
    tags = {tool.name: tool.tag for tool in task.tools}
    prompt = task.prompt_for(question)
    prompt_ids = tuple(tokenizer.prompt_ids(prompt)) if tokenizer else None
    state = list(prompt_ids or ())
    steps: list[Step] = []
    stop, prediction, retokenized = None, None, False
    context = getattr(spec.policy, "max_state_tokens", None)
    while stop is None:
        step = await spec.policy.act(
            PolicyState(
                prompt=prompt,
                steps=tuple(steps),
                ids=tuple(state) if tokenizer else None,
                seed=draw_seed(spec.seed, question.id, sample, len(steps)),
                temperature=spec.temperature,
                max_new_tokens=spec.max_new_tokens,
                stop_texts=closing_tags(tags) if spec.stop_at_tag else (),
            )
        )
        if not tokenizer:
            step = replace(step, action_ids=None, log_probs=None)
        elif step.action_ids is None:
            step = replace(step, action_ids=action_ids(step, tokenizer), log_probs=None)
            retokenized = True
        step = with_call(step, tags)
        stop = _why_it_ends(step, spec.malformed, last=len(steps) + 1 == spec.max_steps)
        if stop == "answer":
            prediction = step.call.argument
        elif stop is None:
            observation = f"error: {step.invalid}"
            if step.call is not None:
                observation = observation_text(step.call.argument, await tools[step.call.tool](step.call.argument))
            step = replace(step, observation=observation)
            if tokenizer:
                step = replace(step, observation_ids=observation_ids(step, tokenizer))
        steps.append(step)
        state += (step.action_ids or ()) + (step.observation_ids or ())
        if stop is None and context is not None and len(state) + spec.max_new_tokens > context:
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
        outcome=task.is_correct(question, prediction),
        tools=tags,
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        retokenized=retokenized,
        policy=spec.policy.name,
    )


def action_ids(step: Step, tokenizer: TurnTokenizer) -> tuple[int, ...]:
    """Ids of an action's text, with its end of turn where the model wrote it; that stands alone where there is no text
    at all.
    """
    ids = tokenizer.action_ids(step.action)
    return tuple(ids[:-1] if step.leaves_turn_open and len(ids) > 1 else ids)


def observation_ids(step: Step, tokenizer: TurnTokenizer) -> tuple[int, ...]:
    """Ids of what follows an action. Where the model did not end its turn, that is done here, as context."""
    ended = (tokenizer.end_of_turn_id,) if step.leaves_turn_open else ()
    return (*ended, *tokenizer.observation_ids(step.observation or ""))


def with_ids(trajectory: Trajectory, tokenizer: TurnTokenizer) -> Trajectory:
    """The trajectory with token ids made from its text, once; `retokenized` says so.

    A step without an observation, before the last, is followed by an empty one: the next action needs its turn opened.
    """
    last = len(trajectory.steps) - 1
    steps = tuple(
        replace(
            step,
            action_ids=action_ids(step, tokenizer),
            observation_ids=None if step.observation is None and k == last else observation_ids(step, tokenizer),
            log_probs=None,
        )
        for k, step in enumerate(trajectory.steps)
    )
    return replace(
        trajectory,
        prompt_ids=tuple(tokenizer.prompt_ids(trajectory.prompt)),
        steps=steps,
        tokenizer=tokenizer.fingerprint,
        retokenized=True,
    )


def rollouts(
    asked: Iterable[tuple[Question, int]],
    spec: RolloutSpec,
    finish: Callable[[Trajectory], Awaitable[Trajectory]] | None = None,
) -> AsyncIterator[Trajectory | Unanswered]:
    """Trajectories of (question, sample) pairs as they end, `spec.in_flight` at a time; the input is read lazily.

    `finish` adds to a trajectory (its verdicts, say) while others are still played. Raises EndpointUnusable.
    """

    async def play(question: Question, sample: int) -> Trajectory | Unanswered:
        try:
            made = await rollout(question, sample, spec)
        except EndpointUnusable:
            raise
        except EndpointError as error:
            return Unanswered(question, sample, str(error))
        return await finish(made) if finish else made

    return as_done((play(*pair) for pair in asked), spec.in_flight)


async def collect(
    asked: Sequence[tuple[Question, int]],
    spec: RolloutSpec,
    *,
    advance: Callable[[], None] = lambda: None,
    finish: Callable[[Trajectory], Awaitable[Trajectory]] | None = None,
) -> list[Trajectory | Unanswered]:
    """One for each (question, sample) pair, in the order asked, in memory; `advance` is called after each, `finish` is
    that of `rollouts`.
    """
    made = {}
    async for one in rollouts(asked, spec, finish):
        made[one.id] = one
        advance()
    return [made[trajectory_id(*pair)] for pair in asked]
