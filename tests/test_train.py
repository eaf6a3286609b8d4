"""Training as a whole, in this process: what it learns from, what a failure leaves, what it asks of others."""

from __future__ import annotations

import json

import pytest

from swirl.config import TrainConfig
from swirl.environment.prompts import question_prompt
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
