"""`benchmarks.memory` on a preset of a few thousand weights, and `benchmarks.precision` on a few updates' data."""

import json

import pytest
import torch

from benchmarks import memory, precision
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
    model = memory.random_model("gemma-2-2b", None, torch.bfloat16, "cpu")
    assert isinstance(model.config, GemmaConfig) and all(w.dtype == torch.bfloat16 for w in model.parameters())
    assert 0.01 < model.model.embed_tokens.weight.float().std() < 0.03
    assert not model.model.norm.weight.any()


def test_what_is_held_out_is_answered_and_not_trained_on(tiny_folder):
    from swirl.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(tiny_folder)
    train, others = precision.demonstrated("train", 3), precision.demonstrated("validation", 3)
    assert not {t.question.question for t in train} & {t.question.question for t in others}
    assert precision.held_out(tiny_folder, [with_ids(t, tokenizer) for t in others]) < -5  # of 512 words, at random
