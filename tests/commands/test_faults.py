"""What fails around a run, end to end: a full disk, a folder that turns read-only, NaN, a reward model that is gone."""

from __future__ import annotations

import os
import resource
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swirl.endpoints.address import EndpointLimits
from swirl.errors import EndpointUnusable, NonFiniteError
from swirl.learning.checkpoints import newest_checkpoint
from swirl.model import checkpoint as model_folder
from swirl.train import train
from tests.commands.test_train import told
from tests.drills.resume_drill import config_in, ended, make_inputs, num_lines, result, sampled, started
from tests.drills.reward_server import RewardServer

NOBODY = 65534
UPDATES = 8


@pytest.fixture(scope="module")
def folder(tiny_folder):
    """With model, data, and an undisturbed run; one that every user of the machine may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        make_inputs(folder, tiny_folder, list(told(6)))
        torch.set_num_threads(1)
        train(config_in(folder, UPDATES, out=folder / "undisturbed"))
        yield folder


def once(updates, run, change):
    """Called in a run's process: `change` falls once so many updates are done and saved."""

    def watch():
        while num_lines(run / "metrics.jsonl") < updates or not (run / f"checkpoint-{updates}").exists():
            time.sleep(0.001)
        change()

    return lambda: threading.Thread(target=watch, daemon=True).start()


def whole_checkpoint(run):
    """The update of the newest checkpoint; none may be damaged."""
    said = []
    found = newest_checkpoint(run, said.append)
    assert not said
    return found.update


def goes_on_to_the_same_end(folder, config):
    train(config)
    assert result(config.out) == result(folder / "undisturbed")


@pytest.mark.parametrize("room", ["none for a checkpoint", "none for a line of metrics"])
def test_a_full_disk_loses_nothing_that_was_there(folder, room):
    here = folder / room.replace(" ", "-")  # with a stderr of its own: that of another run would fill the disk
    here.mkdir()
    config = config_in(folder, UPDATES, out=here / "run")

    def fill():
        weights, metrics = config.out / "checkpoint-4" / "model.safetensors", config.out / "metrics.jsonl"
        largest = weights.stat().st_size - 1 if "checkpoint" in room else metrics.stat().st_size + 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    assert ended(started(config, prepare=once(4, config.out, fill))) == [1]
    said = (here / "stderr-0.txt").read_text()
    assert "could not be saved" in said and "Traceback" not in said
    assert "File too large" in said.splitlines()[-1] and str(config.out) in said.splitlines()[-1]
    assert whole_checkpoint(config.out) >= 4
    goes_on_to_the_same_end(folder, config)


def test_a_folder_that_turns_read_only_loses_nothing_that_was_there(folder):
    config = config_in(folder, UPDATES, out=folder / "read-only")

    def prepare():
        if os.getuid() == 0:  # who may write anywhere
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        once(4, config.out, lambda: config.out.chmod(0o555))()

    assert ended(started(config, prepare=prepare)) == [1]
    said = (folder / "stderr-0.txt").read_text()
    assert "could not be saved" in said and "Permission denied" in said.splitlines()[-1] and "Traceback" not in said
    assert whole_checkpoint(config.out) >= 4
    config.out.chmod(0o755)
    goes_on_to_the_same_end(folder, config)


def test_nan_is_refused_and_the_update_before_it_is_saved(folder, capsys):
    config = config_in(folder, UPDATES, out=folder / "nan", learning_rate=1e30, warmup=0, save_every=0)
    with pytest.raises(NonFiniteError, match="update 2: .* the update was refused, the weights are those before it"):
        train(config)
    assert whole_checkpoint(config.out) == num_lines(config.out / "metrics.jsonl") == 1
    weights = dict(model_folder.read_weights(config.out / "checkpoint-1"))
    assert weights and all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("outage_s", [60.0, 0.2])
def test_a_reward_model_that_is_gone_is_waited_for(folder, tmp_path, caplog, outage_s):
    """The clock is scaled down: it is gone for seconds of a minute, where an hour of two may pass."""
    with RewardServer(tmp_path) as server:
        config = sampled(folder, server, updates=3, out=tmp_path / "run", endpoint=EndpointLimits(outage_s=outage_s))
        train(replace(config, out=tmp_path / "undisturbed"))
        asked, ended_by_it = len(server.asked()), threading.Event()

        def go_until_it_is_said():
            while num_lines(config.out / "metrics.jsonl") < 1:
                time.sleep(0.001)
            server.stop()
            while "waiting, asked again in" not in caplog.text and not ended_by_it.is_set():
                time.sleep(0.01)
            server.start()

        outage = threading.Thread(target=go_until_it_is_said)
        outage.start()
        if outage_s > 1:
            train(config)
            assert "answers again" in caplog.text
        else:
            with pytest.raises(EndpointUnusable, match="cannot connect"):
                train(config)
            assert whole_checkpoint(config.out) == num_lines(config.out / "metrics.jsonl") >= 1
            ended_by_it.set()
        outage.join()
        train(config)  # the one that has ended ends again
        assert result(config.out) == result(tmp_path / "undisturbed")
        assert len(names := server.asked()[asked:]) == len(set(names))
