"""What an update learns from: groups of attempts at the same thing, each with its reward.

An attempt is one action, drawn or recorded, or in outcome-rl a whole trajectory with all its actions. Those of a group
are compared: the draws at one state, the trajectories of one question; a recorded action is a group of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple

import msgspec
import numpy as np

from swirl.app.stages import Setup
from swirl.judging.filtering import step_to_judge
from swirl.judging.rewards import ask_reward, with_one_reward
from swirl.learning import distributed
from swirl.learning.batches import SubTrajectory
from swirl.rollout.rollout import Unanswered, draw_seed
from swirl.sampling.draw import SamplingParams
from swirl.sampling.local_policy import completion_action
from swirl.trajectories.actions import TAGS, closing_tags
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


class Draws:
    """The draws of one update after another: G actions of the policy at each state, each sent to `judge` the moment it
    has ended, while others are still drawn.

    With `--staleness 1` the next update's are drawn before this one's step, while this one's are judged.
    """

    def __init__(self, setup: Setup, judge, loop, chosen: Callable[[int], Sequence[Trajectory]]):
        """`chosen` gives the trajectories of an update; `loop` runs coroutines, and keeps what they leave behind."""
        self._setup, self._judge, self._loop, self._choose = setup, judge, loop, chosen
        self._chosen: dict[int, Sequence[Trajectory]] = {}  # by update
        self._drawn: dict[int, list[list[Step]]] = {}  # by update: of each trajectory, on all ranks
        self._judging: dict[int, asyncio.Future] = {}  # by update: all steps of this rank's trajectories

    def groups(self, update: int) -> Groups:
        """A group for each state of the update's trajectories: its draws. Raises EndpointUnusable, NonFiniteError."""
        config, G = self._setup.config, self._setup.config.samples_per_state
        for past in (self._chosen, self._drawn):
            past.pop(update - 1, None)
        for number in range(update, min(update + 1 + config.staleness, config.updates)):
            if number not in self._judging:
                self._draw(number)
        chosen = self._chosen[update]
        rewarded = self._loop.run(_awaited(self._judging.pop(update)))
        rewarded = distributed.gather_shares(self._by_trajectory(distributed.my_share(chosen), rewarded), list[Step])
        flat = list(chain.from_iterable(rewarded))
        return sampled(states_of(chosen), [flat[i : i + G] for i in range(0, len(flat), G)])

    def state(self, update: int) -> list | None:
        """As JSON: the draws of the coming update where there are any. The weights that drew them are gone by then, so
        they are part of a checkpoint; what they are worth is asked again.
        """
        return msgspec.to_builtins(self._drawn.get(update)) if self._setup.config.staleness else None

    def restore(self, update: int, state: list | None) -> None:
        """Go on with what `state` gave."""
        if state is None:
            return
        self._chosen[update] = self._choose(update)
        self._drawn[update] = msgspec.convert(state, list[list[Step]])
        steps = chain.from_iterable(distributed.my_share(self._drawn[update]))

        async def known(state: State, g: int) -> Step:
            return next(steps)  # they were asked for in this order

        mine = distributed.my_share(self._chosen[update])
        _, self._judging[update] = self._loop.run(self._begin(mine, known))

    def _draw(self, update: int) -> None:
        self._chosen[update] = self._choose(update)
        mine = distributed.my_share(self._chosen[update])  # whole trajectories, so that no trunk is prefilled twice
        with self._setup.sampling():
            drawn, self._judging[update] = self._loop.run(
                self._begin(mine, lambda state, g: draw(self._setup, state, update, g))
            )
        if self._setup.config.staleness:
            self._drawn[update] = distributed.gather_shares(self._by_trajectory(mine, drawn), list[Step])

    async def _begin(self, trajectories: Sequence[Trajectory], draw: Callable[[State, int], Awaitable[Step]]):
        """(Steps of every state and draw, in order; a future of the same with their rewards)."""

        async def rewarded(state: State, drawn: asyncio.Task) -> Step:
            return await ask_reward(self._judge, step_to_judge(state.trajectory, state.k, await drawn))

        G = self._setup.config.samples_per_state
        wanted = [(state, g) for state in states_of(trajectories) for g in range(G)]
        with self._setup.policy.engine.together():
            drawing = [asyncio.create_task(draw(state, g)) for state, g in wanted]
            await asyncio.sleep(0)  # each has asked
        judging = asyncio.gather(*(rewarded(state, drawn) for (state, _), drawn in zip(wanted, drawing, strict=True)))
        judging.add_done_callback(lambda future: future.cancelled() or future.exception())  # who waits is told
        return await asyncio.gather(*drawing), judging

    def _by_trajectory(self, trajectories: Sequence[Trajectory], steps: Sequence[Step]) -> list[list[Step]]:
        waiting, G = iter(steps), self._setup.config.samples_per_state
        return [list(islice(waiting, len(trajectory.steps) * G)) for trajectory in trajectories]


async def draw(setup: Setup, state: State, update: int, g: int) -> Step:
    """Draw g of the current policy at a state, with what it does; another in every update."""
    config, trajectory = setup.config, state.trajectory
    tools = trajectory.tools or TAGS
    stop_texts = closing_tags(tools) if config.stop_at_tag else ()
    completion = await setup.policy.engine.generate(
        state.ids(),
        seed=draw_seed(config.seed, "update", update, trajectory.id, state.k, g),
        params=SamplingParams(config.max_new_tokens, config.temperature, setup.policy.stop_ids, stop_texts),
    )
    return with_call(completion_action(completion, setup.tokenizer), tools)


async def _awaited(future: asyncio.Future):
    return await future


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
