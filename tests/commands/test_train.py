"""Training as a whole, in this process: what it learns from, what a failure leaves, what it asks of others."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import pytest
import torch
from msgspec.structs import replace

from benchmarks.fault_server import FaultServer
from swirl import train as loop
from swirl.app import resolve as opening
from swirl.config import TrainConfig
from swirl.errors import ConfigError, EndpointUnusable, InputError
from swirl.judging.judges import Judgement
from swirl.rollout.prompts import question_prompt
from swirl.storage.lock import folder_lock
from swirl.tasks import almanac
from swirl.tools.search import search_tool
from swirl.train import train
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Step, Trajectory


def told(num, rewards=lambda number, k: float((number + k) % 2)):
    """Demonstrated trajectories of bridge questions as others would write them: text, and `rewards` of their steps."""
    import numpy as np

    rng = np.random.default_rng(0)
    for number, question in enumerate(almanac.questions("bridge", "train", num)):
        script = almanac.demonstrate(question, rng, slips=None)
        yield Trajectory(
            id=f"t-{number}",
            question=question,
            prompt=question_prompt(question.question, [search_tool()], 5),
            steps=tuple(
                Step(action=action, observation=observation, reward=rewards(number, k))
                for k, (action, observation) in enumerate(script)
            ),
            stop="answer",
            prediction=question.answer,
        )


@pytest.fixture
def small(tiny_folder, tmp_path):
    """Makes a small run's config: two updates on recorded actions, nothing evaluated."""

    def make(data=None, **changed):
        if data is not None:
            write_trajectories(tmp_path / "data.jsonl", data)
        settings = {
            "out": tmp_path / "run",
            "model": str(tiny_folder),
            "data": None if data is None else tmp_path / "data.jsonl",
            "evaluate_on": (),
            "mode": "recorded",
            "updates": 2,
            "trajectories_per_update": 4,
            "max_new_tokens": 8,
            "device": "cpu",
        }
        return TrainConfig(**{**settings, **changed})

    return make


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_evaluation_can_be_left_out(small, capsys):
    config = small(told(6))
    summary = train(config)
    assert summary["updates"] == 2 and summary["accuracy_before"] == summary["relative_gain"] == {}
    shown = capsys.readouterr()
    assert "accuracy" not in shown.out and "2 updates" in shown.out and "evaluate" not in shown.err
    page = (config.out / "report.html").read_text(encoding="utf-8")
    assert "Accuracy" not in page and page.count("<figure>") == 4


def test_data_without_any_grade_is_refused_before_any_work(small):
    ungraded = [replace(t, question=replace(t.question, answer=None)) for t in told(3, lambda *_: None)]
    with pytest.raises(InputError, match="no step has a reward or a verdict: filter it, or take --reward outcome"):
        train(small(ungraded))
    config = small(ungraded, reward="outcome")
    with pytest.raises(InputError, match="data.jsonl: no trajectory has an outcome or a golden answer"):
        train(config)
    with pytest.raises(ConfigError, match="--filter outcome: gives no step a verdict"):
        train(small(reward="recorded", filter="outcome"))
    assert not config.out.exists()


def test_steps_without_a_grade_are_masked_and_counted(small, capsys):
    config = small(told(4, lambda number, k: 1.0 if (number, k) == (0, 0) else None), baseline="mean")
    summary = train(config)
    metrics = metrics_of(config.out)
    assert [m["reward"] for m in metrics] == [1.0, 1.0] and all(m["masked"] == m["actions"] - 1 for m in metrics)
    told_of = capsys.readouterr().err
    actions = sum(m["actions"] for m in metrics)
    assert f"warning: {actions - 2} of {actions} actions had no reward" in told_of and "masked)  loss" in told_of
    assert summary["updates"] == 2


def test_an_update_that_has_no_grade_has_no_reward(small):
    config = small(told(8, lambda number, k: 0.5 if number == 0 else None), trajectories_per_update=1, updates=8)
    train(config)
    rewards = [m["reward"] for m in metrics_of(config.out)]
    assert sorted(rewards, key=str) == [0.5] + [None] * 7
    assert "figure" in (config.out / "report.html").read_text(encoding="utf-8")


class Unable:
    """A reward model that answers, but never with a score."""

    name = "unable"

    async def judge(self, item):
        return Judgement(verdict=None, reason="no verdict: the answer ends with 'hm'")


def test_a_reward_model_that_grades_nothing_ends_the_run(small, monkeypatch, capsys):
    monkeypatch.setattr(opening, "open_judge", lambda *_, **__: Unable())
    config = small(told(4), model="almanac", mode="sampled", reward="http://127.0.0.1:9/v1#m", updates=9,
                   trajectories_per_update=1, max_new_tokens=48)  # fmt: skip
    with pytest.raises(EndpointUnusable, match="unable: graded none of the actions of 3 updates in a row"):
        train(config)
    assert "masked" in capsys.readouterr().err


@contextmanager
def reward_model(good, then="401"):
    """The address of a reward model that gives `good` scores and then fails."""

    def answer(path, payload):
        message = {"role": "assistant", "content": f"SCORE: {len(payload['messages'][0]['content']) % 10}"}
        return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    server = FaultServer(answer, script=["ok"] * good + [then] * 10_000)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(server.start(), loop).result() + "/v1#grader"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def sampled(url):
    """Settings of a small run whose every update asks the reward model at `url`."""
    return {"model": "almanac", "mode": "sampled", "reward": url, "trajectories_per_update": 1,
            "max_new_tokens": 48, "updates": 50}  # fmt: skip


def test_a_reward_model_that_dies_midway_leaves_the_weights_and_the_answers(small, tmp_path, monkeypatch):
    monkeypatch.delenv("SWIRL_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with reward_model(good=120) as url:
        config = small(told(6), **sampled(url))
        with pytest.raises(EndpointUnusable):
            train(config)
    done = len(metrics_of(config.out))
    assert 1 <= done < 50
    (left,) = config.out.glob("checkpoint-*")
    model, _ = opening.load_model(str(left))
    start, _ = opening.load_model("almanac")
    assert left.name == f"checkpoint-{done}" and not (config.out / "checkpoint").exists()
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    with closing(sqlite3.connect(config.out / "answers.sqlite")) as answers:
        assert answers.execute("SELECT count(*) FROM answers").fetchone()[0] == 120
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(28, "No space left"), SystemExit(143)])
def test_whatever_stops_it_the_weights_are_kept(small, monkeypatch, error):
    fail_at_update(monkeypatch, 1, error)
    config = small(told(6))
    with pytest.raises(type(error)) as raised:
        train(config)
    assert raised.value is error
    opening.load_model(str(config.out / "checkpoint-1"))


def fail_at_update(monkeypatch, number, error, weights=None):
    """Raise `error` at that update (from 0), after `weights` fills all weights, where it is given."""
    clip, updates = loop.clip_grad_norm, iter(range(100))

    def failing(model, limit):
        if next(updates) < number:
            return clip(model, limit)
        for weight in model.parameters() if weights is not None else ():
            weight.data.fill_(weights)
        raise error

    monkeypatch.setattr(loop, "clip_grad_norm", failing)


def test_weights_that_are_no_numbers_are_not_saved(small, monkeypatch, capsys):
    fail_at_update(monkeypatch, 1, RuntimeError("first"), weights=float("nan"))
    config = small(told(6))
    with pytest.raises(RuntimeError, match="first"):
        train(config)
    assert "not saved: some are NaN or infinite" in capsys.readouterr().err
    assert not list(config.out.glob("checkpoint*"))


def test_the_first_error_is_the_one_reported(small, monkeypatch, capsys):
    config = small(told(6))
    fail_at_update(monkeypatch, 1, RuntimeError("first"))
    config.out.mkdir()
    in_the_way = config.out / "checkpoint-1"
    measured = loop.usage.measured_peak_flops

    def with_a_file_in_the_way(*args):
        in_the_way.touch()
        return measured(*args)

    monkeypatch.setattr(loop.usage, "measured_peak_flops", with_a_file_in_the_way)
    with pytest.raises(RuntimeError, match="first"):
        train(config)
    assert "could not be saved" in capsys.readouterr().err and in_the_way.read_bytes() == b""


PEER_FAILS = """
import os
from swirl import train

packed, updates = train.micro_batches, iter(range(100))

def failing(*args):
    if next(updates) == 2 and os.environ["RANK"] == "1":
        os._exit(9)
    return packed(*args)

train.micro_batches = failing
train.run_command()
"""


def test_a_peer_that_dies_leaves_the_weights(tiny_folder, small, tmp_path):
    config = small(told(6), updates=50)
    (tmp_path / "peer_fails.py").write_text(PEER_FAILS)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [tmp_path / "peer_fails.py", "--out", config.out, "--model", tiny_folder, "--data", config.data]
    words += ["--mode", "recorded", "--updates", "50", "--evaluate-on"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    (left,) = config.out.glob("checkpoint-*")
    assert left.name == "checkpoint-2"
    opening.load_model(str(left))


def test_sigterm_is_an_exception(tiny_folder, small):
    config = small(told(6), updates=100_000)
    words = [sys.executable, "-m", "swirl.train", "--out", config.out, "--model", tiny_folder, "--data", config.data]
    words += ["--mode", "recorded", "--updates", "100000", "--evaluate-on"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = config.out / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in said, said
    (left,) = config.out.glob("checkpoint-*")
    opening.load_model(str(left))


def test_a_second_run_leaves_the_folder_of_one_at_work_alone(small):
    config = small(list(told(4)))
    train(config)
    before = sorted(path.name for path in config.out.parent.iterdir())
    with folder_lock(config.out), pytest.raises(ConfigError, match="another run is at work"):
        train(config)
    assert sorted(path.name for path in config.out.parent.iterdir()) == before
    train(config)
