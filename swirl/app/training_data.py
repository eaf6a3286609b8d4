"""Trajectories to train on: given token ids and rewards, and refused where they cannot be trained on.

Data of up to 64 MiB is read and checked whole before the first update. Of more, 1,000 trajectories are looked at, and
each one is read, held to its digest and checked when an update reaches it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from swirl import tasks
from swirl.config import TrainConfig
from swirl.errors import InputError
from swirl.judging.filtering import step_to_judge
from swirl.judging.rewards import ask_rewards, graded, with_one_reward, with_recorded_rewards
from swirl.learning import distributed
from swirl.model.gemma import GemmaConfig
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.rollout import observation_ids, with_ids
from swirl.trajectories.files import TrajectoryFiles
from swirl.trajectories.record import Trajectory

WHOLE_BYTES = 64 << 20
NUM_LOOKED_AT = 1000


def looked_at(files: TrajectoryFiles) -> dict[int, Trajectory]:
    """What is known of the data before the first update, by place: all of it where it has at most 64 MiB, else 1,000
    trajectories, evenly spread. Raises InputError.
    """
    num = len(files) if files.num_bytes <= WHOLE_BYTES else min(NUM_LOOKED_AT, len(files))
    return {place: files[place] for place in (len(files) * k // num for k in range(num))}


@dataclass(frozen=True)
class Fitting:
    """Gives trajectories of the files the ids of this tokenizer: kept where they were made with it, made once from text
    otherwise.
    """

    files: TrajectoryFiles
    config: TrainConfig
    model: GemmaConfig
    tokenizer: Tokenizer

    def __call__(self, place: int, trajectory: Trajectory) -> Trajectory:
        """Raises InputError, with file and line, where the ids are another tokenizer's or text's, or too many, and
        where there are no log-probs that a correction needs.
        """
        try:
            if self.config.proximal_every and any(step.log_probs is None for step in trajectory.steps):
                raise _Unfit("has none, which --proximal-every corrects by: leave that out", field="log_probs")
            made = _with_ids(trajectory, self.tokenizer, self.model.vocab_size)
            length = len(made.state_ids(len(made.steps)))
            if length > (most := self.model.max_position_embeddings):
                raise _Unfit(f"has {length} tokens, expected at most the model's {most}")
        except _Unfit as unfit:
            file, line = self.files.where(place)
            raise InputError(file, f"trajectory '{trajectory.id}' {unfit}", line=line, field=unfit.field) from None
        return made


class _Unfit(Exception):
    def __init__(self, reason: str, field: str | None = None):
        super().__init__(reason)
        self.field = field


def _with_ids(trajectory: Trajectory, tokenizer: Tokenizer, vocab_size: int) -> Trajectory:
    if trajectory.prompt_ids is None:
        return with_ids(trajectory, tokenizer)
    if trajectory.tokenizer not in (None, tokenizer.fingerprint):
        raise _Unfit(
            f"has ids of another tokenizer, expected the model's ({tokenizer.fingerprint[:12]})", field="tokenizer"
        )
    highest = max(max(ids) for step in trajectory.steps for ids in (step.action_ids, step.observation_ids or (0,)))
    if max(highest, *trajectory.prompt_ids) >= vocab_size:
        raise _Unfit(f"has token ids beyond the model's {vocab_size}", field="action_ids")
    if trajectory.tokenizer is not None and (field := _disagreement(trajectory, tokenizer)):
        raise _Unfit("has ids that are not those of its text", field=field)
    return trajectory


def _disagreement(trajectory: Trajectory, tokenizer: Tokenizer) -> str | None:
    """The first field whose ids are not those of its text under the tokenizer that made them; None where there is none.

    A drawn action may be spelled in ids that no encoder would choose, so it is held to what they decode to.
    """
    if tuple(tokenizer.prompt_ids(trajectory.prompt)) != trajectory.prompt_ids:
        return "prompt_ids"
    for k, step in enumerate(trajectory.steps):
        if trajectory.retokenized:
            same = tuple(tokenizer.action_ids(step.action))[: len(step.action_ids)] == step.action_ids
        else:
            ended = step.action_ids[-1] in tokenizer.stop_ids
            same = tokenizer.decode(step.action_ids[:-1] if ended else step.action_ids) == step.action
        if not same:
            return f"steps[{k}].action_ids"
        if step.observation_ids is not None and step.observation_ids != observation_ids(step, tokenizer):
            return f"steps[{k}].observation_ids"
    return None


def require_rewards(trajectories: Iterable[Trajectory], config: TrainConfig, files: TrajectoryFiles) -> None:
    """Raises InputError where recorded actions have nothing to teach."""
    if config.mode != "recorded":
        return
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    if config.reward == "recorded" and all(graded(step) is None for step in steps):
        raise InputError(files.name, "no step has a reward or a verdict: filter it, or take --reward outcome")
    scored = (trajectory.outcome is not None or trajectory.question.answer is not None for trajectory in trajectories)
    if config.reward == "outcome" and not any(scored):
        raise InputError(files.name, "no trajectory has an outcome or a golden answer: take --reward recorded")


async def with_rewards(trajectories: list[Trajectory], config: TrainConfig, judge) -> list[Trajectory]:
    """The trajectories with the reward of each recorded action, in the modes that learn from those: each `judge`'s,
    where the reward is neither in the data nor the outcome. Same on every rank.
    """
    if config.mode == "sampled":
        return trajectories
    if config.mode == "imitation":
        return [with_one_reward(trajectory, 1.0) for trajectory in trajectories]
    if config.reward == "recorded":
        return [with_recorded_rewards(trajectory) for trajectory in trajectories]
    if config.reward == "outcome":
        return [with_one_reward(trajectory, _outcome(trajectory)) for trajectory in trajectories]
    mine = distributed.my_share(trajectories)
    made = await asyncio.gather(*(_asked(trajectory, judge) for trajectory in mine))
    return distributed.gather_shares(made, Trajectory)


class Streamed:
    """Trajectories that are read, checked and rewarded when an update takes them. `tasks` are those they may answer: a
    reward that knows one task's questions must not be asked about another's.
    """

    def __init__(self, fit: Fitting, tasks: Collection[str], judge):
        self._fit, self._tasks, self._judge = fit, tasks, judge

    def __len__(self) -> int:
        return len(self._fit.files)

    def _read(self, place: int) -> Trajectory:
        files = self._fit.files
        trajectory = files[place]
        if trajectory.question.task not in self._tasks:
            expected = f"expected {' or '.join(sorted(self._tasks))}, as far as was looked at; name all by --task"
            file, line = files.where(place)
            raise InputError(file, expected, line=line, field="question.task")
        return self._fit(place, trajectory)

    async def take(self, places: Iterable[int]) -> list[Trajectory]:
        """Same on every rank. Raises InputError."""
        return await with_rewards([self._read(place) for place in places], self._fit.config, self._judge)


async def take(source: Sequence | Streamed, places: Iterable[int]) -> list:
    """What lies at these places of what updates are made of."""
    return await source.take(places) if isinstance(source, Streamed) else [source[place] for place in places]


async def _asked(trajectory: Trajectory, judge) -> Trajectory:
    steps = await ask_rewards(judge, [step_to_judge(trajectory, k, step) for k, step in enumerate(trajectory.steps)])
    return replace(trajectory, steps=tuple(steps))


def _outcome(trajectory: Trajectory) -> float | None:
    """1 or 0 as the data says, else as the rule of its data set does; None where there is no golden answer."""
    outcome = trajectory.outcome
    if outcome is None and trajectory.question.answer is not None:
        outcome = tasks.is_correct(trajectory.question, trajectory.prediction)
    return None if outcome is None else float(outcome)
