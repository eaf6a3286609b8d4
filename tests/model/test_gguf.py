"""llama.cpp takes what is exported: every name is one it knows, and its converter makes the same weights of it.

The converter is no package: it comes with llama.cpp's source, and with the sdist of llama-cpp-python on PyPI
(`vendor/llama.cpp`). `LLAMA_CPP=FOLDER pytest tests/model/test_gguf.py` names its folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swirl import Gemma, GemmaConfig
from swirl.model.config import GEMMA3
from swirl.model.tokenizer import Tokenizer, train_tokenizer

gguf = pytest.importorskip("gguf")
LLAMA_CPP = os.environ.get("LLAMA_CPP", "")
SIZES = dict(
    vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip
CONFIGS = {
    "gemma2": GemmaConfig(**SIZES, query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": GemmaConfig(**GEMMA3 | SIZES, query_pre_attn_scalar=32, sliding_window=16),
}


def exported(config, folder, tokenizer):
    with torch.no_grad():
        Gemma(config).init_weights(0).save_pretrained(folder, tokenizer)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_a_name_in_gguf(name, tmp_path):
    tensors = exported(CONFIGS[name], tmp_path / "model", train_tokenizer(["one two"], 280))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], CONFIGS[name].num_hidden_layers)
    found = {tensor: names.get_name(tensor, try_suffixes=(".weight",)) for tensor in tensors}
    assert all(found.values()) and len(set(found.values())) == len(found), found


def sentencepiece_model() -> bytes:
    """Gemma's kind of tokenizer.model, of 600 pieces; the texts are those that Almanac's tokenizer learned from."""
    import io

    sentencepiece = pytest.importorskip("sentencepiece")
    made, text = io.BytesIO(), (Path(__file__).parents[2] / "docs" / "structure.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=600, hard_vocab_limit=False, byte_fallback=True,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
        minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(not LLAMA_CPP, reason="$LLAMA_CPP names no folder with convert_hf_to_gguf.py")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_converter_of_llama_cpp_makes_the_same_weights(name, tmp_path):
    plain = train_tokenizer(["one two"], 280)
    plain.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model").write_bytes(sentencepiece_model())
    tensors = exported(CONFIGS[name], tmp_path / "model", Tokenizer.from_pretrained(tmp_path / "base"))
    words = [sys.executable, f"{LLAMA_CPP}/convert_hf_to_gguf.py", "--outtype", "f32", "--outfile", "out.gguf", "model"]
    path = os.pathsep.join([f"{LLAMA_CPP}/gguf-py", LLAMA_CPP])
    done = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], CONFIGS[name].num_hidden_layers)
    read = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert len(read) == len(tensors)
    for tensor, value in tensors.items():
        theirs = read[names.get_name(tensor, try_suffixes=(".weight",))].reshape(-1)
        shift = 1.0 if tensor.endswith("norm.weight") else 0.0  # llama.cpp stores 1 + w
        assert torch.equal(theirs[: value.numel()], (value + shift).reshape(-1)), tensor
