"""Reads a run's folder, finished or not; what it does not hold is None, and shown as "–"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from swirl.app.command import read_object
from swirl.app.run_records import DROPPED, EVALUATED, GENERATED, KEPT, LOG_PROBS, SAMPLES, STOPPED
from swirl.errors import InputError
from swirl.storage.digest import DigestError, unseal
from swirl.storage.lock import folder_lock
from swirl.trajectories.record import Trajectory

SUMMARY, METRICS, VALIDATION, CONFIG = "summary.json", "metrics.jsonl", "validation.jsonl", "config.json"
Item = TypeVar("Item")
FILES = (CONFIG, SUMMARY, METRICS, VALIDATION, STOPPED, SAMPLES, LOG_PROBS, GENERATED, KEPT, DROPPED,
         *EVALUATED.values())  # fmt: skip


class Summary(msgspec.Struct):
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
    interval_before: dict[str, tuple[float, float]] = {}
    interval_after: dict[str, tuple[float, float]] = {}


class Update(msgspec.Struct):
    """Of a line of metrics.jsonl, what the report shows."""

    update: int
    reward: float | None
    loss: float
    grad_norm: float
    tokens_per_s: float
    actions: int | None = None
    masked: int | None = None
    refused: int | None = None
    kl: float | None = None
    entropy: float | None = None
    action_length: float | None = None
    truncated: float | None = None
    no_variance: float | None = None
    clipped: float | None = None
    ratio: float | None = None
    learning_rate: float | None = None
    peak_bytes: int | None = None


class Validation(msgspec.Struct):
    update: int
    accuracy: dict[str, float]
    good_steps: dict[str, float | None] = {}


class _Stopped(msgspec.Struct):
    why: str


@dataclass
class Run:
    """A run's folder as far as it goes. `evaluated` are its answers to the test questions, by before and after;
    `counts` says how many trajectories were generated, kept, and dropped by each rule ("dropped:process").
    """

    path: Path
    name: str
    config: dict
    summary: Summary | None
    updates: list[Update]
    validation: list[Validation]
    stopped: str | None
    at_work: bool
    evaluated: dict[str, list[Trajectory]] = field(default_factory=dict)
    counts: Counter = field(default_factory=Counter)

    @property
    def finished(self) -> bool:
        return self.summary is not None


def read_run(path: Path, name: str = "") -> Run:
    """Raises InputError where the folder is no run's, or a file in it is not as a run of this version writes it."""
    if not any((path / file).is_file() for file in FILES):
        raise InputError(path / CONFIG, "cannot be read: expected the folder of a run")
    summary = _one(path / SUMMARY, Summary, "the summary of a finished run")
    stopped = _one(path / STOPPED, _Stopped, "why a run stopped")
    finished = summary is not None
    with folder_lock(path) as free:  # a run at work holds it
        at_work = not free
    return Run(
        path=path,
        name=name or path.resolve().name,
        config=read_object(path / CONFIG) if (path / CONFIG).is_file() else {},
        summary=summary,
        updates=records(path / METRICS, Update, "the metrics of an update", finished=finished),
        validation=records(path / VALIDATION, Validation, "the scores of a validation", finished=finished),
        stopped=stopped and stopped.why,
        at_work=at_work,
    )


def _one(path: Path, kind: type, expected: str):
    return decode(path.read_bytes(), kind, path, expected) if path.is_file() else None


def records(path: Path, kind: type, expected: str, *, finished: bool) -> list:
    """`read_lines` of objects that `decode` knows."""
    return read_lines(path, lambda line, number: decode(line, kind, path, expected, number), finished=finished)


def read_lines(path: Path, read: Callable[[bytes, int], Item], *, finished: bool) -> list[Item]:
    """What `read(line, number)` makes of each line; none where there is no such file. Where the run is not `finished`
    it may be writing: half a line at the end is not there yet. Raises InputError where `read` does, of any other line.
    """
    if not path.is_file():
        return []
    made = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    made.append(read(line, number))
            except InputError:
                if finished or line.endswith(b"\n"):
                    raise
    return made


def unsealed(line: bytes, path: Path, number: int | None = None) -> bytes:
    """The line without its digest. Raises InputError where it does not match."""
    try:
        return unseal(line)
    except DigestError as error:
        raise InputError(path, str(error), line=number) from None


def decode(text: bytes, kind: type, path: Path, expected: str, line: int | None = None):
    """An object of JSON that swirl wrote. Raises InputError naming the field that is missing."""
    try:
        return msgspec.json.decode(unsealed(text, path, line), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        missing = re.search("missing required field `(.+?)`", str(error))
        why = f"'{missing[1]}' is missing" if missing else str(error)
        raise InputError(path, f"expected {expected}, {why}", line=line) from None
