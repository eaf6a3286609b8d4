"""Checkpoints of a run: what is read is what was, to the bit; what is not whole is told and left out."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from swirl import Gemma, GemmaConfig
from swirl.errors import CheckpointError
from swirl.learning import checkpoints
from swirl.learning.checkpoints import (
    CheckpointWriter,
    Snapshot,
    checkpoints_in,
    copied,
    newest_checkpoint,
    open_checkpoint,
    set_newer_aside,
    write_checkpoint,
)
from swirl.learning.optimizer import make_optimizer
from tests.process import begin_module

ROOT = Path(__file__).parents[2]
CONFIG = GemmaConfig(300, 16, 24, 2, 2, 1, head_dim=8, sliding_window=5)


def step(model, optimizer, number):
    """An update whose gradients are a function of its number and the weights."""
    for i, weight in enumerate(model.parameters()):
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1000 * number + i))
        weight.grad = (noise + weight.detach()).to(weight.grad_dtype)
    optimizer.step()
    optimizer.zero_grad()


def snapshot_of(model, optimizer, update):
    state = {"metrics": [{"update": u + 1} for u in range(update)]}
    config = model.config.to_json(model.dtype)
    return Snapshot(update, copied(model.state_dict()), config, None, copied(optimizer.state_tensors()), state)


def made(dtype=torch.float32, seed=0):
    model = Gemma(CONFIG).init_weights(seed).to(dtype)
    return model, make_optimizer(model, learning_rate=1e-2, weight_decay=0.1)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 3])
def test_training_goes_on_to_the_bit(tmp_path, dtype, done):
    model, optimizer = made(dtype)
    for number in range(done):
        step(model, optimizer, number)
    write_checkpoint(tmp_path / f"checkpoint-{done}", snapshot_of(model, optimizer, done))
    for number in range(done, done + 3):
        step(model, optimizer, number)

    found = newest_checkpoint(tmp_path, pytest.fail)
    other, again = made(dtype, seed=9)
    other.load_state_dict(dict(found.weights()))
    again.load_state_tensors(dict(found.training()))
    assert (found.update, found.state) == (done, {"metrics": [{"update": u + 1} for u in range(done)]})
    for number in range(done, done + 3):
        step(other, again, number)
    assert same(model.state_dict(), other.state_dict())
    assert same(optimizer.state_tensors(), again.state_tensors())


def test_a_checkpoint_is_a_model_folder(tmp_path):
    model, optimizer = made()
    write_checkpoint(tmp_path / "checkpoint-0", snapshot_of(model, optimizer, 0))
    assert same(Gemma.from_pretrained(tmp_path / "checkpoint-0").state_dict(), model.state_dict())


def test_state_of_another_optimizer_is_refused(tmp_path):
    model, optimizer = made()
    step(model, optimizer, 0)
    tensors = optimizer.state_tensors()
    other = Gemma(GemmaConfig(300, 24, 24, 2, 2, 1, head_dim=8)).init_weights(0)
    with pytest.raises(ValueError, match="expected the optimizer state of weight 0"):
        make_optimizer(other, learning_rate=1.0).load_state_tensors(tensors)
    with pytest.raises(ValueError, match="expected the optimizer state of weight 0"):
        made(torch.bfloat16)[1].load_state_tensors(tensors)


def test_the_last_are_kept_and_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / ".checkpoint-7.partial").mkdir()
    model, optimizer = made()
    writer = CheckpointWriter(tmp_path, keep=2, warn=pytest.fail)
    for update in range(12):
        writer.save(lambda update=update: snapshot_of(model, optimizer, update))
        step(model, optimizer, update)
    writer.wait()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-11"] and writer.last == 11
    assert list(checkpoints_in(tmp_path)) == [11, 10] and writer.held_up_s > 0


def test_a_snapshot_is_not_written_to_by_training(tmp_path, monkeypatch):
    model, optimizer = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write = checkpoints.write_checkpoint
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda *args: (time.sleep(0.2), write(*args)))
    writer = CheckpointWriter(tmp_path, keep=2, warn=pytest.fail)
    writer.save(lambda: snapshot_of(model, optimizer, 0))
    assert writer.busy
    step(model, optimizer, 0)
    writer.wait()
    assert same(dict(open_checkpoint(tmp_path / "checkpoint-0").weights()), before)


def test_a_failed_save_is_a_warning_and_leaves_the_others(tmp_path, monkeypatch):
    model, optimizer = made()
    said = []
    writer = CheckpointWriter(tmp_path, keep=2, warn=said.append)
    writer.save(lambda: snapshot_of(model, optimizer, 1))
    writer.wait()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", full_disk)
        writer.save(lambda: snapshot_of(model, optimizer, 2))
        writer.wait()
    assert len(said) == 1 and "checkpoint-2: could not be saved" in said[0] and "No space left" in said[0]
    assert os.listdir(tmp_path) == ["checkpoint-1"] and writer.last == 1
    writer.save(lambda: snapshot_of(model, optimizer, 3))
    writer.wait()
    assert writer.last == 3 and len(said) == 1


def test_newer_ones_are_set_aside(tmp_path):
    for update in (2, 4, 6):
        (tmp_path / f"checkpoint-{update}").mkdir()
    assert sorted(path.name for path in set_newer_aside(tmp_path, 2)) == [
        "checkpoint-4.aside-1",
        "checkpoint-6.aside-1",
    ]
    assert list(checkpoints_in(tmp_path)) == [2]
    assert not set_newer_aside(tmp_path / "none", 0)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of updates 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    model, optimizer = made()
    for update in (1, 2):
        step(model, optimizer, update)
        write_checkpoint(folder / f"checkpoint-{update}", snapshot_of(model, optimizer, update))
    return folder


def test_every_damage_is_told_and_the_last_good_one_taken(two, tmp_path):
    rng = random.Random(0)
    run = tmp_path / "run"
    shutil.copytree(two, run)
    newest = run / "checkpoint-2"
    whole = {path: path.read_bytes() for path in sorted(newest.iterdir())}
    wanted = {number: dict(open_checkpoint(run / f"checkpoint-{number}").weights()) for number in (1, 2)}
    unseen = 0
    for path, content in whole.items():
        for trial in range(12):
            at = rng.randrange(len(content))
            cut = trial % 3 == 2
            path.write_bytes(
                content[:at] if cut else content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
            )
            said = []
            found = newest_checkpoint(run, said.append)
            if found.update == 2:  # the flip was in a digest's own name or white space: nothing else may have changed
                assert path.name == "digests.json" and not cut and same(dict(found.weights()), wanted[2])
                unseen += 1
            else:
                assert len(said) == 1 and "checkpoint-2" in said[0] and "\n" not in said[0], (path, said)
                assert same(dict(found.weights()), wanted[1])
        path.write_bytes(content)
    assert unseen < 4
    assert newest_checkpoint(run, pytest.fail).update == 2


@pytest.mark.parametrize("missing", ["digests.json", "training.json", "training.safetensors", "model.safetensors"])
def test_a_missing_file_is_told(two, tmp_path, missing):
    shutil.copytree(two / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / missing).unlink()
    with pytest.raises(CheckpointError, match="checkpoint-2"):
        open_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-1").mkdir()
    said = []
    assert newest_checkpoint(tmp_path, said.append) is None and len(said) == 2


def test_a_renamed_checkpoint_is_told(two, tmp_path):
    shutil.copytree(two / "checkpoint-2", tmp_path / "checkpoint-5")
    with pytest.raises(CheckpointError, match="is of update 2"):
        open_checkpoint(tmp_path / "checkpoint-5")
    shutil.copytree(two / "checkpoint-2", tmp_path / "best")
    assert open_checkpoint(tmp_path / "best").update == 2


_SAVES = """
import sys, torch
from pathlib import Path
from tests.learning.test_checkpoints import made, snapshot_of, step
from swirl.learning.checkpoints import CheckpointWriter
model, optimizer = made()
writer = CheckpointWriter(Path(sys.argv[1]), keep=2, warn=print)
for update in range(1, 10_000):
    step(model, optimizer, update)
    writer.save(lambda: snapshot_of(model, optimizer, update))
"""


def test_a_kill_while_saving_leaves_whole_checkpoints_alone(tmp_path):
    rng = random.Random(0)
    script = tmp_path / "saves.py"
    script.write_text(_SAVES)
    for number in range(3):
        run = tmp_path / str(number)
        run.mkdir()
        process = begin_module(str(script), run, cwd=ROOT)
        while process.is_alive() and max(checkpoints_in(run), default=0) < 3:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert newest_checkpoint(run, pytest.fail).update >= 1
        assert all(open_checkpoint(folder).update == update for update, folder in checkpoints_in(run).items())
