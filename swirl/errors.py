"""Every error swirl raises on purpose. A command prints it as one line and exits 1, or 2 at a ConfigError.

SwirlError
├── InputError       a data file: file, line, field, what was expected   (ValueError)
├── ConfigError      a flag or config key                                (ValueError)
├── CheckpointError  a model folder or file                              (OSError)
├── CalculatorError  an expression the calculator refuses                (ValueError)
├── EndpointError    a server that could not be reached or understood    (ConnectionError)
├── RankError        a process of the job that was killed or is stopped  (ConnectionError)
├── NonFiniteError   a loss or gradient that is NaN or infinite          (FloatingPointError)
├── OutOfMemory      a run that memory cannot hold                       (MemoryError)
└── NothingToLearn   no trajectory kept, or updates that compute nothing (RuntimeError)
"""

from __future__ import annotations

import os


class SwirlError(Exception):
    """Base of all errors a user can mend; its text is one line and names the thing to mend."""


class InputError(SwirlError, ValueError):
    """Malformed data. `line` counts from 1; `field` is a path such as `steps[2].action_ids`."""

    def __init__(self, file: str | os.PathLike, expected: str, *, line: int | None = None, field: str | None = None):
        self.file, self.line, self.field, self.expected = os.fspath(file), line, field, expected
        where = self.file if line is None else f"{self.file}:{line}"
        super().__init__(f"{where}: {expected}" if field is None else f"{where}: field '{field}': {expected}")


class ConfigError(SwirlError, ValueError):
    """A flag, config key, or a combination of them that cannot be used."""


class CheckpointError(SwirlError, OSError):
    """A missing, truncated or unfitting checkpoint; `path` is the file or folder at fault."""

    def __init__(self, path: str | os.PathLike, expected: str):
        self.path, self.expected = os.fspath(path), expected
        super().__init__(f"{self.path}: {expected}")


class CalculatorError(SwirlError, ValueError):
    """The calculator's refusal; its text is shown to the model as the observation."""


class EndpointError(SwirlError, ConnectionError):
    """A request that failed for good. `endpoint` is its address without keys; `status` the HTTP status or None."""

    def __init__(self, endpoint: str, reason: str, *, status: int | None = None):
        self.endpoint, self.reason, self.status = endpoint, reason, status
        super().__init__(f"{endpoint}: {reason}")


class EndpointUnusable(EndpointError):
    """The endpoint, not one request, is at fault: its key, its model, an outage beyond its retry deadline."""


class RankError(SwirlError, ConnectionError):
    """A rank of the job that was killed, failed, or is stopped: the others cannot go on without it."""


class NonFiniteError(SwirlError, FloatingPointError):
    """A loss, log-prob or gradient that is NaN or infinite; raised before the weights are touched."""


class OutOfMemory(SwirlError, MemoryError):
    """A run that memory cannot hold, before it starts or when it happens; its text names what would make it fit."""


class NothingToLearn(SwirlError, RuntimeError):
    """The filter kept no trajectory, or several updates in a row had nothing to compute: rewards equal, or none."""
