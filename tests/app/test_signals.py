"""The first signal stops a run; what must be whole is done first, and what is being saved is not interrupted."""

import signal
import subprocess
import sys
import textwrap

import pytest

_PROGRAM = """
import os, signal, sys, time
from swirl.app.signals import deferred, exit_if_stopped, saving, stop_on_signals

def send(name, times=1):
    for _ in range(times):
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(0.01)  # a handler runs between two steps of the interpreter

try:
    with stop_on_signals():
{body}
except BaseException as error:
    print(type(error).__name__, getattr(error, "code", ""))
"""

CASES = {
    "the first is an exception": ("send('SIGTERM'); print('no')", ["SystemExit 143"], 0),
    "so is SLURM's warning": ("send('SIGUSR1'); print('no')", ["SystemExit 138"], 0),
    "so is Ctrl-C": ("send('SIGINT'); print('no')", ["KeyboardInterrupt "], 0),
    "what is deferred is whole": (
        """
with deferred():
    send('SIGINT', 3); print('whole')
print('no')
""",
        ["whole", "KeyboardInterrupt "],
        0,
    ),
    "deferral nests": (
        """
with deferred():
    with deferred():
        send('SIGTERM')
    print('whole')
print('no')
""",
        ["whole", "SystemExit 143"],
        0,
    ),
    "a second one finds the saving done": (
        """
with saving():
    try:
        send('SIGINT')
    finally:
        send('SIGINT', 3); send('SIGTERM'); print('saved')
""",
        ["saved", "KeyboardInterrupt "],
        0,
    ),
    "a second one elsewhere ends the process": (
        """
try:
    send('SIGINT')
finally:
    print('first', flush=True); send('SIGTERM'); print('no')
""",
        ["first"],
        -signal.SIGTERM,
    ),
    "after the saving a second one ends the process": (
        """
try:
    with saving():
        send('SIGINT')
finally:
    print('first', flush=True); send('SIGINT'); print('no')
""",
        ["first"],
        -signal.SIGINT,
    ),
    "a swallowed one is raised again": (
        """
with saving():
    try:
        send('SIGTERM')
    except SystemExit:
        print('on')
    exit_if_stopped()
""",
        ["on", "SystemExit 143"],
        0,
    ),
    "one that a library makes an error of its own is raised all the same": (
        """
try:
    send('SIGINT')
except KeyboardInterrupt:
    raise ValueError('could not determine the shape') from None
""",
        ["KeyboardInterrupt "],
        0,
    ),
    "an error without a signal is itself": ("raise ValueError", ["ValueError "], 0),
    "and so is one of the system after a signal": (
        """
try:
    send('SIGTERM')
finally:
    raise OSError('full')
""",
        ["OSError "],
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_signals(case):
    body, said, code = CASES[case]
    program = _PROGRAM.format(body=textwrap.indent(body, "        "))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.returncode) == (said, code), done.stderr
