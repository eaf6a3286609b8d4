"""Scores of a task's trajectories: accuracy, F1 and the share of GOOD steps, with bootstrap intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from swirl.app import command
from swirl.errors import EndpointError
from swirl.rollout.rollout import Unanswered
from swirl.rollout.task import Task
from swirl.trajectories.record import Trajectory


class Score(msgspec.Struct, frozen=True):
    """Scores of one task. An `interval` is the 95% bootstrap of the mean.

    Of `questions`, those `unanswered` are left out of all scores. `correct` is per question, in question order, None
    where unanswered. `judged_accuracy` is over the answers with a verdict; `unjudged_answers` had none.
    """

    task: str
    accuracy: float
    interval: tuple[float, float]
    f1: float
    good_steps: float | None
    unjudged_steps: int
    questions: int
    unanswered: int
    judged_accuracy: float | None
    judged_interval: tuple[float, float] | None
    unjudged_answers: int
    accuracy_by_hops: dict[str, float]
    correct: tuple[bool | None, ...]


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (N,), N >= 1; pairs are kept by passing differences."""
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def good_step_share(trajectories: Sequence[Trajectory]) -> tuple[float | None, int]:
    """(share of GOOD among judged steps, number unjudged); the share is averaged within, then across trajectories.

    Source: Table 3 of arXiv:2504.04736.
    """
    shares, unjudged = [], 0
    for trajectory in trajectories:
        verdicts = [step.verdict for step in trajectory.steps]
        unjudged += verdicts.count(None)
        judged = [verdict == "GOOD" for verdict in verdicts if verdict is not None]
        if judged:
            shares.append(sum(judged) / len(judged))
    return (float(np.mean(shares)) if shares else None), unjudged


def score_trajectories(
    task: Task, trajectories: Sequence[Trajectory | Unanswered], *, answers_judged: bool = False
) -> Score:
    """Scores of one trajectory a question, every question of it present; `answers_judged`: by their `outcome` too.

    Raises EndpointError where none was answered.
    """
    answered = [t for t in trajectories if isinstance(t, Trajectory)]
    if not answered:
        reasons = command.first_reasons(t.reason for t in trajectories)
        raise EndpointError(task.name, f"none of {len(trajectories)} questions was answered ({reasons})")
    right = {t.id: bool(task.is_correct(t.question, t.prediction)) for t in answered}
    f1 = [_f1(task, t, right[t.id]) for t in answered]
    judged = [t.outcome for t in answered if t.outcome is not None] if answers_judged else []
    by_hops: dict[str, list[bool]] = defaultdict(list)
    for t in answered:
        by_hops[str(t.question.hops)].append(right[t.id])
    good, unjudged = good_step_share(answered)
    return Score(
        task=task.name,
        accuracy=float(np.mean(list(right.values()))),
        interval=bootstrap_interval(list(right.values())),
        f1=float(np.mean(f1)),
        good_steps=good,
        unjudged_steps=unjudged,
        questions=len(trajectories),
        unanswered=len(trajectories) - len(answered),
        judged_accuracy=float(np.mean(judged)) if judged else None,
        judged_interval=bootstrap_interval(judged) if judged else None,
        unjudged_answers=len(answered) - len(judged) if answers_judged else 0,
        accuracy_by_hops={hops: float(np.mean(of_hops)) for hops, of_hops in sorted(by_hops.items())},
        correct=tuple(right.get(t.id) for t in trajectories),
    )


def _f1(task: Task, trajectory: Trajectory, right: bool) -> float:
    """1 or 0 where the task's score has no F1."""
    if trajectory.prediction is None:
        return 0.0
    return task.scores(trajectory.question, trajectory.prediction).get("f1", float(right))


def compared(before: Sequence[Score], after: Sequence[Score]) -> dict[str, dict]:
    """What a run's summary says of two evaluations on the same tasks, each value by task."""
    gains = {
        a.task: (a.accuracy - b.accuracy) / b.accuracy if b.accuracy else None
        for b, a in zip(before, after, strict=True)
    }
    return {
        "accuracy_before": {score.task: score.accuracy for score in before},
        "accuracy_after": {score.task: score.accuracy for score in after},
        "interval_before": {score.task: score.interval for score in before},
        "interval_after": {score.task: score.interval for score in after},
        "relative_gain": gains,
        "good_steps_before": {score.task: score.good_steps for score in before},
        "good_steps_after": {score.task: score.good_steps for score in after},
        "f1_before": {score.task: score.f1 for score in before},
        "f1_after": {score.task: score.f1 for score in after},
    }
