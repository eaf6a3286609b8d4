"""Answers of servers, kept: a content-addressed SQLite file that survives `kill -9` and power loss.

An answer is handed on only after the transaction that holds it is on disk (WAL, synchronous=FULL). Answers that arrive
together share one transaction, so that ten thousand answers cost a few hundred fsyncs, off the event loop. Several
processes may share one file. Only its owner may read it.

A row carries a digest of its key and answer. One that does not fit, or a page that cannot be read, is a miss: it is
asked for again. A file too damaged to be written is rebuilt from the rows that can be read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from hashlib import blake2b
from pathlib import Path

from swirl.errors import InputError
from swirl.storage.files import sync_folder

_GATHER_S = 0.004  # an answer waits this long for others; an endpoint takes at least ten times as long
_ROWS_PER_STATEMENT = 64
_SCHEMA = 2  # 1 had no digests; its rows are read as they are
_MAGIC = b"SQLite format 3\0"
_ROWS = "SELECT rowid, key, answer, digest FROM answers NOT INDEXED"

log = logging.getLogger("swirl.client")


class AnswerCache:
    """Answers (bytes) by key (bytes). Raises InputError where the file is none of ours or cannot be written.

    Used from one event loop at a time; `close` first writes what is still waiting.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._reader = _connect_or_rebuild(self.path)
        except (OSError, sqlite3.Error) as error:
            raise InputError(self.path, f"expected an answer cache or no file ({error})") from None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="swirl-cache")
        self._writer_connection: sqlite3.Connection | None = None
        self._waiting: list[tuple[bytes, bytes, asyncio.Future]] = []
        self._flushing: asyncio.Task | None = None
        self._unreadable: set[bytes] = set()  # keys whose rows are to be replaced
        self._suspect = False  # whether a row was damaged: then what is written is read again

    def __len__(self) -> int:
        return self._reader.execute("SELECT count(*) FROM answers").fetchone()[0]

    def get(self, key: bytes) -> bytes | None:
        """The answer; None where there is none that can be read."""
        try:
            row = self._reader.execute("SELECT answer, digest FROM answers WHERE key = ?", (key,)).fetchone()
        except (sqlite3.Error, UnicodeDecodeError):
            row = (None, None)
        if row is None:
            return None
        if not _fits(key, *row):
            self._suspect = True
            self.drop(key)
            return None
        return row[0]

    def drop(self, key: bytes) -> None:
        """The answer under this key is of no use: the next one put takes its place."""
        self._unreadable.add(key)

    async def put(self, key: bytes, answer: bytes) -> None:
        """Returns once the answer is on disk. The first answer to a key stays. Cancelling does not unwrite it."""
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        self._waiting.append((key, answer, written))
        if self._flushing is None or self._flushing.done():
            self._flushing = loop.create_task(self._flush())
        await written

    async def _flush(self) -> None:
        while self._waiting:
            await asyncio.sleep(_GATHER_S)
            group, self._waiting = self._waiting, []
            try:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._write_or_rebuild, group)
                error = None
            except (OSError, sqlite3.Error) as raised:
                error = InputError(self.path, f"cannot be written ({raised})")
            for _, _, written in group:
                if written.done():
                    continue  # its waiter was cancelled
                if error is None:
                    written.set_result(None)
                else:
                    written.set_exception(error)

    def _write_or_rebuild(self, group: list[tuple[bytes, bytes, asyncio.Future]]) -> None:
        try:
            self._write(group)
        except sqlite3.Error as error:
            if not _is_damage(error):
                raise
            if self._writer_connection is not None:
                self._writer_connection.close()
                self._writer_connection = None
            _rebuild(self.path, error)
            self._reader, old = _connect(self.path), self._reader
            old.close()
            self._suspect = False
            self._write(group)

    def _write(self, group: list[tuple[bytes, bytes, asyncio.Future]]) -> None:
        """One transaction; many rows a statement, for each statement takes and gives back the interpreter's lock."""
        if self._writer_connection is None:
            self._writer_connection = _connect(self.path)
        connection = self._writer_connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            replaced = [key for key, _, _ in group if key in self._unreadable]
            for key in replaced:
                connection.execute("DELETE FROM answers WHERE key = ?", (key,))
            for first in range(0, len(group), _ROWS_PER_STATEMENT):
                _insert(connection, [(key, answer) for key, answer, _ in group[first : first + _ROWS_PER_STATEMENT]])
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise
        self._unreadable.difference_update(replaced)
        if self._suspect and not all(_holds(connection, key) for key, _, _ in group):
            raise _damage("an index that does not find its rows")

    async def close(self) -> None:
        if self._flushing is not None:
            await self._flushing
        self._writer.shutdown(wait=True)
        if self._writer_connection is not None:
            self._writer_connection.close()
        self._reader.close()


def _connect_or_rebuild(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.Error as error:
        if not _is_damage(error) or path.read_bytes()[: len(_MAGIC)] != _MAGIC:
            raise
        _rebuild(path, error)
        return _connect(path)


def _is_damage(error: sqlite3.Error) -> bool:
    """Of the file, a table that is gone included; not a full disk, a lock or a file that may not be written."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR)


def _damage(what: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(what)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _connect(path: Path) -> sqlite3.Connection:
    """To the file at `path`, which is made where it is not there. Raises sqlite3.Error, OSError."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    try:
        if connection.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA:
            _create(connection)
        for suffix in ("", "-wal", "-shm"):
            with suppress(PermissionError, FileNotFoundError):  # another's file, shared on purpose; no log yet
                os.chmod(f"{path}{suffix}", 0o600)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """In one transaction, for another process may be at it too; a file that holds anything else is left alone."""
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if version not in (0, 1, _SCHEMA) or (version == 0 and tables):
        connection.execute("ROLLBACK")
        raise sqlite3.DatabaseError(f"version {version} of something else, or of another swirl")
    if version == 0:
        connection.execute("CREATE TABLE answers (key BLOB PRIMARY KEY, answer BLOB NOT NULL, digest BLOB)")
    elif version == 1:
        connection.execute("ALTER TABLE answers ADD COLUMN digest BLOB")
    connection.execute(f"PRAGMA user_version={_SCHEMA}")
    connection.execute("COMMIT")


def _insert(connection: sqlite3.Connection, rows: list[tuple[bytes, bytes]]) -> None:
    values = [value for key, answer in rows for value in (key, answer, _digest(key, answer))]
    places = ", ".join(["(?, ?, ?)"] * len(rows))
    connection.execute(f"INSERT OR IGNORE INTO answers (key, answer, digest) VALUES {places}", values)


def _holds(connection: sqlite3.Connection, key: bytes) -> bool:
    row = connection.execute("SELECT answer, digest FROM answers WHERE key = ?", (key,)).fetchone()
    return row is not None and _fits(key, *row)


def _digest(key: bytes, answer: bytes) -> bytes:
    return blake2b(answer, key=key[:64], digest_size=16).digest()


def _fits(key: object, answer: object, digest: object) -> bool:
    """Whether a row is as it was written; rows of schema 1 have no digest."""
    if not (isinstance(key, bytes) and isinstance(answer, bytes)):
        return False
    return digest is None or digest == _digest(key, answer)


def _rebuild(path: Path, damage: sqlite3.Error) -> None:
    """A new file at `path` that holds every row of the old one that can be read; the old one stays as `.damaged`.

    Raises sqlite3.Error, OSError.
    """
    aside, damaged = (path.with_name(path.name + suffix) for suffix in (".rebuilt", ".damaged"))
    log.warning("%s: damaged (%s), rebuilt from the rows that can be read; the old file is %s", path, damage, damaged)
    aside.unlink(missing_ok=True)
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as old, closing(_connect(aside)) as new:
        new.execute("BEGIN")
        for row in _readable_rows(old):
            if _fits(*row):
                new.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", row)
        new.execute("COMMIT")
        new.execute("PRAGMA journal_mode=DELETE")
    damaged.unlink(missing_ok=True)
    os.link(path, damaged)
    for suffix in ("-wal", "-shm"):  # of the old file: they would be taken for the new one's
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.replace(aside, path)
    sync_folder(path.parent)


def _readable_rows(connection: sqlite3.Connection):
    """(key, answer, digest) of the rows before the first damage, and of those behind the last."""
    reached = -1
    with suppress(sqlite3.Error):
        for rowid, *row in connection.execute(f"{_ROWS} ORDER BY rowid"):
            reached = rowid
            yield row
        return
    with suppress(sqlite3.Error):
        for rowid, *row in connection.execute(f"{_ROWS} ORDER BY rowid DESC"):
            if rowid <= reached:
                return
            yield row
