"""Paid answers, kept: a content-addressed SQLite file that survives `kill -9` and power loss.

An answer is handed on only after the transaction that holds it is on disk (WAL, synchronous=FULL). Answers
that arrive together share one transaction, so that ten thousand answers cost a few hundred fsyncs, off the
event loop. Several processes may share one file.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swirl.errors import InputError

_GATHER_S = 0.004  # an answer waits this long for company; an endpoint takes at least ten times as long
_ROWS_PER_STATEMENT = 64
_SCHEMA = 1


class AnswerCache:
    """Answers (bytes) by key (bytes). Raises InputError where the file is none of ours or cannot be written.

    Used from one event loop at a time; `close` first writes what is still waiting.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._reader = self._connect()
        except (OSError, sqlite3.Error) as error:
            raise InputError(self.path, f"expected an answer cache or no file ({error})") from None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="swirl-cache")
        self._writer_connection: sqlite3.Connection | None = None
        self._waiting: list[tuple[bytes, bytes, asyncio.Future]] = []
        self._flushing: asyncio.Task | None = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            if connection.execute("PRAGMA user_version").fetchone()[0] != _SCHEMA:
                self._create(connection)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        """In one transaction, for another process may be at it too; a file that holds anything else is left
        alone.
        """
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version != _SCHEMA and (version or tables):
            connection.execute("ROLLBACK")
            raise sqlite3.DatabaseError(f"version {version} of something else, or of another swirl")
        if version != _SCHEMA:
            connection.execute("CREATE TABLE answers (key BLOB PRIMARY KEY, answer BLOB NOT NULL)")
            connection.execute(f"PRAGMA user_version={_SCHEMA}")
        connection.execute("COMMIT")

    def __len__(self) -> int:
        return self._reader.execute("SELECT count(*) FROM answers").fetchone()[0]

    def get(self, key: bytes) -> bytes | None:
        row = self._reader.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    async def put(self, key: bytes, answer: bytes) -> None:
        """Returns once the answer is on disk. The first answer to a key stays. Cancelling does not unwrite
        it.
        """
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
                await asyncio.get_running_loop().run_in_executor(self._writer, self._write, group)
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

    def _write(self, group: list[tuple[bytes, bytes, asyncio.Future]]) -> None:
        """One transaction; many rows a statement, for each statement takes and gives back the interpreter's
        lock.
        """
        if self._writer_connection is None:
            self._writer_connection = self._connect()
        connection = self._writer_connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            for first in range(0, len(group), _ROWS_PER_STATEMENT):
                rows = group[first : first + _ROWS_PER_STATEMENT]
                values = [value for key, answer, _ in rows for value in (key, answer)]
                connection.execute(f"INSERT OR IGNORE INTO answers VALUES {', '.join(['(?, ?)'] * len(rows))}", values)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    async def close(self) -> None:
        if self._flushing is not None:
            await self._flushing
        self._writer.shutdown(wait=True)
        if self._writer_connection is not None:
            self._writer_connection.close()
        self._reader.close()
