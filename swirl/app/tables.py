"""The tables that evaluate and train print on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from swirl.app.scores import Score, bootstrap_interval

WIDTH = 80  # of a table where there is no terminal to ask


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _relative_gain(before: Score, after: Score) -> str:
    """Relative gain of the accuracy, with the 95% bootstrap of the same questions' paired differences.

    A question that either evaluation has no answer to is no pair.
    """
    pairs = [pair for pair in zip(before.correct, after.correct, strict=True) if None not in pair]
    if not before.accuracy or not pairs:
        return "–"
    differences = np.subtract(*np.asarray(pairs, float).T[::-1])
    low, high = (100 * bound / before.accuracy for bound in bootstrap_interval(differences))
    gain = 100 * (after.accuracy - before.accuracy) / before.accuracy
    return f"{gain:+.0f} [{low:+.0f}, {high:+.0f}]"


def _number(share: float | None) -> str:
    """A share in percent, without the sign: the column's heading has it."""
    return "–" if share is None else f"{100 * share:.1f}"


def _interval(mean: float | None, interval: tuple[float, float] | None) -> str:
    if mean is None or interval is None:
        return "–"
    low, high = interval
    return f"{_number(mean)} [{100 * low:.0f}, {100 * high:.0f}]"


def _judged(score: Score) -> str:
    shown = _interval(score.judged_accuracy, score.judged_interval)
    return shown + (f"\n{score.unjudged_answers} unjudged" if score.unjudged_answers else "")


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], folded: Sequence[str]) -> None:
    """On stdout, within the terminal's width: columns named in `folded` go on in a second line, numbers never do."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False, "pad_edge": False}
    table = Table(title=title, title_justify="left", title_style="bold", **look)
    for number, heading in enumerate(headings):
        folds = heading in folded
        justify = "left" if number == 0 else "right"
        table.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold" if folds else "ellipsis")
    for row in rows:
        table.add_row(*row)
    console = Console(file=sys.stdout)
    console = console if sys.stdout.isatty() else Console(file=sys.stdout, width=WIDTH)
    console.print(table)


def print_scores(scores: Sequence[Score]) -> None:
    """The table of `evaluate`, on stdout: a column of judged accuracy where an answer judge was asked."""
    columns = {
        "task": [s.task for s in scores],
        "answered": [
            f"{s.questions - s.unanswered}/{s.questions}" if s.unanswered else f"{s.questions}" for s in scores
        ],
        "accuracy %": [_interval(s.accuracy, s.interval) for s in scores],
        "judged %": [_judged(s) for s in scores],
        "F1 %": [_number(s.f1) for s in scores],
        "GOOD %": [_number(s.good_steps) for s in scores],
        "by hops": [_by_hops(s) for s in scores],
    }
    if not any(s.judged_interval or s.unjudged_answers for s in scores):
        del columns["judged %"]
    rows = list(zip(*columns.values()))
    _print_table("greedy answers, 95% intervals by bootstrap", tuple(columns), rows, ("task", "by hops"))


def _answered(score: Score) -> str:
    return f"{score.questions - score.unanswered}/{score.questions}" if score.unanswered else str(score.questions)


def _by_hops(score: Score) -> str:
    return " ".join(f"{hops}:{value:.0%}" for hops, value in score.accuracy_by_hops.items())


def print_comparison(before: Sequence[Score], after: Sequence[Score]) -> None:
    """The table of `train`, on stdout: each task before and after."""
    rows = [
        (
            a.task,
            _interval(b.accuracy, b.interval),
            _interval(a.accuracy, a.interval),
            _relative_gain(b, a),
            f"{_number(b.good_steps)} → {_number(a.good_steps)}",
        )
        for b, a in zip(before, after, strict=True)
    ]
    _print_table(
        "accuracy on test questions (greedy; 95% intervals by bootstrap)",
        ("family", "before %", "after %", "relative gain %", "GOOD steps %"),
        rows,
        ("family",),
    )
