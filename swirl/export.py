"""The model of a run's checkpoint as a Hugging Face folder, at any time, also while the run is at work.

  python -m swirl.export run model                 of the last whole checkpoint
  python -m swirl.export run model --update 40     of the one after update 40

Adapters (--lora) are merged into the weights they were trained on; the checkpoint's own folder holds them in PEFT's
format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from swirl.app import command, resolve
from swirl.app.model_card import CARD, model_card
from swirl.config import TrainConfig
from swirl.errors import CheckpointError, ConfigError
from swirl.learning.checkpoints import Checkpoint, checkpoints_in, export_model, newest_checkpoint, open_checkpoint
from swirl.model.lora import is_adapter
from swirl.storage.digest import checkpoint_digest
from swirl.storage.files import replace_file


@dataclass(frozen=True)
class ExportConfig:
    run: Annotated[Path, tyro.conf.Positional] = Path("run")
    """The run's folder."""
    out: Annotated[Path, tyro.conf.Positional] = Path("model")
    """The folder to write, whole or not at all; another model that is there is replaced."""
    update: int | None = None
    """After which update; default: the last whole checkpoint."""


def export(config: ExportConfig) -> Path:
    """Returns the checkpoint that was exported. Raises CheckpointError, ConfigError."""
    if not config.run.is_dir():
        raise CheckpointError(config.run, "no such folder, expected a run's")
    if config.update is None:
        found = newest_checkpoint(config.run, command.warn)
        if found is None:
            raise CheckpointError(config.run, "holds no whole checkpoint")
    else:
        there = checkpoints_in(config.run)
        if config.update not in there:
            have = ", ".join(str(update) for update in sorted(there)) or "none"
            raise ConfigError(f"--update {config.update}: {config.run} holds checkpoints of these updates: {have}")
        found = open_checkpoint(there[config.update])
    if is_adapter(found.folder):
        _export_merged(found, config.out)
    else:
        export_model(found.folder, config.out)
    _write_card(config, found)
    return found.folder


def _write_card(config: ExportConfig, found: Checkpoint) -> None:
    """The run's model card, with its results where they are this update's."""
    run = config.run
    try:
        made_with = command.config_from_json(str(run / "config.json"), TrainConfig)
    except ConfigError as error:
        return command.warn(f"no model card: {error}")
    summary = command.read_object(run / "summary.json") if (run / "summary.json").is_file() else {}
    of_this = summary if summary.get("updates") == found.update else None
    card = model_card(made_with, update=found.update, commit=summary.get("commit"), summary=of_this, kept=None)
    replace_file(config.out / CARD, card.encode())


def _export_merged(found: Checkpoint, out: Path) -> None:
    """Adapters merged into the model they were trained on, in that run's dtype. Raises CheckpointError."""
    import torch

    base, made_with = resolve.base_folder(found.folder), found.state["settings"]
    if checkpoint_digest(base) != made_with["model"]:
        raise CheckpointError(base, f"is another model than the one that {found.folder} was trained on")
    model, tokenizer = resolve.load_model(str(found.folder), dtype=getattr(torch, made_with["dtype"]))
    model.save_pretrained(out, tokenizer)


def main(config: ExportConfig) -> None:
    print(f"{export(config)} -> {config.out}")


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, ExportConfig, __doc__)


if __name__ == "__main__":
    run_command()
