"""Ranks: what they send one another, and what is said where one is killed or stopped."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from swirl.learning.checkpoints import newest_checkpoint
from tests.commands.test_train import told
from tests.drills.resume_drill import config_in, ended, make_inputs, started


def running(config):
    """Two ranks in the middle of training."""
    processes = started(config, ranks=2)
    metrics, end = config.out / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    return processes


KILLED, STOPPED = (signal.SIGKILL, "was killed, or failed"), (signal.SIGSTOP, "is stopped")


@pytest.mark.parametrize(
    ("lost", "sent", "said"),
    [
        (0, *KILLED),
        pytest.param(1, *KILLED, marks=pytest.mark.slow),
        pytest.param(0, *STOPPED, marks=pytest.mark.slow),
        (1, *STOPPED),
    ],
)
def test_a_lost_rank_is_named_and_the_last_update_is_there(tiny_folder, tmp_path, lost, sent, said):
    make_inputs(tmp_path, tiny_folder, list(told(6)))
    torch.set_num_threads(1)
    config = config_in(tmp_path, 100_000, rank_timeout_s=3.0, save_every=20)
    processes = running(config)
    os.kill(processes[lost], sent)
    began = time.monotonic()
    (code,) = ended([processes[1 - lost]], 30.0)
    took_s = time.monotonic() - began
    os.kill(processes[lost], signal.SIGKILL)
    ended([processes[lost]])
    lines = (tmp_path / f"stderr-{1 - lost}.txt").read_text().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 1 and took_s < 30 and "Traceback" not in "\n".join(lines), lines
    assert errors == [f"error: the ranks lost one another: rank {lost} {said}"]
    found = newest_checkpoint(config.out, pytest.fail)
    done = len((config.out / "metrics.jsonl").read_bytes().splitlines())
    assert found.update == done if lost == 1 else found is None or found.update % 20 == 0
