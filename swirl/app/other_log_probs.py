"""Log-probs of recorded answers under a policy that did not draw them: one packed pass, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swirl.app.run_records import OtherLogProbs
from swirl.config import TrainConfig
from swirl.learning.batches import SubTrajectory, micro_batches
from swirl.trajectories.record import Trajectory


def log_probs_under(
    model, trajectories: Sequence[Trajectory], config: TrainConfig
) -> list[tuple[tuple[float, ...], ...]]:
    """Of each trajectory, by step, the log-probs of its action tokens at temperature 1, rounded to 1e-4."""
    actions = [
        SubTrajectory(tree, k, trajectory.state_ids(k), step, 0.0)
        for tree, trajectory in enumerate(trajectories)
        for k, step in enumerate(trajectory.steps)
    ]
    made: list[list[tuple[float, ...]]] = [[()] * len(trajectory.steps) for trajectory in trajectories]
    with torch.no_grad():
        for batch, members in micro_batches(actions, config):
            values = model.token_log_probs(batch.to(model.device)).tolist()  # pair by pair, in token order
            at = 0
            for action in members:
                end = at + len(action.step.action_ids)
                made[action.tree][action.k] = tuple(round(value, 4) for value in values[at:end])
                at = end
    return [tuple(steps) for steps in made]


def other_log_probs(
    model, policy: str, file: str, trajectories: Sequence[Trajectory], config: TrainConfig
) -> list[OtherLogProbs]:
    """The records of `trajectories`, which stand in `file`, under `model`, which is `policy`."""
    made = log_probs_under(model, trajectories, config)
    return [
        OtherLogProbs(file, trajectory.question.task, trajectory.id, policy, log_probs)
        for trajectory, log_probs in zip(trajectories, made, strict=True)
    ]
