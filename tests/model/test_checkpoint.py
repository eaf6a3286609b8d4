"""Model folders: what is read is what was written, and every fault is one line that leaves all as it was."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2ForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from swirl import Gemma, GemmaConfig, pack
from swirl.errors import CheckpointError
from swirl.model import checkpoint
from swirl.model.tokenizer import Tokenizer, train_tokenizer

CONFIG = GemmaConfig(300, 16, 24, 2, 2, 1, head_dim=8, sliding_window=5)
NAME = "model.layers.1.self_attn.q_proj.weight"


def gemma(seed=0):
    return Gemma(CONFIG).init_weights(seed)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folder(tmp_path):
    """As others write one: without digests."""
    gemma().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "digests.json").unlink()
    return tmp_path / "model"


@pytest.fixture
def tokenizer():
    return train_tokenizer(["one two three"], 280)


def refusal(folder, **options):
    with pytest.raises(CheckpointError) as caught:
        Gemma.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_round_trip_and_types(folder):
    model = Gemma.from_pretrained(folder)
    assert same(model, gemma()) and model.config == CONFIG
    assert all(parameter.requires_grad for parameter in model.parameters())
    half = Gemma.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert same(Gemma.from_pretrained(folder), half.float())


def test_weights_do_not_hang_on_the_file(folder):
    model = Gemma.from_pretrained(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\xff" * 1000)
    assert same(model, gemma())


def test_shards_are_written_with_an_index_and_read_by_both(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    gemma(1).save_pretrained(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert not (folder / "model.safetensors").exists()
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in gemma().parameters())
    assert same(Gemma.from_pretrained(folder), gemma(1))
    theirs = Gemma2ForCausalLM.from_pretrained(folder).state_dict()
    assert torch.equal(theirs[NAME], gemma(1).state_dict()[NAME])
    monkeypatch.undo()
    gemma(2).save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["config.json", "digests.json", "generation_config.json", "model.safetensors"]


def test_damage_to_what_swirl_wrote_is_told(tmp_path, tokenizer):
    folder = tmp_path / "model"
    gemma().save_pretrained(folder, tokenizer=tokenizer)
    names = [name for name in os.listdir(folder) if name != "generation_config.json"]  # others' to read
    assert {"config.json", "tokenizer.json", "model.safetensors", "digests.json"} <= set(names)
    for name in names:
        content = (folder / name).read_bytes()
        at = len(content) * 2 // 3
        (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=f"model: {name}") as caught:
            Gemma.from_pretrained(folder)
            Tokenizer.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(content)
    assert same(Gemma.from_pretrained(folder), gemma())


def test_an_index_names_files_of_its_folder_alone(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    for name in ("../outside.safetensors", str(outside), "a/b"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: name}}))
        assert "field 'weight_map': expected names of files" in refusal(folder)
    os.mkfifo(folder / "pipe")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: "pipe"}}))
    assert "pipe: expected a file" in refusal(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "config.json: expected a file" in refusal(folder)


def test_a_shard_of_their_writing(folder):
    Gemma2ForCausalLM.from_pretrained(folder).save_pretrained(folder.parent / "theirs", max_shard_size="20KB")
    assert (folder.parent / "theirs" / "model.safetensors.index.json").exists()
    assert same(Gemma.from_pretrained(folder.parent / "theirs"), gemma())


SEES = dict(
    text_config=dict(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=7,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=5,
    ),
    vision_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=4, patch_size=2
    ),
    mm_tokens_per_image=4,
    image_token_index=299,
)


@pytest.fixture
def seeing(tmp_path):
    """A folder of transformers' Gemma 3 with a vision tower."""
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(Gemma3Config(**SEES)).save_pretrained(tmp_path / "seeing")
    return tmp_path / "seeing"


def all_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_vision_tower_is_left_alone_and_kept(seeing, tmp_path, prefix):
    """Under the names of either spelling, through a second reading and writing, and in the folder itself."""
    their_prefix = next(name for name in all_tensors(seeing) if name.endswith("embed_tokens.weight"))[:-19]
    renamed = {name.replace(their_prefix, prefix): tensor for name, tensor in all_tensors(seeing).items()}
    save_file(renamed, seeing / "model.safetensors", metadata={"format": "pt"})
    (seeing / "preprocessor_config.json").write_text('{"size": 4}')
    model = Gemma.from_pretrained(seeing)
    assert model.config.qk_norm and not [name for name in model.state_dict() if "vision" in name]
    model.save_pretrained(tmp_path / "once")
    again = Gemma.from_pretrained(tmp_path / "once")
    with torch.no_grad():
        again.model.norm.weight += 1
    again.save_pretrained(tmp_path / "once")
    kept = all_tensors(tmp_path / "once")
    assert kept.keys() == renamed.keys()
    for name, tensor in renamed.items():
        assert torch.equal(kept[name], tensor + 1 if name == f"{prefix}norm.weight" else tensor), name
    assert (tmp_path / "once" / "preprocessor_config.json").read_text() == '{"size": 4}'
    theirs = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "once")
    assert torch.equal(theirs.model.language_model.norm.weight, again.model.norm.weight)
    assert torch.equal(theirs.model.multi_modal_projector.mm_soft_emb_norm.weight, torch.zeros(8))
    ids = torch.arange(5, 40)
    truth = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    ours = again.token_log_probs(pack([([5], list(range(6, 40)))]))
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


def test_a_vision_tower_that_is_gone_is_said_and_nothing_is_written(seeing, tmp_path):
    model = Gemma.from_pretrained(seeing)
    kept = {name: tensor for name, tensor in all_tensors(seeing).items() if "vision" not in name}
    save_file(kept, seeing / "model.safetensors")
    with pytest.raises(CheckpointError, match="seeing: tensor '.*vision_tower.*' is gone") as caught:
        model.save_pretrained(tmp_path / "out")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["seeing"]


def test_missing_pieces(folder, tmp_path):
    assert "no such model folder" in refusal(tmp_path / "nowhere")
    (folder / "config.json").rename(folder / "aside")
    assert "config.json: cannot be read (No such file or directory)" in refusal(folder)
    (folder / "aside").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in refusal(folder)


def test_missing_shard_and_broken_index(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    gemma().save_pretrained(folder)
    (folder / "digests.json").unlink()
    next(folder.glob("model-00002*")).unlink()
    assert "model-00002" in refusal(folder) and "no such file" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "field 'weight_map'" in refusal(folder)


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_truncated_weights(folder, size):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    assert "model.safetensors: truncated, or not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\xff"])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json: expected" in refusal(folder)


def test_tensors_that_do_not_fit(folder):
    rewrite(folder, lambda tensors: tensors.pop(NAME))
    assert f"tensor '{NAME}' is missing" in refusal(folder)
    rewrite(folder, lambda tensors: tensors.update({NAME: torch.zeros(16, 17)}))
    assert f"tensor '{NAME}': expected shape (16, 16), got (16, 17)" in refusal(folder)
    rewrite(folder, lambda tensors: tensors.update({NAME: torch.zeros(16, 16, dtype=torch.int32)}))
    assert f"tensor '{NAME}': expected floats, got torch.int32" in refusal(folder)
    rewrite(folder, lambda tensors: tensors.update({NAME: torch.zeros(16, 16), "a.bias": torch.zeros(1)}))
    assert "tensor 'a.bias' is not part of this model" in refusal(folder)


def test_a_repeated_head_must_be_the_embedding(folder):
    embedding = gemma().state_dict()["model.embed_tokens.weight"]
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert same(Gemma.from_pretrained(folder), gemma())
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    assert "untied head" in refusal(folder)


def test_a_save_that_fails_leaves_the_old_folder(folder, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written .*No space left"):
        gemma(1).save_pretrained(folder)
    assert same(Gemma.from_pretrained(folder), gemma(0)) and os.listdir(folder.parent) == ["model"]
    monkeypatch.undo()
    gemma(1).save_pretrained(folder)
    assert same(Gemma.from_pretrained(folder), gemma(1))
    assert os.listdir(folder.parent) == ["model"]


def test_saving_spares_other_files_and_other_folders(folder, tmp_path):
    (folder / "README.md").write_text("card")
    gemma(1).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "card"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    for path in (tmp_path / "home", tmp_path / "home" / "thesis.txt"):
        with pytest.raises(CheckpointError):
            gemma().save_pretrained(path)
    assert os.listdir(tmp_path / "home") == ["thesis.txt"]
    gemma().save_pretrained(tmp_path / "deep" / "er")
    assert same(Gemma.from_pretrained(tmp_path / "deep" / "er"), gemma())


def test_an_interrupted_save_is_pointed_at(folder):
    folder.rename(folder.parent / ".model.old")
    assert "an interrupted save left" in refusal(folder)


def test_a_link_keeps_pointing(folder, tmp_path):
    (tmp_path / "latest").symlink_to(folder)
    gemma(1).save_pretrained(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and same(Gemma.from_pretrained(folder), gemma(1))


def test_the_tokenizer_travels_and_must_fit(folder, tokenizer):
    gemma().save_pretrained(folder, tokenizer)
    assert (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.eos_id, tokenizer.end_of_turn_id]
    checkpoint.check_tokenizer_fits(tokenizer, tokenizer.vocab_size, folder)
    with pytest.raises(CheckpointError, match=f"ids go to {tokenizer.vocab_size - 1}"):
        checkpoint.check_tokenizer_fits(tokenizer, tokenizer.vocab_size - 1, folder)
    small = Gemma(GemmaConfig(200, 16, 24, 2, 2, 1, head_dim=8))
    with pytest.raises(CheckpointError, match="vocabulary is 200"):
        small.save_pretrained(folder, tokenizer)
    assert same(Gemma.from_pretrained(folder), gemma())


def test_what_the_base_says_beside_its_weights_is_kept(folder, tokenizer, tmp_path):
    """Fields that swirl does not know, the chat template, SentencePiece's file, how the base is sampled from."""
    gemma().save_pretrained(folder, tokenizer)
    (folder / "digests.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"unknown_field": {"a": [1]}, "cache_implementation": "x"}))
    said = {"top_k": 64, "top_p": 0.95, "eos_token_id": [1, 9], "unheard_of": True, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(said))
    texts = {
        "tokenizer.model": b"\x00sentencepiece", "chat_template.jinja": b"{{ messages | trim }}",
        "special_tokens_map.json": b'{"bos_token": "<bos>"}', "added_tokens.json": b"{}",
    }  # fmt: skip
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    model, given = Gemma.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    for target, with_tokenizer in ((tmp_path / "with", given), (tmp_path / "without", None)):
        model.save_pretrained(target, with_tokenizer)
        for name in (*texts, "tokenizer.json", "tokenizer_config.json"):
            assert (target / name).read_bytes() == (folder / name).read_bytes(), name
        config = json.loads((target / "config.json").read_text())
        assert config["unknown_field"] == {"a": [1]} and config["cache_implementation"] == "x"
        generation = json.loads((target / "generation_config.json").read_text())
        ends = {1, 9} | (set(given.stop_ids) if with_tokenizer else set())
        assert set(generation.pop("eos_token_id")) == ends
        assert {name: value for name, value in said.items() if name != "eos_token_id"}.items() <= generation.items()


def test_a_base_that_is_greedy_stays_so(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    Gemma.from_pretrained(folder).save_pretrained(tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["do_sample"] is False and "top_k" not in generation
