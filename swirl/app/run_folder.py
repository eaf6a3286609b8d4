"""The folder of a run: config.json, metrics.jsonl, checkpoints. Written by the main rank alone, one run at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
from safetensors import SafetensorError

from swirl.app import command
from swirl.app.run_records import DROPPED, EVALUATED, GENERATED, LOG_PROBS, SAMPLES, STOPPED
from swirl.app.signals import deferred, received, saving
from swirl.app.tracking import Track, tracking
from swirl.config import TrainConfig
from swirl.errors import CheckpointError, ConfigError, RankError, SwirlError
from swirl.learning import distributed
from swirl.learning.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    Snapshot,
    export_model,
    newest_checkpoint,
    open_checkpoint,
    set_newer_aside,
    write_checkpoint,
)
from swirl.storage.digest import seal, unseal
from swirl.storage.files import replace_file
from swirl.storage.lock import folder_lock

LOGS = {"metrics.jsonl": "train", "validation.jsonl": "validation"}  # what trackers call them
# Flags that change no weight: a run may go on with others. Of `model` and `data` the content counts, not the path.
_FREE = {"out", "resume", "save_every", "save_minutes", "keep", "rank_timeout_s", "shard", "device", "model", "data",
         "smoke", "evaluate_every", "track", "endpoint", "max_cache_tokens", "memory_check"}  # fmt: skip


class RunFolder:
    """Where a run writes. On every rank but the main one its methods do nothing.

    `resumed` is the checkpoint the run goes on from, None where it starts; on the main rank alone. Where `together`
    holds weights are sharded: every rank calls all methods that take a snapshot, and takes part in it.
    """

    def __init__(self, config: TrainConfig, resumed: Checkpoint | None = None, track: Track | None = None):
        self.path, self.resumed = Path(os.path.realpath(config.out)), resumed
        self._track = track
        self.logs: dict[str, list[dict]] = {name: [] for name in LOGS}
        self._every, self._seconds = config.save_every, 60 * config.save_minutes
        self._saved_at = time.monotonic()
        self._writer = None
        self.together = False
        if distributed.is_main():
            self._writer = CheckpointWriter(self.path, keep=config.keep, warn=command.warn)
            self._writer.last = resumed and resumed.folder.parent == self.path and resumed.update

    def append(self, name: str, line: dict) -> None:
        """One line of JSON more in the file of that name, and at the run's trackers."""
        if distributed.is_main():
            self.logs.setdefault(name, []).append(line)
            _append(self.path / name, _line(line))
            if self._track is not None and name in LOGS:
                self._track(LOGS[name], line)

    def write(self, name: str, value: dict) -> None:
        """A file of that name with one JSON object."""
        if distributed.is_main():
            replace_file(self.path / name, seal(json.dumps(value, indent=2).encode() + b"\n"))

    def append_records(self, name: str, records: Iterable[msgspec.Struct]) -> None:
        """Lines more in a file that no checkpoint carries along."""
        if distributed.is_main():
            _append(self.path / name, b"".join(seal(msgspec.json.encode(record) + b"\n") for record in records))

    def rewrite_logs(self, logs: dict[str, list[dict]]) -> None:
        """Back to the lines that a checkpoint knows: what came after will come again."""
        if distributed.is_main():
            for name in LOGS:
                self.logs[name] = list(logs.get(name, ()))
                if self.logs[name] or (self.path / name).exists():
                    replace_file(self.path / name, b"".join(map(_line, self.logs[name])))
            _cut_samples(self.path / SAMPLES, 0 if self.resumed is None else self.resumed.update)
            for name in (EVALUATED["after"], LOG_PROBS, STOPPED):
                (self.path / name).unlink(missing_ok=True)

    def save_if_due(self, update: int, snapshot: Callable[[], Snapshot]) -> None:
        """A checkpoint every so many updates and minutes, written while training goes on; a failure only warns."""
        due = self._is_due(update)
        if distributed.from_main(due) if self.together else due:
            if self.together:
                try:
                    self._save_together(snapshot())
                except CheckpointError as error:
                    command.warn(f"update {update} could not be saved ({error})")
            else:
                self._writer.save(snapshot)
            self._saved_at = time.monotonic()

    def _is_due(self, update: int) -> bool:
        if not distributed.is_main() or self._writer.last == update:
            return False
        late = self._seconds and time.monotonic() - self._saved_at >= self._seconds and not self._writer.busy
        return bool(late or (self._every and update and update % self._every == 0))

    def finish(self, snapshot: Callable[[], Snapshot]) -> None:
        """The last checkpoint, and its model as the folder `checkpoint`, or its adapters as `adapter`; signals wait.

        Raises CheckpointError.
        """
        if not (distributed.is_main() or self.together):
            return
        with deferred():
            taken = snapshot()
            self._save_together(taken)
            if distributed.is_main():
                last = self.path / f"checkpoint-{self._writer.last}"
                export_model(last, self.path / ("adapter" if taken.adapter else "checkpoint"), link=True)

    @contextmanager
    def keeping_the_last_update(self, snapshot: Callable[[], Snapshot | None]) -> Iterator[None]:
        """Whatever stops the body, the last update is saved: `snapshot()`, unless it is None. Nothing interrupts it."""
        with saving():
            try:
                yield
            except BaseException as error:
                if not isinstance(error, RankError):  # which says so itself
                    for lost in distributed.lost_ranks():
                        command.warn(lost)
                with deferred():
                    self._save_at_last(snapshot)
                raise

    def _save_at_last(self, snapshot: Callable[[], Snapshot | None]) -> None:
        # An error is on its way already: what fails here only warns.
        what = "the weights of the last good update"
        try:
            if not (distributed.is_main() or self.together) or (last := snapshot()) is None:
                return
            if self.together and (distributed.lost_ranks() or not distributed.agreed("stopped after", last.update)):
                return _say(f"{what} are not saved: the ranks that hold them did not stop at the same place")
            if not last.is_finite():
                return _say(f"{what} are not saved: some are NaN or infinite")
            self._save_together(last)
            if distributed.is_main():
                print(f"{what}: {self.path / f'checkpoint-{last.update}'}", file=sys.stderr)
        except Exception as error:
            _say(f"{what} could not be saved ({error})")

    def _save_together(self, snapshot: Snapshot) -> None:
        """On the main rank; of sharded weights on every rank, each giving its part."""
        try:
            if distributed.is_main():
                self._save_now(snapshot)
        finally:
            if snapshot.gathers is not None:
                snapshot.gathers.finish()

    def _save_now(self, snapshot: Snapshot) -> None:
        self._writer.wait()
        if self._writer.last != snapshot.update:
            folder = self.path / f"checkpoint-{snapshot.update}"
            try:
                write_checkpoint(folder, snapshot)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(folder, f"cannot be written ({error})") from None
            self._writer.last = snapshot.update
            self._writer.prune()


def _say(warning: str) -> None:
    if distributed.is_main():
        command.warn(warning)


def _cut_samples(path: Path, update: int) -> None:
    """Leave those of updates up to that one, and no half line of a run that was killed."""

    def is_before(line: bytes) -> bool:
        try:
            return json.loads(unseal(line))["update"] <= update
        except (ValueError, TypeError, KeyError):
            return False

    if path.exists():
        replace_file(path, b"".join(filter(is_before, path.read_bytes().splitlines(keepends=True))))


def _carry_over(earlier: Path, run: Path) -> None:
    """What a run that goes on in another folder had written for its report."""
    for name in (EVALUATED["before"], GENERATED, DROPPED):
        if earlier != run and (earlier / name).exists():
            replace_file(run / name, (earlier / name).read_bytes())


@contextmanager
def _telling_why(run: RunFolder) -> Iterator[None]:
    """What ends the body before its end is written down."""
    try:
        yield
    except BaseException as error:
        with suppress(OSError):
            run.write(STOPPED, {"why": _why_stopped(error)})
        raise


def _why_stopped(error: BaseException) -> str:
    if isinstance(error, SwirlError):
        return str(error)
    if isinstance(error, KeyboardInterrupt) or (received() and not isinstance(error, OSError)):
        return "stopped by a signal"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _append(path: Path, content: bytes) -> None:
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError as error:  # of a full disk it names no file
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _line(value: dict) -> bytes:
    return seal(json.dumps(value).encode() + b"\n")


@contextmanager
def open_run(config: TrainConfig, settings: dict[str, str]) -> Iterator[RunFolder]:
    """The folder at `config.out`, this run's alone while the body runs.

    Without `--resume` it is new: an earlier run is set aside. With it the run goes on from a checkpoint, if it was made
    with the same `settings`. What ends the body is left in stopped.json. Raises ConfigError where the folder is no run
    of swirl, or another run is at work there, and where the checkpoint to go on from cannot be read or was made with
    other settings.
    """
    if not distributed.is_main():
        distributed.from_main(None)  # before any rank writes into the folder, it is there
        yield RunFolder(config)
        return
    with _own_folder(config) as out:
        resumed = None if config.resume is None else _resumed(config, out, settings)
        replace_file(out / "config.json", command.config_to_json(replace(config, resume=None)))
        where = {"run": out, "config": asdict(config), "update": resumed.update if resumed else 0}
        with tracking(config.track, **where) as track:
            run = RunFolder(config, resumed, track)
            run.rewrite_logs({} if resumed is None else resumed.state["logs"])
            if resumed is not None:
                _carry_over(resumed.folder.parent, out)
            distributed.from_main(None)
            with _telling_why(run):
                yield run


@contextmanager
def _own_folder(config: TrainConfig) -> Iterator[Path]:
    """Make the folder, lock it, and look again: whoever else did so meanwhile is seen, and neither loses a file."""
    out = Path(os.path.realpath(config.out))
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ConfigError(f"--out {config.out}: is a file; name another folder") from None
        with folder_lock(out) as mine:
            if not mine:
                raise ConfigError(f"--out {config.out}: another run is at work there; name another folder, or stop it")
            if any(out.iterdir()):
                if not _is_run(out):
                    raise ConfigError(
                        f"--out {config.out}: is there already and is no run of swirl; name another folder"
                    )
                if config.resume is None:
                    _set_aside(out, config)
                    continue
            yield out
            return


def _is_run(folder: Path) -> bool:
    """Whether its config.json is a run's, and not, say, a model's; damage to it makes no difference."""
    try:
        text = (folder / "config.json").read_bytes()
    except OSError:
        return False
    return b'"trajectories_per_update"' in text or b'"samples_per_state"' in text


def _set_aside(out: Path, config: TrainConfig) -> None:
    """An earlier run moves to out.1, out.2, ... Raises ConfigError where this one would miss something in it."""
    inside = [("data", file) for file in config.data]
    inside += [("model", config.model)] if os.path.isdir(config.model) else []
    for flag, path in [*inside, ("out", Path.cwd())]:
        if Path(os.path.realpath(path)).is_relative_to(out):
            what = f"--{flag} {path}" if flag != "out" else "the folder that this command runs in"
            raise ConfigError(f"--out {config.out}: {what} lies in it, and it would be set aside; name another folder")
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(aside)
    print(f"{out} is an earlier run: set aside as {aside}", file=sys.stderr)


def _resumed(config: TrainConfig, out: Path, settings: dict[str, str]) -> Checkpoint | None:
    """The checkpoint to go on from; newer ones in `out` are renamed. None where `auto` finds none."""
    if config.resume == "auto":
        found = newest_checkpoint(out, command.warn)
    else:
        found = open_checkpoint(Path(os.path.realpath(config.resume)))
    if found is not None:
        _refuse_other_settings(found, settings)
        print(f"going on after update {found.update}: {found.folder}", file=sys.stderr)
    for aside in set_newer_aside(out, -1 if found is None else found.update):
        command.warn(f"a checkpoint that is not gone on from is kept as {aside}")
    return found


def settings_of(config: TrainConfig, **contents: str) -> dict[str, str]:
    """What decides a run's weights, by flag: settings, and of `model` and `data` the digest of their `contents`."""
    return {name: str(value) for name, value in asdict(config).items() if name not in _FREE} | contents


def _refuse_other_settings(found: Checkpoint, settings: dict[str, str]) -> None:
    made_with = found.state["settings"]
    for name in sorted(settings.keys() | made_with.keys() - _FREE):
        if made_with.get(name) != settings.get(name):
            was, now = made_with.get(name, "not known"), settings.get(name, "not known")
            raise ConfigError(
                f"{found.folder} was made with --{name.replace('_', '-')} {was}, not {now}: "
                "take the same settings, or start anew without --resume"
            )
