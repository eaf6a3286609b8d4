"""`benchmarks.memory` on a preset of a few thousand weights, and `benchmarks.precision` on a few updates' data."""

import json

import pytest
import torch

from benchmarks import memory, precision, train_step
from swirl.model.config import PRESETS, GemmaConfig
from swirl.rollout.rollout import with_ids
from tests.learning.updates import CONFIG


@pytest.mark.parametrize("arguments", [["--lora", "2", "--activation-checkpointing", "layers"], ["--dtype", "float32"]])
def test_an_update_is_measured_in_every_mode(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "gemma-2-2b", CONFIG)
    memory.main(
        [*arguments, "--layers", "1", "--tokens", "1500", "--device", "cpu", "--out", str(tmp_path / "r.jsonl")]
    )
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert json.loads(capsys.readouterr().out) == row
    assert row["layers"] == 1 and row["tokens"] == 1500 and row["peak_bytes"] >= row["before_bytes"] > 0


@pytest.mark.parametrize("tokens", [1500, 2800])
def test_the_update_has_exactly_the_tokens_that_were_asked_for(tokens):
    assert memory._packed(memory.update_of(tokens, 64)) == tokens


def test_weights_are_drawn_in_place_in_their_dtype(monkeypatch):
    monkeypatch.setitem(PRESETS, "gemma-2-2b", CONFIG)
    model = train_step.random_model("gemma-2-2b", None, torch.bfloat16, "cpu")
    assert isinstance(model.config, GemmaConfig) and all(w.dtype == torch.bfloat16 for w in model.parameters())
    assert 0.01 < model.model.embed_tokens.weight.float().std() < 0.03
    assert not model.model.norm.weight.any()


def test_what_is_held_out_is_answered_and_not_trained_on(tiny_folder):
    from swirl.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(tiny_folder)
    train, others = precision.demonstrated("train", 3), precision.demonstrated("validation", 3)
    assert not {t.question.question for t in train} & {t.question.question for t in others}
    assert precision.held_out(tiny_folder, [with_ids(t, tokenizer) for t in others]) < -5  # of 512 words, at random


def test_bfloat16_is_held_to_the_spread_of_float32s_seeds():
    found = {"float32": ((0.6, -0.02), (0.7, -0.01)), "bfloat16": ((0.5, -0.015), (0.8, -0.04))}
    rows = [
        {"updates": 9, "dtype": dtype, "seed": seed, "accuracy_bridge": accuracy, "held_out_log_prob": log_prob}
        for dtype, seeds in found.items()
        for seed, (accuracy, log_prob) in enumerate(seeds)
    ]
    accuracy, log_prob = precision.verdicts([*rows, rows[0] | {"job": "default"}])
    name = "imitation, 9 updates, accuracy_bridge"
    assert accuracy == f"{name}: float32 0.6500 (0.6000 to 0.7000), bfloat16 0.6500: within, t +0.0"
    means = "float32 -0.0150 (-0.0200 to -0.0100), bfloat16 -0.0275"
    assert log_prob.endswith(f"{means}: 0.0075 outside, t -0.9")  # -0.0125 over sqrt(0.005^2 + 0.0125^2)
