"""JSONL files of trajectories as one sequence that stays on disk: a line is read and checked when it is asked for."""

from __future__ import annotations

import hashlib
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from swirl.errors import InputError
from swirl.storage.digest import DIGITS, DigestError, digest_of, unseal
from swirl.trajectories.record import Trajectory, decode_trajectory

_CHUNK_BYTES = 1 << 20


class TrajectoryFiles(Sequence):
    """The trajectories of several files, one file after another. In memory is where each line begins, 8 bytes a line.

    `digest` is that of all content, `num_bytes` its size. The files are held open: one that is replaced meanwhile is
    still read as it was, and one that is written to is refused. Raises InputError where a file cannot be read, and
    where all are empty; an item raises it, with file, line and field, where its line is damaged or no trajectory.
    """

    def __init__(self, paths: Iterable[str | os.PathLike]):
        self._files = [_File(path) for path in paths]
        self._ends = list(accumulate(len(file.begins) for file in self._files))
        if not self._ends[-1]:
            raise InputError(self._files[0].path, "expected at least one trajectory, the file is empty")
        self.num_bytes = sum(file.size for file in self._files)
        digests = [file.digest for file in self._files]
        self.digest = digests[0] if len(digests) == 1 else digest_of(" ".join(digests).encode())

    @property
    def name(self) -> str:
        """What to call them in a line of text."""
        first, more = self._files[0].path, len(self._files) - 1
        return f"{first} and {more} more" if more else first

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> Trajectory:
        file, k = self._find(place)
        line = file.read(k)
        try:
            return decode_trajectory(unseal(line), file.path)
        except DigestError as error:
            raise InputError(file.path, str(error), line=file.line_number(k)) from None
        except InputError as error:  # the line's number costs a look at all before it
            raise InputError(file.path, error.expected, line=file.line_number(k), field=error.field) from None

    def where(self, place: int) -> tuple[str, int]:
        """The file that holds the trajectory, and the line's number there, from 1."""
        file, k = self._find(place)
        return file.path, file.line_number(k)

    def _find(self, place: int) -> tuple[_File, int]:
        if not 0 <= place < len(self):
            raise IndexError(place)
        at = bisect_right(self._ends, place)
        return self._files[at], place - (self._ends[at - 1] if at else 0)


class _File:
    """One file: `begins` (N,) int64 holds the offset of every line that is not blank."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            self._as_found = self._stamp()
            self.begins, self.digest, self.size = self._index()
        except OSError as error:
            raise InputError(self.path, f"cannot be read ({error.strerror})") from None

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def _index(self) -> tuple[np.ndarray, str, int]:
        """`begins`, the digest as `file_digest` has it, and the size, in one pass."""
        begins, indented, size, content, fresh = [], [], 0, hashlib.sha256(), True
        buffer = bytearray(_CHUNK_BYTES)
        while read := os.preadv(self._descriptor, [buffer], size):
            chunk = memoryview(buffer)[:read]
            content.update(chunk)
            view = np.frombuffer(chunk, np.uint8)
            starts = np.flatnonzero(view == ord("\n")) + 1
            starts = np.concatenate([[0] if fresh else [], starts]).astype(np.int64)
            fresh = bool(len(starts)) and starts[-1] == len(chunk)  # the next chunk begins with a line
            starts = starts[: len(starts) - fresh]
            first = view[starts]
            indented += (starts[(first != ord("\n")) & (first <= ord(" "))] + size).tolist()
            begins.append(starts[first != ord("\n")] + size)
            size += len(chunk)
        begins = np.concatenate([np.empty(0, np.int64), *begins])
        blank = [begin for begin in indented if not self._line(begin, size).strip()]
        return np.setdiff1d(begins, blank, assume_unique=True), content.hexdigest()[:DIGITS], size

    def _line(self, begin: int, end: int) -> bytes:
        """The line that begins there; `end` is where it has ended at the latest."""
        line = b""
        while begin + len(line) < end and b"\n" not in line:
            line += os.pread(self._descriptor, min(end - begin - len(line), _CHUNK_BYTES), begin + len(line)) or b"\n"
        return line.partition(b"\n")[0]

    def read(self, k: int) -> bytes:
        """Line k (from 0, blank ones not counted), without its end. Raises InputError."""
        if self._stamp() != self._as_found:
            raise InputError(self.path, "was changed after it was opened: start again")
        end = int(self.begins[k + 1]) if k + 1 < len(self.begins) else self.size
        try:
            return self._line(int(self.begins[k]), end)
        except OSError as error:
            raise InputError(self.path, f"cannot be read ({error.strerror})") from None

    def line_number(self, k: int) -> int:
        """From 1, blank lines counted."""
        before, at = 1, 0
        while at < self.begins[k]:
            chunk = os.pread(self._descriptor, min(_CHUNK_BYTES, int(self.begins[k]) - at), at)
            before, at = before + chunk.count(b"\n"), at + max(1, len(chunk))
        return before
