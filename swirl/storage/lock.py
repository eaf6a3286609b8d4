"""One process at a time on a file or folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


def take_lock(file) -> bool:
    """Lock an open file, or the descriptor of a folder, until it is closed. False where another has it locked.

    True on a file system without locks, too: there nothing tells.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[bool]:
    """Whether this process has the folder for itself; if so, until the body ends, or the process does.

    False also where the folder is no longer there under its name once it is locked: another renamed it meanwhile.
    Raises OSError where there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        mine = take_lock(descriptor)
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except FileNotFoundError:
            same = False
        yield mine and same
    finally:
        os.close(descriptor)
