"""Models by name: the cache as the hub's own library lays it out, without a network; what is not there is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from swirl.app.hub import is_hub_name
from swirl.app.resolve import ALMANAC_BASE, model_folder

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path):
    """HF_HOME with one model in it, as `huggingface_hub` leaves it: blobs, refs and a snapshot of links."""
    repo = tmp_path / "home" / "hub" / "models--google--gemma-tiny-it"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for file in ALMANAC_BASE.iterdir():
        blob = repo / "blobs" / file.name
        blob.symlink_to(file)
        (snapshot / file.name).symlink_to(blob)
    return tmp_path / "home"


def run(code, cwd, **environment):
    words = [sys.executable, "-c", code]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    given = {**clean, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in environment.items()}}
    return subprocess.run(words, cwd=cwd, env=given, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["google/gemma-tiny-it", f"google/gemma-tiny-it@{COMMIT}"])
def test_a_name_is_the_folder_in_the_cache(name, cache, tmp_path):
    code = f"from swirl.app.resolve import model_folder; print(model_folder({name!r}))"
    done = run(code, tmp_path, HF_HOME=cache, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT and (folder / "model.safetensors").read_bytes()[:8]


@pytest.mark.parametrize("name", ["google/gemma-tiny-it", f"google/gemma-tiny-it@{COMMIT}"])
def test_adapters_name_their_base_as_the_hub_does(name, cache, tmp_path):
    code = f"""if True:
        import torch
        from swirl.app.resolve import load_model
        from swirl.model.lora import LoRA, add_lora, save_adapter
        model, _ = load_model({name!r})
        add_lora(model, LoRA(2, 4.0))
        torch.nn.init.ones_(model.model.layers[0].self_attn.o_proj.lora_B)
        save_adapter(model, "adapter")
        merged, _ = load_model("adapter")
        assert merged.origin.hub_name == {name!r}
        base, _ = load_model({name!r})
        weights = [m.model.layers[0].self_attn.o_proj.weight for m in (merged, base)]
        assert not torch.equal(*weights)
    """
    done = run(code, tmp_path, HF_HOME=cache, HF_HUB_OFFLINE=1)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "google/gemma-tiny-it"
    assert content["revision"] == (COMMIT if "@" in name else None)


@pytest.mark.slow  # a command, torch and all: 10 s
def test_a_command_takes_a_name_offline(cache, tmp_path):
    flags = "evaluate --policy google/gemma-tiny-it --task bridge --num-questions 2 --judge none".split()
    code = f"import sys; sys.argv = ['swirl', *{flags!r}]; from swirl.__main__ import main; main()"
    done = run(code, tmp_path, HF_HOME=cache, HF_HUB_OFFLINE=1)
    assert done.returncode == 0 and '"questions":2' in done.stdout, done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"HF_HUB_OFFLINE": 1}, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_ETAG_TIMEOUT": 1}],
    ids=["offline", "no server"],
)
def test_a_name_that_is_nowhere_is_one_line(environment, tmp_path):
    code = """
from swirl.app.resolve import model_folder
from swirl.errors import CheckpointError
try:
    model_folder("nobody/nothing")
except CheckpointError as error:
    print(error)
"""
    done = run(code, tmp_path, HF_HOME=tmp_path / "empty", **environment)
    (said,) = done.stdout.strip().splitlines()
    assert said.startswith("nobody/nothing: no such folder, and not to be had from the Hugging Face hub")


def test_what_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "checkpoint").mkdir(parents=True)
    for spec in ("almanac", "rule", "http://host/v1", "judge.py:judge", "../a/b", "/a/b", "a/b/c", "runs/checkpoint"):
        assert not is_hub_name(spec)
    assert model_folder("runs/checkpoint") == Path("runs/checkpoint")  # a folder comes first
    assert is_hub_name("google/gemma-2-2b-it") and is_hub_name("a/b@refs/pr/1")
