"""Whole runs whose weights lie in shards: as those of one rank, however they end."""

import os
import signal
import time

import pytest
import torch
import torch._dynamo  # as is the next, before ranks are forked: else each would import them
import torch.distributed.fsdp
from safetensors.torch import load_file

from swirl.learning.checkpoints import newest_checkpoint
from swirl.model.lora import read_adapter
from tests.commands.test_train import told
from tests.drills.resume_drill import config_in, ended, make_inputs, result, started


def run(folder, model, ranks, updates, **changed):
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    if not (folder / "data.jsonl").exists():
        make_inputs(folder, model, list(told(6)))
    config = config_in(folder, updates, **changed)
    codes = ended(started(config, ranks))
    said = [(folder / f"stderr-{rank}.txt").read_text() for rank in range(ranks)]
    assert codes == [0] * ranks, said
    return config.out


def test_a_run_in_shards_goes_on_on_one_rank_and_ends_as_one_that_was_never_stopped(tiny_folder, tmp_path):
    alone = run(tmp_path / "alone", tiny_folder, 1, 4)
    shared = run(tmp_path / "shared", tiny_folder, 2, 4, shard="all", keep=9)
    (tmp_path / "again").mkdir()
    make_inputs(tmp_path / "again", tiny_folder, list(told(6)))
    again = run(tmp_path / "again", tiny_folder, 1, 4, resume=str(shared / "checkpoint-2"))
    _, metrics = result(alone)
    truth = dict(newest_checkpoint(alone, pytest.fail).weights())
    for folder in (shared, again):
        for mine, theirs in zip(result(folder)[1], metrics, strict=True):
            for name in ("loss", "grad_norm", "tokens", "reward"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
        found = newest_checkpoint(folder, pytest.fail)
        assert found.update == 4
        for name, weight in found.weights():
            assert (weight - truth[name]).abs().max() <= 1e-5 * truth[name].abs().max(), name


@pytest.mark.slow
def test_a_run_of_adapters_beside_shards_ends_as_on_one_rank_and_goes_on_there(tiny_folder, tmp_path):
    changes = {"lora": 3, "lora_alpha": 6.0, "learning_rate": 1e-2, "warmup": 0}
    alone = run(tmp_path / "alone", tiny_folder, 1, 4, **changes)
    shared = run(tmp_path / "shared", tiny_folder, 2, 4, shard="all", keep=9, **changes)
    again = run(tmp_path / "again", tiny_folder, 1, 4, resume=str(shared / "checkpoint-2"), **changes)
    _, truth = read_adapter(alone / "adapter")  # a folder that PEFT loads
    merged = load_file(alone / "checkpoint" / "model.safetensors")
    for folder in (shared, again):
        _, found = read_adapter(folder / "adapter")
        assert found.keys() == truth.keys() and any(weight.abs().max() > 0 for weight in found.values())
        for name, weight in found.items():
            torch.testing.assert_close(weight, truth[name], rtol=1e-4, atol=1e-6, msg=name)
        for name, weight in load_file(folder / "checkpoint" / "model.safetensors").items():
            assert (weight - merged[name]).abs().max() <= 1e-5 * merged[name].abs().max(), name


@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGTERM, [143, 143]), (signal.SIGKILL, [1, -9])])
def test_what_stops_one_rank_stops_all_and_what_can_be_saved_is(tiny_folder, tmp_path, sent, codes):
    make_inputs(tmp_path, tiny_folder, list(told(6)))
    torch.set_num_threads(1)
    config = config_in(tmp_path, 100_000, rank_timeout_s=10.0, save_every=3, shard="all")
    processes = started(config, ranks=2)
    metrics, end = config.out / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 4) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(processes[1], sent)
    assert ended(processes, 60.0) == codes, (tmp_path / "stderr-0.txt").read_text()
    said = (tmp_path / "stderr-0.txt").read_text()
    done = len(metrics.read_bytes().splitlines())
    found = newest_checkpoint(config.out, pytest.fail)
    if sent == signal.SIGTERM:
        assert found.update == done
    else:  # its part of the weights is gone: there is the checkpoint before
        assert found.update == done - done % 3
        assert "error: the ranks lost one another: rank 1 was killed, or failed" in said and "Traceback" not in said
