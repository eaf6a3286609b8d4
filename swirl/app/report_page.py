"""A run on one page: the accuracy table and the learning curves, as HTML without scripts."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from swirl.app.tables import percent
from swirl.errors import InputError
from swirl.storage.digest import unseal


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
        f"<td>{percent(summary.accuracy_before.get(task))}</td><td>{percent(summary.accuracy_after.get(task))}</td>"
        f"<td>{'–' if gain is None else f'{gain:+.0%}'}</td>"
        f"<td>{percent(summary.good_steps_before.get(task))}</td><td>{percent(summary.good_steps_after.get(task))}</td></tr>"
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
        ("tokens/s, as separate passes", "tokens_per_s"),
    ]
    if any(update.kl for update in updates):
        shown.append(("KL to the reference policy, nats a token", "kl"))
    curves = "".join(_curve(title, [getattr(update, name) for update in updates]) for title, name in shown)
    facts = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in (
            ("updates", summary.updates),
            ("time", f"{summary.wall_s:.0f} s"),
            (
                "training speed",
                f"{summary.tokens_per_s:,.0f} tokens/s, counted as separate passes; sampling and judging included",
            ),
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
