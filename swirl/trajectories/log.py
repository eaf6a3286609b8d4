"""Trajectories on disk: JSONL files that are read as a stream, replaced whole, or appended to.

Each line that swirl writes ends with a digest of itself, which is checked when it is read; lines of others have none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import msgspec

from swirl.errors import InputError
from swirl.storage.digest import DigestError, seal, unseal
from swirl.storage.files import replacing
from swirl.storage.lock import take_lock
from swirl.trajectories.record import Question, Trajectory, decode_trajectory, encode_trajectory


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, bytes without the digest) of every non-blank line.

    Raises InputError if the file cannot be read, or a line is not as swirl wrote it.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, unseal(line)
                    except DigestError as error:
                        raise InputError(path, str(error), line=number) from None
    except OSError as error:
        raise InputError(path, f"cannot be read ({error.strerror})") from None


def iter_trajectories(path: str | os.PathLike) -> Iterator[Trajectory]:
    """Stream a JSONL file. Raises InputError naming file, line and field."""
    for number, line in read_lines(path):
        yield decode_trajectory(line, path, number)


def read_trajectories(path: str | os.PathLike) -> list[Trajectory]:
    """All trajectories of a JSONL file; an empty file is an InputError."""
    trajectories = list(iter_trajectories(path))
    if not trajectories:
        raise InputError(path, "expected at least one trajectory, the file is empty")
    return trajectories


def write_trajectories(path: str | os.PathLike, trajectories: Iterable[Trajectory]) -> int:
    """Write aside, then rename, so that no reader sees half a file. Returns the number written."""
    count = 0
    with replacing(path) as file:
        for trajectory in trajectories:
            file.write(seal(encode_trajectory(trajectory)))
            count += 1
    return count


class _Asked(msgspec.Struct, frozen=True):
    question: str = ""


class _Name(msgspec.Struct):
    id: str
    question: _Asked = _Asked()


class TrajectoryLog:
    """An append-only JSONL file that survives being killed: half a trajectory at its end is cut off on reopening.

    `done` holds the ids already there; `answers_another` tells whether one is of another question. Lines are flushed
    to disk in groups of `group`; use it as a context manager. Raises InputError where an existing line is neither a
    trajectory nor the first half of one (the file is left as it is), and where another process has the file open as a
    log: a second run of a command that is still at work.
    """

    def __init__(self, path: str | os.PathLike, *, group: int = 64):
        self.path, self._group, self._unsynced = os.fspath(path), group, 0
        self.done: set[str] = set()
        self._asked: dict[str, int] = {}  # id: hash of the question's text
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        self._file = open(self.path, "a+b")
        try:
            self._lock()
            self._recover()
        except InputError:
            self._file.close()
            raise

    def _lock(self) -> None:
        """Ends with the process, however that ends."""
        if not take_lock(self._file):
            raise InputError(self.path, "another command is writing to it: wait for its end, or stop it")

    def _recover(self) -> None:
        self._file.seek(0)
        end, decoder = 0, msgspec.json.Decoder(_Name)
        for number, line in enumerate(self._file, 1):
            if line.strip():
                try:
                    found = decoder.decode(unseal(line))
                    self.done.add(found.id)
                    self._asked[found.id] = hash(found.question.question)
                except (ValueError, RecursionError) as error:
                    if _is_half(line, error):
                        self._file.truncate(end)
                        return
                    raise InputError(self.path, f"expected a trajectory ({error})", line=number) from None
            end += len(line)
        if end and not line.endswith(b"\n"):
            self._file.write(b"\n")  # killed, or edited by hand, just before it

    def answers_another(self, trajectory_id: str, question: Question) -> bool:
        """Whether the trajectory of that id, found when the log was opened, answers another question's text."""
        return self._asked.get(trajectory_id, hash(question.question)) != hash(question.question)

    def append(self, trajectory: Trajectory) -> None:
        self.done.add(trajectory.id)
        self._file.write(seal(encode_trajectory(trajectory)))
        self._unsynced += 1
        if self._unsynced >= self._group:
            self.sync()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def __enter__(self) -> TrajectoryLog:
        return self

    def __exit__(self, *exc) -> None:
        self.sync()
        self._file.close()


def _is_half(line: bytes, error: Exception) -> bool:
    """Whether a line that cannot be read is what a kill, or a power cut (zeros), leaves of one that was being written.

    Anything else is somebody's, and not ours to cut.
    """
    whole = line.endswith(b"\n") or isinstance(error, msgspec.ValidationError)
    return not whole and (line.startswith(b"{") or not line.strip(b"\0"))
