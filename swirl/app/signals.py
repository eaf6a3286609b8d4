"""SIGTERM as an exception, so that what is under way is left in order."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager

_TERMINATED = threading.Event()


def exit_on_sigterm() -> None:
    """From now on a scheduler's or torchrun's SIGTERM raises SystemExit in the main thread."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, frame) -> None:
    # Raised in a finalizer the exception would be swallowed: hence the event, which is looked at before each update.
    _TERMINATED.set()
    sys.exit(128 + number)


def exit_if_terminated() -> None:
    """Raises SystemExit where a SIGTERM has come, also one whose exception was swallowed."""
    if _TERMINATED.is_set():
        sys.exit(128 + signal.SIGTERM)


@contextmanager
def sigterm_ignored():
    """torchrun sends SIGTERM to all ranks as soon as one has failed: just when the main rank saves its weights."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
