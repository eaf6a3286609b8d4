"""One process at a time on a file or folder."""

from __future__ import annotations

import fcntl


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
