"""The learning curves of runs: a value an update, by run, and over runs of the same settings the mean with its
interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swirl.app.report.runs import Run, Update
from swirl.app.report.table import table

# (key in metrics.jsonl, title, unit): what is drawn, where a run has it. Bytes are told in GB, shares in percent.
CURVES = (
    ("reward", "Reward of an action", ""),
    ("kl", "KL to the reference policy", "nats a token"),
    ("entropy", "Entropy", "nats a token"),
    ("action_length", "Length of an action", "tokens"),
    ("truncated", "Actions cut off", "%"),
    ("masked", "Actions without a reward", "%"),
    ("refused", "Actions that the environment refuses", "%"),
    ("no_variance", "Groups of equal rewards", "%"),
    ("clipped", "Tokens that the clip holds", "%"),
    ("ratio", "Ratio to the policy that drew", ""),
    ("loss", "Loss", ""),
    ("grad_norm", "Gradient norm", ""),
    ("learning_rate", "Learning rate", ""),
    ("tokens_per_s", "Speed, tokens as separate passes", "tokens/s"),
    ("peak_bytes", "Peak memory", "GB"),
)
SCORES = ("accuracy", "good_steps")
# Settings that make no other experiment of a run.
_SAME_EXPERIMENT = {"seed", "out", "resume", "save_every", "save_minutes", "keep", "track", "rank_timeout_s"}


# Student's t of a two-sided 95% interval, by degrees of freedom; beyond them the normal's.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def all_curves() -> list[dict]:
    """What is drawn, in order: {"key", "title", "unit"}."""
    scored = (("accuracy", "Accuracy on test questions", "%"), ("good_steps", "Share of GOOD steps", "%"))
    return [{"key": key, "title": title, "unit": unit} for key, title, unit in (CURVES[0], *scored, *CURVES[1:])]


def series_of(run: Run) -> dict[str, dict | list[dict]]:
    """Each curve of a run by its key: points, or of accuracy and GOOD steps a line a task."""
    return {key: series(run, key) for key, _, _ in CURVES} | {key: scores_by_task(run, key) for key in SCORES}


def series(run: Run, key: str) -> dict:
    """{"x": updates, "y": values}, None where one was not measured; empty where none was."""
    values = [_value(update, key) for update in run.updates]
    if all(value is None for value in values):
        return {"x": [], "y": []}
    return {"x": [update.update for update in run.updates], "y": values}


def _value(update: Update, key: str) -> float | None:
    value = getattr(update, key)
    if value is None:
        return None
    if key in ("masked", "refused"):
        return 100 * value / update.actions if update.actions else None
    if key in ("truncated", "no_variance", "clipped"):
        return 100 * value
    return value / 1e9 if key == "peak_bytes" else value


def scores_by_task(run: Run, key: str) -> list[dict]:
    """Of accuracy or good_steps, a line a task and split, in percent: the test questions before and after, those of
    validation between.
    """
    at = {"before": 0, "after": len(run.updates)}
    test: dict[str, dict[int, float]] = {}
    for row in table(run):
        for when, update in at.items():
            if (value := row[key][when]) is not None:
                test.setdefault(row["task"], {})[update] = value
    lines = [(task, "test", points) for task, points in test.items()]
    validation: dict[str, dict[int, float]] = {}
    for line in run.validation:
        for task, value in getattr(line, key).items():
            if value is not None:
                validation.setdefault(task, {})[line.update] = value
    lines += [(task, "validation", points) for task, points in validation.items()]
    return [
        {"task": task, "split": split, "x": sorted(points), "y": [100 * points[x] for x in sorted(points)]}
        for task, split, points in lines
    ]


def mean_over_tasks(run: Run, key: str) -> dict:
    """Of accuracy or good_steps, the mean over the tasks of the test questions."""
    points: dict[int, list[float]] = {}
    for line in scores_by_task(run, key):
        if line["split"] == "test":
            for x, y in zip(line["x"], line["y"], strict=True):
                points.setdefault(x, []).append(y)
    return {"x": sorted(points), "y": [float(np.mean(points[x])) for x in sorted(points)]}


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Flags that make another experiment and are not the same in all runs."""
    names = sorted({name for run in runs for name in run.config} - _SAME_EXPERIMENT)
    return [name for name in names if len({str(run.config.get(name)) for run in runs}) > 1]


def groups(runs: Sequence[Run], differing: Sequence[str]) -> list[dict]:
    """Runs of the same settings but for the seed, where there are at least two: mean and 95% interval of each curve."""
    of_settings: dict[tuple, list[int]] = {}
    for number, run in enumerate(runs):
        of_settings.setdefault(tuple(str(run.config.get(name)) for name in differing), []).append(number)
    made = []
    for values, members in of_settings.items():
        if len(members) >= 2:
            label = ", ".join(f"{name} {value}" for name, value in zip(differing, values, strict=True))
            means = {key: _mean_series([series(runs[i], key) for i in members]) for key, _, _ in CURVES}
            means |= {key: _mean_series([mean_over_tasks(runs[i], key) for i in members]) for key in SCORES}
            made.append({"label": label or "all runs", "runs": members, "series": means})
    return made


def _mean_series(series: Sequence[dict]) -> dict:
    """{"x", "mean", "low", "high"} over the updates that all runs have, Student's 95% interval of the mean."""
    values = [{x: y for x, y in zip(one["x"], one["y"], strict=True) if y is not None} for one in series]
    shared = sorted(set.intersection(*(set(points) for points in values)))
    rows = np.array([[points[x] for x in shared] for points in values])
    if not shared:
        return {"x": [], "mean": [], "low": [], "high": []}
    n = len(rows)
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.96
    mean, half = rows.mean(0), t * rows.std(0, ddof=1) / np.sqrt(n)
    return {"x": shared, "mean": mean.tolist(), "low": (mean - half).tolist(), "high": (mean + half).tolist()}
