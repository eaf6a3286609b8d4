"""The model card says how the weights were made, in a form that the hub reads."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import yaml

from swirl.app import command
from swirl.app.model_card import flags_of, model_card
from swirl.config import TrainConfig, settled, sized

SUMMARY = {
    "accuracy_before": {"bridge": 0.475, "deep": 0.38}, "accuracy_after": {"bridge": 0.98, "deep": 0.895},
    "interval_before": {"bridge": (0.41, 0.54), "deep": (0.31, 0.45)},
    "interval_after": {"bridge": (0.96, 1.0), "deep": (0.85, 0.94)}, "updates": 60, "commit": "abc",
}  # fmt: skip


def card(config=None, **changes):
    config = sized(settled(config or TrainConfig(model="google/gemma-2-2b-it@main", seed=3), None), 2_000_000_000)
    return model_card(config, **{"update": 60, "commit": "abc", "summary": SUMMARY, "kept": 1234} | changes)


def test_a_card_has_the_base_the_results_and_the_flags():
    _, front, body = card().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "google/gemma-2-2b-it" and front["pipeline_tag"] == "text-generation"
    assert "| bridge | 47.5% [41, 54] | 98.0% [96, 100] |" in body and "| trajectories trained on | 1,234 |" in body
    assert "--model google/gemma-2-2b-it@main" in body and "--seed 3" in body and "(commit abc)" in body


def test_what_is_not_known_is_said_to_be_so():
    text = card(TrainConfig(), summary=None, kept=None, commit=None)
    assert "Not evaluated." in text and "| trajectories trained on | – |" in text and "commit" not in text
    assert "base_model" not in text  # `almanac` is no name on the hub


def test_the_flags_of_a_card_are_read_back(monkeypatch):
    config = TrainConfig(
        mode="recorded", data=(Path("my data.jsonl"), Path("more.jsonl")),
        packed=False, updates=7, task=("bridge", "deep"), evaluate_on=(),
        learning_rate=3e-5,
    )  # fmt: skip
    words = shlex.split(shlex.join(flags_of(config)))
    assert command.parse(TrainConfig, "", words) == replace(config, out=TrainConfig().out)
