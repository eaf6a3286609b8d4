"""Progress bars on stderr, so that stdout carries results alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int | None, *, show: bool = True):
    """A bar for the body, which calls what it is given as `advance(count=1, note="")`.

    A terminal gets a live bar with counts, elapsed and remaining time; a file or pipe one line at the end.
    """
    if not show:
        yield lambda count=1, note="": None
        return
    from rich.console import Console
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
    width = None if sys.stderr.isatty() else 160
    with Progress(*columns, console=Console(file=sys.stderr, width=width), refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bar.update(task, advance=count, **({"note": note} if note else {}))

        yield advance


Advance = Callable[..., None]
