"""What the report says of runs as a whole: how each ended, its settings, table, curves and filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from swirl.app.report.browser import change_of
from swirl.app.report.curves import SCORES, all_curves, differing_settings, groups, mean_over_tasks, series_of
from swirl.app.report.runs import Run
from swirl.app.report.table import table


def overview(runs: Sequence[Run]) -> dict:
    """The runs as the page shows them: each, and those of the same settings together."""
    differing = differing_settings(runs)
    return {
        "runs": [_described(run, differing) for run in runs],
        "groups": groups(runs, differing),
        "curves": all_curves(),
    }


def _described(run: Run, differing: Sequence[str]) -> dict:
    return {
        "name": run.name,
        "settings": {name: _shown(run.config.get(name)) for name in differing},
        "status": _status(run),
        "facts": _facts(run),
        "config": {name: _shown(value) for name, value in sorted(run.config.items())},
        "table": table(run),
        "series": series_of(run),
        "mean_scores": {key: mean_over_tasks(run, key) for key in SCORES},
        "funnel": funnel(run.counts),
        "changes": _changes(run),
    }


def _changes(run: Run) -> Counter:
    """How many test questions training mended, broke, and left as they were, also those that the page leaves out."""
    after = {(t.question.task, t.id): t for t in run.evaluated["after"]}
    changes = (change_of(first, after.get((first.question.task, first.id))) for first in run.evaluated["before"])
    return Counter(change for change in changes if change)


def _shown(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "–" if value is None else str(value)


def _status(run: Run) -> dict:
    done, total = len(run.updates), run.config.get("updates")
    of = f"{done} of {total} updates" if total else f"{done} updates"
    if run.summary is not None:
        return {"kind": "finished", "text": f"finished: {run.summary.updates} updates in {run.summary.wall_s:.0f} s"}
    if run.at_work:
        return {"kind": "running", "text": f"at work: {of}"}
    if run.stopped is not None:
        return {"kind": "stopped", "text": f"stopped after {of}: {run.stopped}"}
    return {"kind": "stopped", "text": f"ended after {of} without a word: killed, or not begun"}


def _facts(run: Run) -> list[tuple[str, str]]:
    summary, config, last = run.summary, run.config, run.updates[-1] if run.updates else None
    speed = np.mean([update.tokens_per_s for update in run.updates]) if run.updates else None
    memory = summary.peak_rss_bytes if summary else last and last.peak_bytes
    return [
        ("model", _shown(config.get("model"))),
        ("trained on", _shown(config.get("data") or config.get("task"))),
        ("learned from", _shown(config.get("mode"))),
        ("reward", _shown(config.get("reward"))),
        ("updates", f"{len(run.updates)}" + (f" of {config['updates']}" if "updates" in config else "")),
        ("time", f"{summary.wall_s:.0f} s" if summary else "–"),
        (
            "speed as separate passes",
            f"{summary.tokens_per_s if summary else speed:,.0f} tokens/s" if summary or run.updates else "–",
        ),
        ("peak memory", f"{memory / 1e9:.2f} GB" if memory else "–"),
        ("seed", _shown(summary.seed if summary else config.get("seed"))),
        ("commit", summary.commit[:12] if summary else "–"),
    ]


def funnel(counts: Counter) -> list[dict]:
    """From generated to kept: how many trajectories passed each stage, and by which rule the others were dropped."""
    if not counts["generated"] and not counts["kept"]:
        return []
    stages = [{"label": "generated", "count": counts["generated"] or None}]
    reasons = sorted(((name[8:], count) for name, count in counts.items() if name.startswith("dropped:")))
    stages += [{"label": f"dropped: {reason}", "count": count, "dropped": True} for reason, count in reasons]
    return [*stages, {"label": "kept", "count": counts["kept"]}]
