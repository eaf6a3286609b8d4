"""The drill of kills, signals and damage in miniature, under the conditions of the whole."""

import random

import pytest
import torch

from swirl.train import train
from tests.commands.test_train import told
from tests.drills.resume_drill import (
    config_in,
    drill_flips,
    drill_kills,
    drill_signals,
    ended,
    make_inputs,
    sampled,
    started,
)
from tests.drills.reward_server import RewardServer


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill")
    make_inputs(folder, tiny_folder, list(told(6)))
    torch.set_num_threads(1)
    train(config_in(folder, 1, out=folder / "warm-up"))  # what is imported here is not imported in each process
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_as_the_undisturbed_one(folder, tmp_path, ranks):
    row = drill_kills(tmp_path, config_in(folder, 6), 1, random.Random(ranks), ranks)
    assert not row.failures and row.attempts >= 1


def test_a_killed_run_asks_its_reward_model_nothing_twice(folder, tmp_path):
    with RewardServer(tmp_path) as server:
        row = drill_kills(tmp_path, sampled(folder, server, updates=3, save_every=1), 1, random.Random(0), 1, server)
    assert not row.failures and row.attempts >= 1 and not row.note.endswith(" 0 requests")


@pytest.mark.parametrize("kind", ["SIGTERM", "double Ctrl-C"])
def test_the_last_update_is_saved(folder, tmp_path, kind):
    assert not drill_signals(tmp_path, config_in(folder, 6), 2, random.Random(0), kind).failures


def test_damage_is_told(folder, tmp_path):
    config = config_in(folder, 3, out=tmp_path / "run", save_every=1)
    assert ended(started(config)) == [0]
    assert not drill_flips(tmp_path / "run", 100, random.Random(0)).failures
