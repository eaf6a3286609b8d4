"""Which trajectories a judge calls sound, and why the others are dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Literal, NamedTuple

from msgspec.structs import replace

from swirl.judging.judges import Judgement, OutcomeToJudge, StepToJudge
from swirl.rollout.concurrency import as_done
from swirl.trajectories.record import Judged, Question, Step, Trajectory

Mode = Literal["none", "process", "outcome", "both"]


class Why(NamedTuple):
    """Why a trajectory is dropped: `rule` is the mode that it failed, or what became of a judgement it lacks."""

    rule: Mode | Judged
    text: str


class Judges(NamedTuple):
    """Who is asked about the steps, the final answer and the rewards. Without an `outcome` judge `is_correct` says
    whether an answer is correct, of a question and an answer; without a `reward` judge nobody gives rewards.
    """

    steps: object
    is_correct: Callable[[Question, str | None], bool]
    outcome: object | None = None
    reward: object | None = None


def step_to_judge(trajectory: Trajectory, k: int, step: Step) -> StepToJudge:
    """`step`, recorded or drawn anew, at state k of the trajectory (from 0), without what came of it."""
    step = replace(step, observation=None, observation_ids=None)
    return StepToJudge(
        question=trajectory.question, steps=trajectory.steps[:k], step=step, tools=tuple(trajectory.tools)
    )


async def judge_steps(trajectory: Trajectory, judge) -> Trajectory:
    """The trajectory with a verdict on every step; verdicts it already carries are kept."""

    async def judged(k, step):
        if step.verdict is not None:
            return step
        judgement = await judge.judge(step_to_judge(trajectory, k, step))
        reward = step.reward if judgement.reward is None else judgement.reward
        return replace(step, verdict=judgement.verdict, judged=judgement.judged, reason=judgement.reason, reward=reward)

    steps = await asyncio.gather(*(judged(k, step) for k, step in enumerate(trajectory.steps)))
    return replace(trajectory, steps=tuple(steps))


async def reward_steps(trajectory: Trajectory, judge) -> tuple[Trajectory, Why | None]:
    """(the trajectory with a reward on every step, why it must be dropped or None); rewards it carries are kept."""

    async def graded(k, step):
        if step.reward is not None:
            return step, None
        judgement = await judge.judge(step_to_judge(trajectory, k, step))
        return replace(step, reward=judgement.reward), judgement

    graded_steps = await asyncio.gather(*(graded(k, step) for k, step in enumerate(trajectory.steps)))
    missing = [
        (f"step {k} has no reward", judgement.judged, judgement.reason)
        for k, (step, judgement) in enumerate(graded_steps, 1)
        if step.reward is None
    ]
    return replace(trajectory, steps=tuple(step for step, _ in graded_steps)), _without_judgement(missing)


def _without_judgement(missing: list[tuple[str, Judged | None, str | None]]) -> Why | None:
    """Why a trajectory is dropped that lacks (what, what became of it, why): UNANSWERED if asking again may change it,
    else UNREADABLE; None where it lacks nothing.
    """
    if not missing:
        return None
    unanswered = [one for one in missing if one[1] is Judged.UNANSWERED]
    what, _, reason = (unanswered or missing)[0]
    return Why(Judged.UNANSWERED if unanswered else Judged.UNREADABLE, f"{what} ({reason})" if reason else what)


def why_dropped(trajectory: Trajectory, mode: Mode, outcome: Judgement | None = None) -> Why | None:
    """The reason, or None to keep it; a judgement that it lacks comes before any other. `outcome` is what became of
    the judgement of its final answer, where a judge was asked.
    """
    missing = []
    if mode in ("process", "both"):
        steps = enumerate(trajectory.steps, 1)
        missing += [(f"step {k} has no verdict", step.judged, step.reason) for k, step in steps if step.verdict is None]
    if mode in ("outcome", "both") and trajectory.outcome is None:
        golden = trajectory.question.answer is not None
        what = f"the final answer has {'no verdict' if golden else 'no golden one'}"
        missing.append((what, outcome and outcome.judged, outcome and outcome.reason))
    if missing:
        return _without_judgement(missing)
    if mode in ("process", "both"):
        verdicts = [step.verdict for step in trajectory.steps]
        if "BAD" in verdicts:
            bad = verdicts.index("BAD")
            return Why("process", f"step {bad + 1} is BAD ({trajectory.steps[bad].reason or 'no reason given'})")
    if mode in ("outcome", "both") and not trajectory.outcome:
        return Why("outcome", "the final answer is not correct")
    return None


def as_dropped(trajectory: Trajectory, why: Why) -> Trajectory:
    """The trajectory with why it is dropped: the rule's name, then the reason."""
    judged = why.rule if isinstance(why.rule, Judged) else None
    return replace(trajectory, dropped=f"{rule_name(why)}: {why.text}", judged=judged)


def rule_name(why: Why) -> str:
    return {Judged.UNANSWERED: "unanswered", Judged.UNREADABLE: "unjudged"}.get(why.rule, why.rule)


async def with_outcome(trajectory: Trajectory, judge) -> tuple[Trajectory, Judgement | None]:
    """(the trajectory with its final answer held against the golden one by `judge`, whose word takes the place of any
    outcome it carries; its judgement). As it is, and None, where there is no golden answer.
    """
    if trajectory.question.answer is None:
        return trajectory, None
    judgement = await judge.judge(OutcomeToJudge(question=trajectory.question, prediction=trajectory.prediction))
    outcome = {"GOOD": True, "BAD": False, None: None}[judgement.verdict]
    return replace(trajectory, outcome=outcome), judgement


def judged_trajectories(
    trajectories: Iterable[Trajectory], judges: Judges, *, mode: Mode, in_flight: int
) -> AsyncIterator[tuple[Trajectory, Why | None]]:
    """(trajectory with verdicts, reason it is dropped or None) as they are done; the input is read lazily."""

    async def work(trajectory):
        if mode in ("process", "both"):
            trajectory = await judge_steps(trajectory, judges.steps)
        outcome = None
        if mode in ("outcome", "both"):
            if judges.outcome is not None:
                trajectory, outcome = await with_outcome(trajectory, judges.outcome)
            elif trajectory.outcome is None and trajectory.question.answer is not None:
                correct = judges.is_correct(trajectory.question, trajectory.prediction)
                trajectory = replace(trajectory, outcome=correct)
        why = why_dropped(trajectory, mode, outcome)
        if why is None and judges.reward is not None:  # grades cost: only what is kept has them
            trajectory, why = await reward_steps(trajectory, judges.reward)
        return trajectory, why

    return as_done((work(trajectory) for trajectory in trajectories), in_flight)


async def filter_in_memory(
    trajectories: list[Trajectory], judges: Judges, *, mode: Mode, advance: Callable[[], None]
) -> tuple[list[Trajectory], list[Trajectory]]:
    """(kept, dropped), each in the order given, every judged step carrying its verdict, what is dropped the reason."""
    order = {trajectory.id: place for place, trajectory in enumerate(trajectories)}
    kept, dropped = [], []
    async for trajectory, why in judged_trajectories(trajectories, judges, mode=mode, in_flight=1024):
        if why is None:
            kept.append(trajectory)
        else:
            dropped.append(as_dropped(trajectory, why))
        advance()
    for part in (kept, dropped):
        part.sort(key=lambda trajectory: order[trajectory.id])
    return kept, dropped
