"""Progress on stderr, so that stdout carries results alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

Advance = Callable[..., None]
SECONDS_A_LINE = 60.0


class _Note:
    """Words that are asked for whenever they are shown."""

    def __init__(self, ask: Callable[[], str]):
        self.ask = ask

    def __str__(self) -> str:
        return self.ask()


@contextmanager
def progress(
    description: str,
    total: int | None,
    *,
    completed: int = 0,
    note: Callable[[], str] = str,
    show: bool = True,
) -> Iterator[Advance]:
    """Shows how far the body is, which calls what it is given as `advance(count=1, note="")`.

    A terminal gets a live bar with counts, elapsed and remaining time; a file or pipe a line a minute, one for each
    `note` that `advance` is given, and one at the end. Of `total`, `completed` were done before. `note()` is called for
    what stands behind the bar whenever it is drawn, until a text is given with `advance`.
    """
    if not show:
        yield lambda count=1, note="": None
    elif sys.stderr.isatty():
        yield from _bar(description, total, completed, note)
    else:
        yield from _lines(description, total, completed, note)


def _bar(description: str, total: int | None, completed: int, note: Callable[[], str]) -> Iterator[Advance]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, completed=completed, note=_Note(lambda: escape(note())))

        def advance(count: int = 1, note: str = "") -> None:
            bar.update(task, advance=count, **({"note": note} if note else {}))

        yield advance


def _lines(description: str, total: int | None, completed: int, note: Callable[[], str]) -> Iterator[Advance]:
    started = shown = time.monotonic()
    done, said, told = completed, note, False

    def show() -> None:
        nonlocal shown, told
        shown, told = time.monotonic(), True
        elapsed_s = time.monotonic() - started
        words = [f"{done}/{total}" if total is not None else f"{done}", _clock(elapsed_s)]
        if total is not None and completed < done < total:
            words.append(f"{_clock(elapsed_s / (done - completed) * (total - done))} left")
        print(f"{description:<18}", "  ".join([*words, *filter(None, [said()])]), file=sys.stderr, flush=True)

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, said, told
        done, told = done + count, False
        said = (lambda: note) if note else said
        if note or time.monotonic() - shown >= SECONDS_A_LINE:
            show()

    try:
        yield advance
    finally:
        if not told:
            show()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
