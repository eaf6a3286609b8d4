"""Rewards of actions, in [0, 1]: asked of a judge, or read from what the data says. None masks the action."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from msgspec.structs import replace

from swirl.judging.judges import Judgement, StepToJudge
from swirl.trajectories.record import Step, Trajectory


def graded(judged: Judgement | Step) -> float | None:
    """The reward that was given, else the verdict as 1 or 0, else None."""
    if judged.reward is not None:
        return judged.reward
    return {"GOOD": 1.0, "BAD": 0.0, None: None}[judged.verdict]


def is_refused(step: Step) -> bool:
    """Whether the environment refuses the action: truncated, malformed, or a call of a tool that is not on offer."""
    return step.call is None


async def ask_reward(judge, item: StepToJudge) -> Step:
    """The step with its reward and what the judge said of it: 0 where the environment refuses the action, which is not
    asked about; else the judge's, None where it gave neither reward nor verdict. Raises EndpointUnusable.
    """
    if is_refused(item.step):
        return replace(item.step, reward=0.0)
    said = await judge.judge(item)
    return replace(item.step, reward=graded(said), verdict=said.verdict, judged=said.judged, reason=said.reason)


async def ask_rewards(judge, asked: Iterable[StepToJudge]) -> list[Step]:
    """`ask_reward` of each, all at once."""
    return list(await asyncio.gather(*(ask_reward(judge, item) for item in asked)))


def with_recorded_rewards(trajectory: Trajectory) -> Trajectory:
    """The trajectory with the rewards or verdicts of its steps as rewards; a refused action has 0, whatever it has."""
    rewards = [0.0 if is_refused(step) else graded(step) for step in trajectory.steps]
    return _rewarded(trajectory, rewards)


def with_one_reward(trajectory: Trajectory, reward: float | None) -> Trajectory:
    """The trajectory with the same reward on every step."""
    return _rewarded(trajectory, [reward] * len(trajectory.steps))


def _rewarded(trajectory: Trajectory, rewards: list[float | None]) -> Trajectory:
    steps = (replace(step, reward=reward) for step, reward in zip(trajectory.steps, rewards, strict=True))
    return replace(trajectory, steps=tuple(steps))
