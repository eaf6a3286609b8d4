"""Training as a whole, in this process: what it learns from, what a failure leaves, what it asks of others."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace as replace_config
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from benchmarks.fault_server import FaultServer
from swirl import train as loop
from swirl.app import resolve as opening
from swirl.app import training_data
from swirl.app.report.build import write_report
from swirl.config import TrainConfig, settled, sized
from swirl.errors import ConfigError, EndpointUnusable, InputError, NothingToLearn
from swirl.judging.judges import Judgement
from swirl.model.config import PRESETS
from swirl.rollout.prompts import question_prompt
from swirl.storage.lock import folder_lock
from swirl.tasks import almanac
from swirl.tools.search import search_tool
from swirl.train import train
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Step, Trajectory
from tests.process import begin_module, run_ranks


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
    assert (config.out / "report.html").stat().st_size > 10_000
    assert not (config.out / "evaluated-before.jsonl").exists()


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
    assert f"warning: {actions - 2} of {actions} actions had no reward" in told_of and "masked)  " in told_of
    assert summary["updates"] == 2


def test_an_update_that_has_no_grade_has_no_reward(small):
    config = small(told(8, lambda number, k: 0.5 if number % 2 else None), trajectories_per_update=1, updates=8)
    train(config)
    rewards = [m["reward"] for m in metrics_of(config.out)]
    assert sorted(rewards, key=str) == [0.5] * 4 + [None] * 4
    assert [("idle" in m) for m in metrics_of(config.out)] == [reward is None for reward in rewards]
    assert (config.out / "report.html").stat().st_size > 10_000


def test_updates_in_a_row_without_anything_to_learn_end_the_run(small, capsys):
    config = small(told(8, lambda number, k: 0.5), baseline="mean", updates=8)
    with pytest.raises(NothingToLearn, match="3 updates in a row had nothing to learn from: every reward is 0.50"):
        train(config)
    assert len(metrics_of(config.out)) == 3 and "nothing to learn: every reward is 0.50" in capsys.readouterr().err
    assert "nothing to learn from: every reward is 0.50" in (config.out / "stopped.json").read_text()
    assert write_report([config.out]) == config.out / "report.html"


def test_what_an_update_says_of_its_actions(small):
    config = small(told(4), baseline="mean", kl_coefficient=0.1)
    train(config)
    for metrics in metrics_of(config.out):
        steps = metrics["reward_by_step"]
        assert set(metrics["reward_by_kind"]) == {"search", "answer"} and set(steps) == {"1", "2", "3"}
        assert metrics["reward"] == pytest.approx(sum(steps.values()) / 3)  # each trajectory has three
        assert metrics["entropy"] > 0 and metrics["kl"] >= 0 and metrics["truncated"] == 0
        assert metrics["action_length"] == pytest.approx(metrics["action_tokens"] / metrics["actions"])
        assert "ratio" not in metrics and "no_variance" not in metrics  # of recorded actions there is neither


@pytest.mark.parametrize("mode", ["sampled", "outcome-rl"])
def test_modes_that_draw_anew_play_a_run(small, mode):
    config = small(None if mode == "outcome-rl" else told(4), mode=mode, model="almanac", samples_per_state=2,
                   max_new_tokens=48, num_questions=8, evaluate_every=1, evaluate_num_questions=2)  # fmt: skip
    train(config)
    for metrics in metrics_of(config.out):
        assert "idle" in metrics or metrics["ratio"] == pytest.approx(1, abs=1e-3)
        assert 0 <= metrics["no_variance"] <= 1
        assert metrics["actions"] >= (4 if mode == "outcome-rl" else 8)
    validated = [json.loads(line) for line in (config.out / "validation.jsonl").read_text().splitlines()]
    assert [line["update"] for line in validated] == [0, 1, 2] and set(validated[0]["accuracy"]) == {"bridge"}


def test_a_judge_can_grade_recorded_actions(small):
    ungraded = told(4, lambda *_: None)
    config = small(ungraded, mode="recorded", reward="rule")
    train(config)
    assert all(m["reward"] == 1.0 and m["masked"] == 0 for m in metrics_of(config.out))


def test_corrections_need_log_probs(small):
    with pytest.raises(InputError, match="field 'log_probs': trajectory 't-0' has none, which --proximal-every"):
        train(small(told(4), proximal_every=2))


@pytest.mark.parametrize(
    "flags, said",
    [
        ({"mode": "imitation", "reward": "rule"}, "--reward rule: expected none, as imitation takes all actions alike"),
        ({"mode": "imitation", "baseline": "mean"}, "--baseline mean: expected none"),
        ({"mode": "outcome-rl", "reward": "rule"}, "--reward rule: expected outcome"),
        ({"mode": "outcome-rl", "data": Path("x.jsonl")}, "--data x.jsonl: expected none"),
        ({"mode": "outcome-rl", "samples_per_state": 5}, "--trajectories-per-update 24: expected a multiple of"),
        ({"mode": "sampled", "reward": "outcome"}, "--reward outcome: expected rule, a URL or a checkpoint"),
        ({"mode": "sampled", "proximal_every": 5}, "--proximal-every 5: expected 0"),
        ({"mode": "sampled", "samples_per_state": 1}, "--samples-per-state 1: expected at least 2"),
        ({"mode": "recorded", "baseline": "leave_one_out"}, "--baseline leave_one_out: expected none or mean"),
    ],
)
def test_flags_that_mean_nothing_beside_the_mode_are_refused(flags, said):
    with pytest.raises(ConfigError, match=f"^{said}"):
        TrainConfig(**flags)


def test_what_auto_means():
    def means(tasks_of_data=None, device="cpu", **flags):
        config = settled(TrainConfig(**flags), tasks_of_data, device)
        return config.mode, config.reward, config.baseline, config.judge

    assert means() == ("sampled", "rule", "leave_one_out", "rule")
    assert means({"bridge"}) == ("sampled", "rule", "leave_one_out", "rule")
    assert means({"hotpotqa"}) == ("recorded", "recorded", "none", "none")
    assert means({"hotpotqa"}, reward="http://h/v1#m")[:2] == ("sampled", "http://h/v1#m")
    assert means(mode="recorded")[:3] == ("recorded", "recorded", "none")
    assert means(mode="imitation")[:3] == ("imitation", "none", "none")
    assert means(mode="outcome-rl")[:3] == ("outcome-rl", "outcome", "leave_one_out")
    assert settled(TrainConfig(), {"own"}).evaluate_on == () and settled(TrainConfig(), {"deep"}).evaluate_on == (
        "deep",
    )
    assert settled(TrainConfig(), None, "cuda").dtype == "bfloat16" and settled(TrainConfig(), None).dtype == "float32"
    for flags, said in (
        ({"reward": "http://h/v1#m"}, "--filter process: needs --judge"),
        ({"mode": "sampled"}, "--reward: sampled actions need one"),
        ({"judge": "rule", "reward": "http://h/v1#m"}, "--judge rule: knows Almanac's questions alone"),
        ({"questions": None}, "task 'hotpotqa' needs --questions"),
    ):
        with pytest.raises(ConfigError, match=said):
            settled(TrainConfig(**{"task": ("hotpotqa",), "questions": Path("h.json"), **flags}), None)


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
        prompt = payload["messages"][0]["content"]
        message = {"role": "assistant", "content": f"SCORE: {len(prompt) % 10}" if "SCORE" in prompt else "GOOD"}
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
    assert error in (raised.value, raised.value.__cause__, raised.value.__context__)
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
    made = loop.make_optimizer

    def with_a_file_in_the_way(*args, **settings):
        in_the_way.touch()
        return made(*args, **settings)

    monkeypatch.setattr(loop, "make_optimizer", with_a_file_in_the_way)
    with pytest.raises(RuntimeError, match="first"):
        train(config)
    assert "could not be saved" in capsys.readouterr().err and in_the_way.read_bytes() == b""


PEER_FAILS = """
import os
from swirl import train
from swirl.learning import gradient

packed, updates = gradient.rank_micro_batches, iter(range(100))

def failing(*args):
    if next(updates) == 2 and os.environ["RANK"] == "1":
        os._exit(9)
    return packed(*args)

gradient.rank_micro_batches = failing
train.run_command()
"""


def test_a_peer_that_dies_leaves_the_weights(tiny_folder, small, tmp_path):
    config = small(told(6), updates=50)
    (tmp_path / "peer_fails.py").write_text(PEER_FAILS)
    words = ["--out", config.out, "--model", tiny_folder, "--data", *config.data]
    words += ["--mode", "recorded", "--updates", "50", "--evaluate-on"]
    survivor, failed = run_ranks(2, str(tmp_path / "peer_fails.py"), *words, cwd=tmp_path, timeout=120)
    assert survivor.returncode == 1 and failed.returncode == 9
    (left,) = config.out.glob("checkpoint-*")
    assert left.name == "checkpoint-2"
    opening.load_model(str(left))


def test_sigterm_is_an_exception(tiny_folder, small, tmp_path):
    config = small(told(6), updates=100_000)
    words = ["--out", config.out, "--model", tiny_folder, "--data", *config.data]
    words += ["--mode", "recorded", "--updates", "100000", "--evaluate-on"]
    process = begin_module("swirl.train", *words, cwd=tmp_path, err=tmp_path / "said")
    metrics = config.out / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.05)
    process.terminate()
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "Traceback" not in said, said
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


@pytest.mark.parametrize("mode", ["sampled", "recorded", "imitation", "outcome-rl"])
def test_a_data_set_goes_the_whole_way(tmp_path, monkeypatch, mode):
    """Evaluate, generate, filter, learn, evaluate; judge and reward model are servers on loopback."""
    monkeypatch.delenv("SWIRL_API_KEY", raising=False)
    questions = Path(__file__).parents[1] / "fixtures" / "hotpotqa.json"
    with reward_model(good=10_000) as url:
        asked = {} if mode in ("imitation", "outcome-rl") else {"reward": url}
        config = TrainConfig(
            out=tmp_path / "run", task=("hotpotqa",), questions=questions, evaluate_questions=questions, mode=mode,
            judge=url, num_questions=2, samples=2, samples_per_state=2, trajectories_per_update=2, updates=2,
            device="cpu", **asked,
        )  # fmt: skip
        summary = train(config)
    assert set(summary["accuracy_before"]) == set(summary["accuracy_after"]) == {"hotpotqa"}
    assert len(metrics_of(config.out)) == 2 and (config.out / "checkpoint").is_dir()
    assert (config.out / "kept.jsonl").exists() == (mode != "outcome-rl")


def test_actions_are_drawn_by_the_policy_that_is_trained(tmp_path):
    """One update a draw: the ratio is 1, however far a step goes. A sampler that lags behind the trainer shows here."""
    settings = {"smoke": True, "updates": 4, "learning_rate": 3e-3, "warmup": 0, "evaluate_on": ()}
    train(TrainConfig(out=tmp_path / "run", **settings))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["grad_norm"] > 0 for line in lines)
    assert all(abs(line["ratio"] - 1) < 1e-4 and line["clipped"] == 0 for line in lines), lines
    assert all(0 < line["sampler_gap"] <= line["sampler_gap_max"] < 1e-4 for line in lines), lines


@pytest.mark.parametrize("reward", ["recorded", "rule"])
def test_streamed_data_make_the_same_updates(small, tmp_path, monkeypatch, reward):
    config = small(told(9), updates=5, reward=reward)
    train(config)
    lines = config.data[0].read_bytes().splitlines(keepends=True)
    (tmp_path / "one.jsonl").write_bytes(b"".join(lines[:4]))
    (tmp_path / "two.jsonl").write_bytes(b"".join(lines[4:]))
    monkeypatch.setattr(training_data, "WHOLE_BYTES", 0)
    monkeypatch.setattr(training_data, "NUM_LOOKED_AT", 2)
    files = (tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    streamed = replace_config(config, data=files, out=tmp_path / "streamed")
    train(streamed)
    one, other = ((run.out / "checkpoint" / "model.safetensors").read_bytes() for run in (config, streamed))
    assert one == other


def test_what_is_wrong_in_streamed_data_is_told_when_it_is_reached(small, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "WHOLE_BYTES", 0)
    monkeypatch.setattr(training_data, "NUM_LOOKED_AT", 1)
    good, *others = told(6)
    elsewhere = replace(others[0], question=replace(others[0].question, task="hotpotqa"))
    config = small([good, elsewhere, *others[1:]], updates=3)
    with pytest.raises(InputError, match=r"data.jsonl:2: field 'question.task': expected bridge, as far as"):
        train(config)
    train(replace_config(config, task=("bridge", "hotpotqa")))
    with open(config.data[0], "ab") as file:
        file.write(b'{"id": 7}\n')
    with pytest.raises(InputError, match=r"data.jsonl:7: field 'id': Expected `str`"):
        train(config)
    found = [path.name for path in config.out.glob("checkpoint-*")]
    assert len(found) <= 1  # the last update before the line, where there was one


def test_defaults_follow_the_size_of_the_model_and_are_written_down(small):
    """Those of the model that ships with swirl are what they were; a flag that is given stays."""
    base = sized(TrainConfig(), opening.num_weights("almanac"))
    assert (base.learning_rate, base.max_new_tokens, base.tokens_per_micro_batch) == (1e-4, 48, 8192)
    large = {name: sized(TrainConfig(), PRESETS[name].num_weights) for name in ("gemma-2-2b", "gemma-2-27b")}
    assert [config.learning_rate for config in large.values()] == [2.8e-6, 8.6e-7]
    assert [config.max_new_tokens for config in large.values()] == [512, 512]
    assert [config.tokens_per_micro_batch for config in large.values()] == [8192, 4096]
    assert sized(TrainConfig(lora=16), PRESETS["gemma-2-2b"].num_weights).learning_rate == 2.8e-5
    given = TrainConfig(learning_rate=3.0, max_new_tokens=7, tokens_per_micro_batch=9)
    assert sized(given, 10**9) == given
    config = small(told(4), max_new_tokens=None, updates=1)
    train(config)
    written = json.loads((config.out / "config.json").read_text())
    assert (written["learning_rate"], written["max_new_tokens"], written["tokens_per_micro_batch"]) == (1e-4, 48, 8192)
