"""Trackers: each update's numbers also to TensorBoard, Weights & Biases or Trackio. metrics.jsonl is written anyway.

A tracker is a function of (update, numbers by name). One that fails while the run is at work is told once and left out:
a run does not end because a dashboard is away.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from swirl.app import command
from swirl.errors import ConfigError

PROJECT = "swirl"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
_PLAIN = str | int | float | bool | None

Tracker = Callable[[int, Mapping[str, float]], None]
Track = Callable[[str, Mapping[str, Any]], None]


def require_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where one of them is not installed; call it before there is a run to name."""
    for name in names:
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise ConfigError(f"--track {name}: {error}; pip install 'swirl[{name}]'") from None


@contextmanager
def tracking(names: Sequence[str], run: Path, config: Mapping[str, Any], *, update: int = 0) -> Iterator[Track]:
    """Gives `track(group, line)`, which hands the numbers of a line of metrics.jsonl to each of `names`.

    `run` is the run's folder, which names it, and `update` the one that it goes on after, 0 where it starts. Raises
    ConfigError where a tracker cannot begin.
    """
    require_trackers(names)
    open_one = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    config = {name: value if isinstance(value, _PLAIN) else str(value) for name, value in config.items()}
    with ExitStack() as closing:
        trackers = {}
        for name in names:
            try:
                trackers[name] = closing.enter_context(open_one[name](run, config, update))
            except Exception as error:  # of theirs: no account, no key, no disk
                raise ConfigError(f"--track {name}: {_one_line(error)}") from None

        def track(group: str, line: Mapping[str, Any]) -> None:
            for name, tracker in list(trackers.items()):
                try:
                    tracker(line["update"], numbers(line, group))
                except Exception as error:
                    command.warn(f"--track {name}: {_one_line(error)}; this run is not tracked there any more")
                    del trackers[name]

        yield track


def numbers(line: Mapping[str, Any], group: str) -> dict[str, float]:
    """The numbers of a line by path, such as `train/reward_by_step/1`. What was not measured is left out."""
    found = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{group}/{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "update":
            found[f"{group}/{name}"] = value
    return found


@contextmanager
def _tensorboard(run: Path, config: dict, update: int) -> Iterator[Tracker]:
    from torch.utils.tensorboard import SummaryWriter

    # What an earlier process wrote of updates after the one that this run goes on from is hidden.
    with SummaryWriter(run / "tensorboard", purge_step=update + 1 if update else None) as writer:
        writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()), update)

        def log(update: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, update)
            writer.flush()

        yield log


@contextmanager
def _wandb(run: Path, config: dict, update: int) -> Iterator[Tracker]:
    import wandb

    with _on_stderr():
        opened = wandb.init(project=PROJECT, name=_name(run, update), group=run.name, dir=os.fspath(run), config=config)
    try:
        yield lambda update, values: opened.log(dict(values), step=update)
    finally:
        with _on_stderr():
            opened.finish()


@contextmanager
def _trackio(run: Path, config: dict, update: int) -> Iterator[Tracker]:
    import trackio

    with _on_stderr():
        trackio.init(
            project=PROJECT, name=_name(run, update), group=run.name, config=config, embed=False, auto_log_cpu=False
        )
    try:
        yield lambda update, values: trackio.log(dict(values), step=update)
    finally:
        with _on_stderr():
            trackio.finish()


def _name(run: Path, update: int) -> str:
    """A run that goes on is another one of the same group: what was sent of later updates cannot be taken back."""
    return f"{run.name} after {update}" if update else run.name


@contextmanager
def _on_stderr() -> Iterator[None]:
    """What a tracker prints is no result."""
    with redirect_stdout(sys.stderr):
        yield


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
