"""Training as a whole, in this process: what it learns from, what a failure leaves, what it asks of others."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from swirl import open as opening
from swirl.config import TrainConfig
from swirl.environment.judge import Judgement
from swirl.environment.prompts import question_prompt
from swirl.errors import ConfigError, EndpointUnusable, InputError
from swirl.tasks import almanac
from swirl.train import train
from swirl.trajectory import Step, Trajectory, write_trajectories


def told(num, rewards=lambda number, k: float((number + k) % 2)):
    """Demonstrated trajectories of bridge questions as others would write them: text, and `rewards` of their steps."""
    import numpy as np

    rng = np.random.default_rng(0)
    for number, question in enumerate(almanac.questions("bridge", "train", num)):
        script = almanac.demonstrate(question, rng, slips=None)
        yield Trajectory(
            id=f"t-{number}",
            question=question,
            prompt=question_prompt(question.question, "search", 5),
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
            "actions": "recorded",
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
    config = small(told(4), model="almanac", actions="sampled", reward="http://127.0.0.1:9/v1#m", updates=9,
                   trajectories_per_update=1, max_new_tokens=48)  # fmt: skip
    with pytest.raises(EndpointUnusable, match="unable: graded none of the actions of 3 updates in a row"):
        train(config)
    assert "masked" in capsys.readouterr().err
