"""The folder of a run: config.json, metrics.jsonl, checkpoints. Written by the main rank alone."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swirl.app import command
from swirl.app.signals import sigterm_ignored
from swirl.errors import ConfigError
from swirl.learning import distributed
from swirl.storage.lock import take_lock


class RunFolder:
    """Where a run writes. On every rank but the main one its methods do nothing."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, name: str, line: dict) -> None:
        """One line of JSON more in the file of that name."""
        if distributed.is_main():
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def write(self, name: str, value: dict) -> None:
        """A file of that name with one JSON object."""
        if distributed.is_main():
            (self.path / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def save(self, name: str, model, tokenizer, what: str = "") -> None:
        """The model as a Hugging Face folder of that name; `what`, where given, is said on stderr."""
        if distributed.is_main():
            model.save_pretrained(self.path / name, tokenizer=tokenizer)
            if what:
                print(f"{what}: {self.path / name}", file=sys.stderr)

    @contextmanager
    def emergency_checkpoint(self, model, tokenizer, history: list[dict]) -> Iterator[None]:
        """Whatever stops the body, the weights of the last update in `history` are saved, if they are finite."""
        try:
            yield
        except BaseException:
            if distributed.is_main() and history:
                self._save_if_finite(f"checkpoint-{len(history)}", model, tokenizer)
            raise

    def _save_if_finite(self, name: str, model, tokenizer) -> None:
        # An error is on its way already: what fails here only warns.
        what = "the weights of the last good update"
        try:
            with sigterm_ignored():
                if all(weight.isfinite().all() for weight in model.parameters()):
                    self.save(name, model, tokenizer, what)
                else:
                    command.warn(f"{what} are not saved: some are NaN or infinite")
        except Exception as error:
            command.warn(f"{what} could not be saved ({error})")


@contextmanager
def open_run(config) -> Iterator[RunFolder]:
    """A new folder at `config.out`, with config.json, locked while the body runs. An earlier run is set aside.

    Raises ConfigError where `config.out` is no run of swirl, or another run is at work there.
    """
    if not distributed.is_main():
        distributed.from_main(None)  # before any rank writes into the folder, it is there, and new
        yield RunFolder(config.out)
        return
    _set_aside(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "config.json").write_bytes(command.config_to_json(config))
    distributed.from_main(None)
    with locked(config.out):
        yield RunFolder(config.out)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder while the body runs. Raises ConfigError where another run is at work."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(descriptor):
            raise ConfigError(f"--out {folder}: another run is at work there; name another folder, or stop it")
        yield
    finally:
        os.close(descriptor)


def _set_aside(out: Path) -> None:
    """Make room for the run: an earlier one moves to out.1, out.2, ...; what is no run is not touched."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").exists():
        raise ConfigError(f"--out {out}: is there already and is no run of swirl; name another folder")
    with locked(out):
        pass
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(aside)
    print(f"{out} is an earlier run: set aside as {aside}", file=sys.stderr)
