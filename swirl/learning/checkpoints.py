"""Checkpoints of a run: all that it needs to go on to the bit, written while it goes on, and never half.

`RUN/checkpoint-N/`, after N updates, is a Hugging Face folder of the weights (config.json, model*.safetensors, the
tokenizer) with `training.safetensors` (optimizer state, float32 copies) and `training.json` (place in the data, metrics
so far, settings) beside them. `digests.json` holds a digest of each file. Nothing is ever unpickled. Of a model with
adapters the folder is PEFT's, of the adapters alone: the weights are those of the folder it names.

There is no generator's state to keep: every draw's seed is made of `--seed`, the update, the trajectory, the step and
the draw, and the place in the data is a function of the update. World size is no part of it either: weights and
optimizer state are written whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from swirl.errors import CheckpointError
from swirl.learning import distributed, sharding
from swirl.learning.objective import Objective
from swirl.learning.optimizer import Optimizer
from swirl.model import checkpoint as model_folder
from swirl.model import lora
from swirl.model.tensor_file import Deferred, own_rows, read_tensors, write_tensors
from swirl.storage.digest import (
    MANIFEST,
    DigestError,
    check_digests,
    digests_of,
    read_manifest,
    seal,
    unseal,
    write_manifest,
)
from swirl.storage.files import sync_files, sync_folder

TENSORS, STATE = "training.safetensors", "training.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_FORMAT = 1

Tensors = Mapping[str, torch.Tensor | Deferred]


@dataclass(frozen=True)
class Snapshot:
    """A run between two updates, on the CPU and its own: nothing that trains on writes to it.

    `config`, `tokenizer` and `origin` go with `weights` into the Hugging Face folder; `training` are the tensors and
    `state` the JSON of all else. With `adapter`, an adapter_config.json, `weights` are those of adapters alone.
    Of sharded weights it is no copy: it is good for as long as nothing trains on, and all ranks take part in `gathers`.
    """

    update: int
    weights: Tensors
    config: dict
    tokenizer: object
    training: Tensors
    state: dict
    origin: model_folder.Origin | None = None
    adapter: dict | None = None
    gathers: sharding.Gathers | None = None

    def is_finite(self) -> bool:
        """Whether no weight is NaN or infinite; of sharded ones every rank looks at its own."""
        if self.gathers is not None:
            return distributed.most(int(not self.gathers.is_finite())) == 0
        return all(bool(weight.isfinite().all()) for weight in self.weights.values())


def copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    """The same tensors on the CPU, as copies. Those of a GPU come over in one go, through pinned memory."""
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name].copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()  # the copies are still under way
    return copies


def snapshot_of(
    model, optimizer: Optimizer, objective: Objective, tokenizer, update: int, state: dict, *, copy: bool = True
) -> Snapshot:
    """What a run is after `update`; without `copy` it is good for as long as nothing trains on."""
    trains_shards = sharding.trains_shards(model)
    gathers = sharding.Gathers() if trains_shards else None

    def take(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
        if gathers is not None:
            return {name: gathers.add(tensor, dtype or tensor.dtype) for name, tensor in tensors.items()}
        return copied(tensors) if copy else tensors

    config = model.config.to_json(model.dtype, model.origin and model.origin.config)
    weights = take(lora.adapter_weights(model) if model.lora else model.state_dict(), model.dtype)
    training = {**optimizer.state_tensors(), **objective.state_tensors()}
    if trains_shards and model.dtype.itemsize < 4:  # shards are the float32 copies themselves
        training |= {f"{number}.copy": weight for number, weight in optimizer.weights_by_number().items()}
    training = take(training)
    adapter = lora.adapter_config(model) if model.lora else None
    return Snapshot(update, weights, config, tokenizer, training, state, model.origin, adapter, gathers)


def restore(checkpoint: Checkpoint | None, model: torch.nn.Module, optimizer: Optimizer, objective: Objective) -> None:
    """Give the model, its optimizer and its objective what they had, on every rank what the main one read.

    Raises CheckpointError.
    """
    weights = distributed.tensors_from_main(checkpoint and checkpoint.weights())
    try:
        if model.lora:
            lora.load_adapter_weights(model, dict(weights))
        else:
            _load_weights(model, weights)
        owners = {**optimizer.weights_by_number(), **{f"proximal.{name}": p for name, p in model.named_parameters()}}
        training = {}
        for name, tensor in distributed.tensors_from_main(checkpoint and checkpoint.training()):
            owner = owners.get(name, owners.get(name.partition(".")[0]))
            training[name] = tensor if owner is None else sharding.sharded_like(tensor, owner)
        objective.load_state_tensors(training, model)
        optimizer.load_state_tensors(
            {name: training[name] for name in training if name not in objective.state_tensors()}
        )
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(checkpoint.folder if checkpoint else ".", f"is of another model ({error})") from None


@torch.no_grad()
def _load_weights(model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises ValueError where they are not those of the model."""
    left = dict(model.named_parameters())
    for name, tensor in weights:
        weight = left.pop(name, None)
        if weight is None or weight.shape != tensor.shape:
            raise ValueError(f"expected no tensor '{name}' of shape {tuple(tensor.shape)}")
        rows, first = own_rows(weight)
        rows.copy_(tensor[first : first + len(rows)])
    if left:
        raise ValueError(f"expected a tensor '{next(iter(left))}'")


@dataclass(frozen=True)
class Checkpoint:
    """One on disk whose digests were found right."""

    folder: Path
    update: int
    state: dict

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one at a time, by the model's names, or of adapters by PEFT's. Raises CheckpointError."""
        if lora.is_adapter(self.folder):
            return iter(lora.read_adapter(self.folder)[1].items())
        return model_folder.read_weights(self.folder)

    def training(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of those beside the weights, one at a time. Raises CheckpointError."""
        return read_tensors(self.folder / TENSORS)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Raises CheckpointError, in one line, where it is not whole: a file is missing, or does not match its digest."""
    name = _NAME.fullmatch(folder.name)
    try:
        if not {TENSORS, STATE} <= read_manifest(folder).keys():
            raise CheckpointError(folder, "expected a checkpoint of a run: digests.json, training.json and more")
        check_digests(folder)
        content = json.loads(unseal((folder / STATE).read_bytes()))
        update, state = content["update"], content["state"]
        if content["format"] != _FORMAT or (name and int(name[1]) != update):
            raise CheckpointError(folder, f"is of update {update}, in format {content['format']}")
        return Checkpoint(folder, update, state)
    except DigestError as error:
        raise CheckpointError(folder, str(error)) from None
    except OSError as error:
        raise CheckpointError(folder, f"cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(folder / STATE, f"expected the state of a run ({error})") from None


def checkpoints_in(run: Path) -> dict[int, Path]:
    """Folder by update, the newest first; whether they are whole is not looked at."""
    entries = list(run.iterdir()) if run.is_dir() else []
    found = {int(name[1]): path for path in entries if path.is_dir() and (name := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The last whole one in a run's folder; `warn` gets a line for each newer one that is not. None: there is none."""
    for folder in checkpoints_in(run).values():
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            warn(f"{error}: this checkpoint is left out")
    return None


class CheckpointWriter:
    """Writes a run's checkpoints, one at a time, in a thread: who saves waits for a copy, not for the disk.

    A folder is written aside, its files' digests beside them, all of it fsynced, then renamed: a kill at any moment
    leaves the earlier checkpoints as they were. The last `keep` stay. The run's folder must be this process's alone.
    `warn` gets one line for each save that failed.
    """

    def __init__(self, run: Path, *, keep: int, warn: Callable[[str], None]):
        self._run, self._keep, self._warn = run, keep, warn
        self._thread: threading.Thread | None = None
        self.last: int | None = None  # the update of the last whole one
        self.held_up_s = 0.0  # what the saves have made training wait
        for left in [*run.glob(".checkpoint-*.partial"), *run.glob(".checkpoint-*.old")]:
            shutil.rmtree(left, ignore_errors=True)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, snapshot: Callable[[], Snapshot]) -> None:
        """Write `snapshot()`, in the background, once the save before it is done."""
        started = time.perf_counter()
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot(),), name="swirl-checkpoint")
        self._thread.start()
        self.held_up_s += time.perf_counter() - started

    def wait(self) -> None:
        """Until what was begun is on disk, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        folder = self._run / f"checkpoint-{snapshot.update}"
        try:
            if self.last != snapshot.update:
                write_checkpoint(folder, snapshot)
                self.last = snapshot.update
            self.prune()
        except Exception as error:  # whatever it is, training is not at fault
            self._warn(f"{folder}: could not be saved ({error})")

    def prune(self) -> None:
        """Remove all but the last `keep`."""
        for folder in list(checkpoints_in(self._run).values())[self._keep :]:
            old = _aside(folder, "old")
            folder.rename(old)  # so that no half of one is ever taken for a damaged checkpoint
            shutil.rmtree(old)


def write_checkpoint(folder: Path, snapshot: Snapshot) -> None:
    """Write one aside, sync, rename. Raises OSError, also where the folder is there and not empty; SafetensorError."""
    aside = _aside(folder, "partial")
    state = {"format": _FORMAT, "update": snapshot.update, "state": snapshot.state}
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        if snapshot.adapter is None:
            model_folder.write(aside, snapshot.weights, snapshot.config, snapshot.tokenizer, snapshot.origin)
        else:
            lora.write_adapter(aside, snapshot.weights, snapshot.adapter)
        write_tensors(aside / TENSORS, snapshot.training)
        (aside / STATE).write_bytes(seal(json.dumps(state).encode() + b"\n"))
        write_manifest(aside, digests_of(aside.iterdir()))
        sync_files(aside)
        aside.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_model(checkpoint: Path, target: Path, *, link: bool = False) -> None:
    """The model of a checkpoint, or its adapters, as a folder of its own; `link` shares the files of weights with it.

    Raises CheckpointError where it cannot be written, or where `target` holds something that is no checkpoint.
    """

    def fill(folder: Path) -> None:
        for path in checkpoint.iterdir():
            if path.name in (TENSORS, STATE, MANIFEST):
                continue
            if link and path.suffix == ".safetensors":
                with suppress(OSError):  # a file system without links
                    os.link(path, folder / path.name)
                    continue
            shutil.copyfile(path, folder / path.name)

    known_by = {"config": lora.CONFIG, "weights": (lora.WEIGHTS,)} if lora.is_adapter(checkpoint) else {}
    model_folder.replace_folder(target, fill, **known_by)


def set_newer_aside(run: Path, update: int) -> list[Path]:
    """Rename the checkpoints after `update`, which a run that goes on from there will write anew; returns where to."""
    asides = []
    for number, folder in checkpoints_in(run).items():
        if number > update:
            count = 1
            while (aside := run / f"{folder.name}.aside-{count}").exists():
                count += 1
            asides.append(folder.rename(aside))
    return asides


def _aside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")
