"""Files that are whole or not there: written aside, fsynced, renamed, and the folder fsynced too."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A binary file to write; it takes the place of `path` once the body ends well, and is removed where it does not.

    It is written as `.NAME.XXXXXXXX.partial` beside `path`, never through a link, and so may be left behind by a
    `kill -9` alone. `mode` is that of a new file, less the umask. Raises OSError.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


def replace_file(path: str | os.PathLike, content: bytes, *, mode: int = 0o666) -> None:
    """`replacing`, for content at hand. Raises OSError."""
    with replacing(path, mode=mode) as file:
        file.write(content)


def sync_folder(folder: str | os.PathLike) -> None:
    """What was created in the folder, renamed into it or removed from it survives a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: str | os.PathLike) -> None:
    """All files of a folder, then the folder itself. Raises OSError."""
    for entry in Path(folder).iterdir():
        if entry.is_file():
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
