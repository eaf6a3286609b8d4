"""What an update learns from: groups of attempts at the same thing, each with its reward.

An attempt is one action, drawn or recorded, or in outcome-rl a whole trajectory with all its actions. Those of a group
are compared: the draws at one state, the trajectories of one question; a recorded action is a group of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from swirl.app.stages import Setup
from swirl.judging.filtering import step_to_judge
from swirl.judging.rewards import ask_rewards, with_one_reward
from swirl.learning.batches import SubTrajectory
from swirl.rollout.rollout import Unanswered, draw_seed
from swirl.sampling.local_policy import completion_action
from swirl.trajectories.actions import TAGS
from swirl.trajectories.record import Step, Trajectory, with_call


class State(NamedTuple):
    """State k (from 0) of a trajectory, which belongs to the `tree`-th tree of its update."""

    tree: int
    trajectory: Trajectory
    k: int

    def ids(self) -> list[int]:
        return self.trajectory.state_ids(self.k)


class Attempt(NamedTuple):
    """Actions in their states that share a reward, None where they are masked."""

    reward: float | None
    actions: list[tuple[State, Step]]


Groups = list[list[Attempt]]


def states_of(trajectories: Sequence[Trajectory]) -> list[State]:
    """Every state of every trajectory."""
    return [
        State(tree, trajectory, k) for tree, trajectory in enumerate(trajectories) for k in range(len(trajectory.steps))
    ]


def draw(setup: Setup, states: Sequence[State], update: int) -> list[list[Step]]:
    """G actions of the current policy at each state, each with what it does; other draws in every update."""
    config, G = setup.config, setup.config.samples_per_state
    ids = [state.ids() for state in states]
    completions = setup.policy.engine.sample(
        [state_ids for state_ids in ids for _ in range(G)],
        seeds=[draw_seed(config.seed, "update", update, s.trajectory.id, s.k, g) for s in states for g in range(G)],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=setup.policy.stop_ids,
    )
    steps = [completion_action(completion, setup.tokenizer) for completion in completions]
    return [
        [with_call(step, state.trajectory.tools or TAGS) for step in steps[i * G : i * G + G]]
        for i, state in enumerate(states)
    ]


async def rewarded(judge, states: Sequence[State], drawn: Sequence[Sequence[Step]]) -> list[list[Step]]:
    """The actions drawn at each state, each with its reward by `judge`. Raises EndpointUnusable."""
    asked = (
        ask_rewards(judge, [step_to_judge(state.trajectory, state.k, step) for step in steps])
        for state, steps in zip(states, drawn, strict=True)
    )
    return list(await asyncio.gather(*asked))


def sampled(states: Sequence[State], drawn: Sequence[Sequence[Step]]) -> Groups:
    """A group for each state: its draws."""
    return [
        [Attempt(step.reward, [(state, step)]) for step in steps] for state, steps in zip(states, drawn, strict=True)
    ]


def recorded(states: Sequence[State]) -> Groups:
    """A group for each recorded action, alone."""
    steps = [(state, state.trajectory.steps[state.k]) for state in states]
    return [[Attempt(step.reward, [(state, step)])] for state, step in steps]


def played(trajectories: Sequence[Sequence[Trajectory | Unanswered]]) -> Groups:
    """A group for each question: its trajectories, rewarded by their outcome. One that was not answered is masked."""

    def attempt(tree: int, made: Trajectory | Unanswered) -> Attempt:
        if isinstance(made, Unanswered) or made.outcome is None:
            return Attempt(None, [])
        made = with_one_reward(made, float(made.outcome))
        return Attempt(float(made.outcome), [(State(tree, made, k), step) for k, step in enumerate(made.steps)])

    return [[attempt(tree, made) for made in of_question] for tree, of_question in enumerate(trajectories)]


def rewards_of(groups: Groups) -> np.ndarray:
    """(N, G) float64, a row for each group; NaN where an attempt is masked."""
    return np.array([[np.nan if a.reward is None else a.reward for a in group] for group in groups], dtype=np.float64)


def sub_trajectories(groups: Groups, advantages: np.ndarray) -> list[SubTrajectory]:
    """Every action of every attempt, with its attempt's advantage."""
    return [
        SubTrajectory(state.tree, state.k, state.ids(), step, float(advantage))
        for group, row in zip(groups, advantages, strict=True)
        for attempt, advantage in zip(group, row, strict=True)
        for state, step in attempt.actions
    ]
