"""The table of a run: each task before and after, with intervals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from swirl.app.report.runs import Run
from swirl.app.run_records import EVALUATED
from swirl.app.scores import bootstrap_interval, good_step_share
from swirl.trajectories.record import Trajectory


def table(run: Run) -> list[dict]:
    """A row a task: accuracy and the share of GOOD steps before and after with what is known of their intervals, as
    shares; the change with the 95% bootstrap of the same questions' paired differences. From the summary where there
    is one, else from the answers.
    """
    answers = {when: _by_task(made) for when, made in run.evaluated.items()}
    summary = run.summary
    tasks = dict.fromkeys(summary.accuracy_before if summary else (task for made in answers.values() for task in made))
    rows = []
    for task in tasks:
        accuracy, interval, good = {}, {}, {}
        for when in EVALUATED:
            made = answers.get(when, {}).get(task, [])
            outcomes = [float(t.outcome) for t in made if t.outcome is not None]
            if summary:
                accuracy[when] = getattr(summary, f"accuracy_{when}").get(task)
                interval[when] = getattr(summary, f"interval_{when}").get(task)
                good[when] = getattr(summary, f"good_steps_{when}").get(task)
            else:
                accuracy[when] = float(np.mean(outcomes)) if outcomes else None
                interval[when] = bootstrap_interval(outcomes) if outcomes else None
                good[when] = good_step_share(made)[0]
        known = None not in accuracy.values()
        rows.append(
            {
                "task": task,
                "questions": len(answers.get("before", {}).get(task, [])) or None,
                "accuracy": accuracy,
                "interval": interval,
                "good_steps": good,
                "change": accuracy["after"] - accuracy["before"] if known else None,
                "change_interval": _paired_interval(answers, task),
                "relative_gain": summary.relative_gain.get(task) if summary else None,
            }
        )
    return rows


def _by_task(trajectories: Iterable[Trajectory]) -> dict[str, list[Trajectory]]:
    of_task: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        of_task.setdefault(trajectory.question.task, []).append(trajectory)
    return of_task


def _paired_interval(answers: dict, task: str) -> tuple[float, float] | None:
    before = {t.id: t.outcome for t in answers.get("before", {}).get(task, ())}
    after = {t.id: t.outcome for t in answers.get("after", {}).get(task, ())}
    both = [name for name in before if before[name] is not None and after.get(name) is not None]
    return bootstrap_interval([float(after[name]) - float(before[name]) for name in both]) if both else None
