"""Rewards of actions: asked of a judge, or read from the data; NaN where there is none, which masks the action."""

from __future__ import annotations

import asyncio

import numpy as np

from swirl import tasks
from swirl.filter import step_to_judge
from swirl.judging.judges import Judgement
from swirl.trajectories.record import Step, Trajectory


def mean_reward(values: np.ndarray) -> float | None:
    """Of those that are not NaN; None where all are."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def reward_metrics(rewards: np.ndarray) -> dict:
    """What an update logs of its rewards: their mean, how many actions there were, and how many had none."""
    return {"reward": mean_reward(rewards), "actions": rewards.size, "masked": int(np.isnan(rewards).sum())}


async def rewards_of(judge, trajectories, owners, actions) -> list[float]:
    """Reward of each action in [0, 1]; NaN where the judge failed. One cut off before its end is bad, unasked.

    `owners` are the actions' states, each as (index of its trajectory, k). Raises EndpointUnusable.
    """

    async def reward(owner, action):
        tree, k = owner
        if not action.stopped:
            return 0.0
        return _graded(await judge.judge(step_to_judge(trajectories[tree], k, action.text)))

    return list(await asyncio.gather(*(reward(*pair) for pair in zip(owners, actions, strict=True))))


def _graded(judged: Judgement | Step) -> float:
    """Its reward, else its verdict as 1 or 0, else NaN."""
    if judged.reward is not None:
        return judged.reward
    return {"GOOD": 1.0, "BAD": 0.0, None: float("nan")}[judged.verdict]


def _recorded_reward(trajectory: Trajectory, k: int, reward: str) -> float:
    """Of step k as the data grades it; under `outcome` the trajectory's."""
    if reward == "outcome":
        outcome = trajectory.outcome
        if outcome is None and trajectory.question.answer is not None:
            outcome = tasks.is_correct(trajectory.question, trajectory.prediction)
        return float("nan") if outcome is None else float(outcome)
    return _graded(trajectory.steps[k])


def recorded_rewards(trajectories: list[Trajectory], reward: str) -> np.ndarray:
    """(N,) float64, of all steps of all trajectories in turn; NaN where the data does not say."""
    return np.array([_recorded_reward(t, k, reward) for t in trajectories for k in range(len(t.steps))])
