"""Trackers: the files of real ones, read back by their own readers."""

from __future__ import annotations

import glob
import json
import struct
import sys
import time
from pathlib import Path

import pytest

from swirl.app.tracking import numbers, require_trackers, tracking
from swirl.errors import ConfigError

LINES = (
    {"update": 1, "reward": None, "loss": -0.5, "reward_by_step": {"1": 0.25, "2": 1.0}, "masked": 3, "tokens": 2048},
    {"update": 2, "reward": 0.75, "loss": -0.25, "idle": "every reward is 1.00", "masked": 0, "tokens": 1024},
)


def track_all(name, run, lines=LINES, **where):
    run.mkdir(exist_ok=True)
    with tracking((name,), run, {"seed": 0, "out": run, "task": ("bridge",)}, **where) as track:
        for line in lines:
            track("train", line)


def test_numbers_of_a_line():
    assert numbers(LINES[0], "train") == {
        "train/loss": -0.5, "train/reward_by_step/1": 0.25, "train/reward_by_step/2": 1.0, "train/masked": 3,
        "train/tokens": 2048,
    }  # fmt: skip
    assert "train/idle" not in numbers(LINES[1], "train")  # words are no numbers


def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track_all("tensorboard", tmp_path / "run")
    # A run that goes on after update 1: what was written of update 2 is replaced.
    track_all("tensorboard", tmp_path / "run", ({"update": 2, "reward": 0.5},), update=1)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    read = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert read["train/loss"] == [(1, -0.5)]
    assert read["train/reward"] == [(2, 0.5)] and read["train/reward_by_step/2"] == [(1, 1.0)]


def records(content):
    """Of a .wandb file, a log of LevelDB's behind 7 bytes: blocks of 32 KiB, records in one part or several."""
    at, whole = 7, b""
    while len(content) - at > 7:
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, part = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track_all("wandb", tmp_path / "run")
    (file,) = glob.glob(str(tmp_path / "run" / "wandb" / "offline-run-*" / "*.wandb"))
    read, until = [], time.monotonic() + 20  # another process writes it, and may be a moment behind
    while not (read and read[-1].WhichOneof("record_type") == "exit") and time.monotonic() < until:
        read = [wandb_internal_pb2.Record.FromString(data) for data in records(Path(file).read_bytes())]
        time.sleep(0.05)
    history = [record.history.item for record in read if record.WhichOneof("record_type") == "history"]
    values = [{(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in one} for one in history]
    assert [line["train/loss"] for line in values] == [-0.5, -0.25] and "train/reward" not in values[0]


def test_trackio_on_disk(tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio.sqlite_storage") and pytest.importorskip("trackio")
    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    track_all("trackio", tmp_path / "run")
    (found,) = trackio.Api().runs("swirl")
    read = trackio.sqlite_storage.SQLiteStorage.get_logs("swirl", "run")
    assert found.name == "run" and capsys.readouterr().out == ""  # stdout is for results
    assert [line["train/loss"] for line in read] == [-0.5, -0.25]


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"--track wandb: .*pip install 'swirl\[wandb\]'"):
        require_trackers(("wandb",))


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError("no space\nleft")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    track_all("tensorboard", tmp_path)
    said = capsys.readouterr().err
    assert said.count("warning: --track tensorboard: no space left; this run is not tracked there any more") == 1
