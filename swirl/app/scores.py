"""Scores of a task's trajectories: accuracy, F1 and the share of GOOD steps, with bootstrap intervals."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import comb

import msgspec
import numpy as np

from swirl.app import command
from swirl.errors import EndpointError
from swirl.rollout.rollout import Unanswered
from swirl.rollout.task import Task
from swirl.tasks.scoring import normalize_answer
from swirl.trajectories.record import Trajectory


class Score(msgspec.Struct, frozen=True):
    """Scores of one task. An `interval` is the 95% bootstrap of the mean.

    Of `questions`, those `unanswered` are left out of all scores. `correct` is per question, in question order, None
    where unanswered. `judged_accuracy` is over the answers with a verdict; `unjudged_answers` had none.
    With several `samples` a question, `correct` is the share of them, the intervals are over questions, `pass_at` says
    how often at least one of k is correct (unbiased), `majority` how often the most frequent answer is.
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
    correct: tuple[bool | float | None, ...]
    samples: int = 1
    pass_at: dict[str, float] = {}
    majority: float | None = None


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
    """Scores of the trajectories of all questions, each with the same number of samples; `answers_judged`: by their
    `outcome` too.

    Raises EndpointError where none was answered.
    """
    answered = [t for t in trajectories if isinstance(t, Trajectory)]
    if not answered:
        reasons = command.first_reasons(t.reason for t in trajectories)
        raise EndpointError(task.name, f"none of {len(trajectories)} questions was answered ({reasons})")
    of_question: dict[str, list[Trajectory]] = {t.question.id: [] for t in trajectories}
    for t in answered:
        of_question[t.question.id].append(t)
    right = {t.id: bool(task.is_correct(t.question, t.prediction)) for t in answered}
    asked = [[right[t.id] for t in made] for made in of_question.values()]
    shares = [float(np.mean(made)) for made in asked if made]
    judged = _outcomes(answered) if answers_judged else []
    by_hops: dict[str, list[bool]] = defaultdict(list)
    for t in answered:
        by_hops[str(t.question.hops)].append(right[t.id])
    good, unjudged = good_step_share(answered)
    samples = max(1, round(len(trajectories) / len(of_question)))
    several = [(made, rights) for made, rights in zip(of_question.values(), asked, strict=True) if made]
    return Score(
        task=task.name,
        accuracy=float(np.mean(shares)),
        interval=bootstrap_interval(shares),
        f1=float(np.mean([_f1(task, t, right[t.id]) for t in answered])),
        good_steps=good,
        unjudged_steps=unjudged,
        questions=len(of_question),
        unanswered=len(trajectories) - len(answered),
        judged_accuracy=float(np.mean(judged)) if judged else None,
        judged_interval=bootstrap_interval(judged) if judged else None,
        unjudged_answers=sum(t.outcome is None for t in answered) if answers_judged else 0,
        accuracy_by_hops={hops: float(np.mean(of_hops)) for hops, of_hops in sorted(by_hops.items())},
        correct=tuple(None if not made else made[0] if samples == 1 else float(np.mean(made)) for made in asked),
        samples=samples,
        pass_at={} if samples == 1 else _pass_at([rights for _, rights in several]),
        majority=None if samples == 1 else float(np.mean([_majority(*pair) for pair in several])),
    )


def _outcomes(trajectories: Sequence[Trajectory]) -> list[bool]:
    """The outcomes that a judge has found. A trajectory that gives no answer is wrong unasked; where no answer that was
    given has a readable verdict, these say nothing of the policy, and there are none.
    """
    given = [t for t in trajectories if (t.prediction or "").strip()]
    if given and all(t.outcome is None for t in given):
        return []
    return [t.outcome for t in trajectories if t.outcome is not None]


def _pass_at(asked: list[list[bool]]) -> dict[str, float]:
    """k to how often at least one of k samples is correct, for every k that each question has samples for.

    Source: the unbiased estimator of arXiv:2107.03374.
    """
    return {
        str(k): float(np.mean([1 - comb(len(made) - sum(made), k) / comb(len(made), k) for made in asked]))
        for k in range(1, min(map(len, asked)) + 1)
    }


def _majority(trajectories: list[Trajectory], right: list[bool]) -> bool:
    """Whether the most frequent answer is correct; a tie goes to the earlier one, no answer counts for nothing."""
    given = [None if t.prediction is None else normalize_answer(t.prediction) for t in trajectories]
    votes = Counter(answer for answer in given if answer is not None)
    return bool(votes) and right[given.index(votes.most_common(1)[0][0])]


def _f1(task: Task, trajectory: Trajectory, right: bool) -> float:
    """1 or 0 where the task's score has no F1."""
    if trajectory.prediction is None:
        return 0.0
    return task.scores(trajectory.question, trajectory.prediction).get("f1", float(right))


def validation_metrics(scores: Sequence[Score]) -> dict[str, dict]:
    """What a validation's line says, each value by task."""
    return {
        "accuracy": {score.task: score.accuracy for score in scores},
        "good_steps": {score.task: score.good_steps for score in scores},
    }


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
