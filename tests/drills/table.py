"""One row of what `python -m tests.drills` prints."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """`attempts` of which `failures` did what must not happen; `note` holds figures worth a look."""

    name: str
    attempts: int
    failures: int
    note: str = ""
