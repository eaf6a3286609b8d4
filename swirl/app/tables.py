"""The tables that evaluate and train print on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from swirl.app.scores import Score, bootstrap_interval


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _relative_gain(before: Score, after: Score) -> str:
    """Relative gain of the accuracy, with the 95% bootstrap of the same questions' paired differences."""
    if not before.accuracy:
        return "–"
    differences = np.asarray(after.correct, float) - np.asarray(before.correct, float)
    low, high = (bound / before.accuracy for bound in bootstrap_interval(differences))
    gain = (after.accuracy - before.accuracy) / before.accuracy
    return f"{gain:+.0%} [{low:+.0%}, {high:+.0%}]"


def _interval(mean: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{percent(mean)} [{100 * low:.0f}, {100 * high:.0f}]"


def _judged(score: Score) -> str:
    shown = "–" if score.judged_interval is None else _interval(score.judged_accuracy, score.judged_interval)
    return shown + (f" ({score.unjudged_answers} without a verdict)" if score.unjudged_answers else "")


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout)
    console = console if sys.stdout.isatty() else Console(file=sys.stdout, width=120)
    console.print(table)


def print_scores(scores: Sequence[Score]) -> None:
    """The table of `evaluate`, on stdout: a column of judged accuracy where an answer judge was asked."""
    columns = {
        "task": [s.task for s in scores],
        "questions": [f"{s.questions}" + (f" ({s.unanswered} unanswered)" if s.unanswered else "") for s in scores],
        "accuracy": [_interval(s.accuracy, s.interval) for s in scores],
        "judged": [_judged(s) for s in scores],
        "F1": [percent(s.f1) for s in scores],
        "GOOD steps": [percent(s.good_steps) for s in scores],
        "by hops": [_by_hops(s) for s in scores],
    }
    if not any(s.judged_interval or s.unjudged_answers for s in scores):
        del columns["judged"]
    _print_table("greedy answers, 95% intervals by bootstrap", tuple(columns), list(zip(*columns.values())))


def _by_hops(score: Score) -> str:
    return "  ".join(f"{hops}: {value:.0%}" for hops, value in score.accuracy_by_hops.items())


def print_comparison(before: Sequence[Score], after: Sequence[Score]) -> None:
    """The table of `train`, on stdout: each task before and after."""
    rows = [
        (
            a.task,
            _interval(b.accuracy, b.interval),
            _interval(a.accuracy, a.interval),
            _relative_gain(b, a),
            f"{percent(b.good_steps)} → {percent(a.good_steps)}",
        )
        for b, a in zip(before, after, strict=True)
    ]
    _print_table(
        "accuracy on test questions (greedy; 95% intervals by bootstrap)",
        ("family", "before", "after", "relative gain", "GOOD steps"),
        rows,
    )
