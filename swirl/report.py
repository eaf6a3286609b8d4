"""A run on one page: the accuracy table and the learning curves, as HTML without scripts; and the terminal's tables."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from swirl.app import command
from swirl.app.scores import Score, bootstrap_interval
from swirl.errors import InputError
from swirl.storage.digest import unseal


@dataclass(frozen=True)
class ReportConfig:
    run: Path = Path("run")
    """The run's folder, holding summary.json and metrics.jsonl; report.html is written into it."""


def _percent(value: float | None) -> str:
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
    return f"{_percent(mean)} [{100 * low:.0f}, {100 * high:.0f}]"


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
        "F1": [_percent(s.f1) for s in scores],
        "GOOD steps": [_percent(s.good_steps) for s in scores],
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
            f"{_percent(b.good_steps)} → {_percent(a.good_steps)}",
        )
        for b, a in zip(before, after, strict=True)
    ]
    _print_table(
        "accuracy on test questions (greedy; 95% intervals by bootstrap)",
        ("family", "before", "after", "relative gain", "GOOD steps"),
        rows,
    )


class _Summary(msgspec.Struct):
    """Of summary.json, what the report shows."""

    accuracy_before: dict[str, float]
    accuracy_after: dict[str, float]
    relative_gain: dict[str, float | None]
    good_steps_before: dict[str, float | None]
    good_steps_after: dict[str, float | None]
    updates: int
    wall_s: float
    tokens_per_s: float
    peak_rss_bytes: int
    seed: int
    commit: str


class _Update(msgspec.Struct):
    """Of a line of metrics.jsonl, what the report shows."""

    reward: float | None
    loss: float
    grad_norm: float
    tokens_per_s: float
    kl: float | None = None


def _read_run(run: Path) -> tuple[_Summary, list[_Update]]:
    """Raises InputError where the folder is not that of a finished run of this version."""
    path = run / "summary.json"
    try:
        summary = _decode(path.read_bytes(), _Summary, path, "the summary of a finished run")
        path = run / "metrics.jsonl"
        lines = enumerate(path.read_bytes().splitlines(), 1)
        return summary, [_decode(line, _Update, path, "the metrics of an update", number) for number, line in lines]
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror}): expected the folder of a finished run") from None


def _decode(text: bytes, kind: type, path: Path, expected: str, line: int | None = None):
    try:
        return msgspec.json.decode(unseal(text), type=kind)
    except (ValueError, RecursionError) as error:
        missing = re.search("missing required field `(.+?)`", str(error))
        why = f"'{missing[1]}' is missing" if missing else str(error)
        raise InputError(path, f"expected {expected}, {why}", line=line) from None


def _curve(title: str, of_updates: Sequence[float | None], width: int = 420, height: int = 160) -> str:
    """One learning curve as an inline SVG: updates from left to right, the raw line and its running mean.

    Updates without a value have no point; where none has one, the curve is "".
    """
    updates = [update for update, value in enumerate(of_updates) if value is not None]
    if not updates:
        return ""
    values = np.array([of_updates[update] for update in updates], dtype=float)
    x = 48 + np.array(updates) * (width - 56) / max(1, len(of_updates) - 1)
    low, high = float(values.min()), float(values.max())
    span = (high - low) or 1.0
    kernel = np.ones(min(9, len(values)))
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")

    def points(line):
        y = height - 24 - (np.asarray(line) - low) / span * (height - 40)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))

    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img">'
        f'<text x="4" y="20">{high:.3g}</text><text x="4" y="{height - 24}">{low:.3g}</text>'
        f'<text x="48" y="{height - 6}">1</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">{len(of_updates)}</text>'
        f'<polyline class="raw" points="{points(values)}"/><polyline points="{points(smooth)}"/></svg></figure>'
    )


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:920px;margin:2rem auto;padding:0 1rem;color:#1c2430}
table{border-collapse:collapse;width:100%}th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #dde3ea}
th:first-child,td:first-child{text-align:left}figure{display:inline-block;margin:.5rem 1rem .5rem 0}
figcaption{font-weight:600}svg{width:420px;max-width:100%;background:#f6f8fa;border-radius:6px}
svg text{font-size:11px;fill:#5a6675}
polyline{fill:none;stroke:#1463d8;stroke-width:2}.raw{stroke:#a9c6f3;stroke-width:1}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dt{color:#5a6675}dd{margin:0}
"""


def write_report(run: Path) -> Path:
    """Write run/report.html from summary.json and metrics.jsonl. Raises InputError where they cannot be read."""
    summary, updates = _read_run(run)
    rows = "".join(
        f"<tr><td>{html.escape(task)}</td>"
        f"<td>{_percent(summary.accuracy_before.get(task))}</td><td>{_percent(summary.accuracy_after.get(task))}</td>"
        f"<td>{'–' if gain is None else f'{gain:+.0%}'}</td>"
        f"<td>{_percent(summary.good_steps_before.get(task))}</td><td>{_percent(summary.good_steps_after.get(task))}</td></tr>"
        for task, gain in summary.relative_gain.items()
    )
    accuracy = (
        "<h2>Accuracy on test questions</h2>"
        "<table><tr><th>family<th>before<th>after<th>relative gain<th>GOOD steps before<th>after</tr>"
        f"{rows}</table>"
        if rows
        else ""
    )
    shown = [
        ("reward of an action", "reward"),
        ("loss", "loss"),
        ("gradient norm", "grad_norm"),
        ("tokens/s", "tokens_per_s"),
    ]
    if any(update.kl for update in updates):
        shown.append(("KL to the reference policy, nats a token", "kl"))
    curves = "".join(_curve(title, [getattr(update, name) for update in updates]) for title, name in shown)
    facts = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in (
            ("updates", summary.updates),
            ("time", f"{summary.wall_s:.0f} s"),
            ("training speed", f"{summary.tokens_per_s:,.0f} tokens/s, sampling and judging included"),
            ("peak memory", f"{summary.peak_rss_bytes / 2**30:.2f} GB"),
            ("seed", summary.seed),
            ("commit", summary.commit),
        )
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>swirl: {html.escape(run.name)}</title>"
        f"<style>{_STYLE}</style><h1>swirl: {html.escape(run.name)}</h1><dl>{facts}</dl>"
        f"{accuracy}<h2>Learning curves</h2>{curves}</html>\n"
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main(config: ReportConfig) -> None:
    print(write_report(config.run))


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, ReportConfig, __doc__)


if __name__ == "__main__":
    run_command()
