"""SIGTERM, SIGUSR1 and Ctrl-C as exceptions, so that what is under way is left in order."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from swirl.errors import SwirlError

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: as SLURM warns of its time limit


class _State:
    received: int | None = None
    deferring = 0
    saving = 0


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """In the body the first SIGTERM or SIGUSR1 (a scheduler's, torchrun's) raises SystemExit in the main thread, and
    the first Ctrl-C KeyboardInterrupt. A second one, and one after the body, ends the process at once, except within
    `saving`. Another error that leaves the body after a signal gives way to it: a library written in C may swallow what
    a signal raises, and raise its own.
    """
    for number in _SIGNALS:
        signal.signal(number, _stop)
    try:
        yield
    except (SwirlError, OSError):
        raise
    except Exception:
        exit_if_stopped()
        raise
    finally:
        _end_at_once()


def _stop(number: int, frame) -> None:
    first = _State.received is None
    if first:
        _State.received = number
    if _State.deferring:
        return
    if not _State.saving:
        _end_at_once()
    if first:
        _raise(number)


def _end_at_once() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _raise(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


def received() -> int:
    """The number of the first signal that came; 0 where none has."""
    return _State.received or 0


def exit_if_stopped(number: int | None = None) -> None:
    """Raises what a signal should have: one that was deferred, or swallowed in a finalizer, or came to another rank."""
    if number := received() if number is None else number:
        _raise(number)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes in the body is raised at the body's end: an optimizer's step is done whole or not at all."""
    before = _State.received
    _State.deferring += 1
    try:
        yield
    finally:
        _State.deferring -= 1
    if _State.received != before and not _State.deferring:
        _raise(_State.received)


@contextmanager
def saving() -> Iterator[None]:
    """Within the body the first signal is the last one heard: nothing interrupts the saving that it brings about."""
    _State.saving += 1
    try:
        yield
    finally:
        _State.saving -= 1
        if _State.received is not None and not _State.saving:
            _end_at_once()
