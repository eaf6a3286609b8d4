"""`train --lora`: what the run writes, goes on from, and exports."""

import json
import shutil

import pytest
import torch

from swirl.app.resolve import load_model
from swirl.errors import CheckpointError, ConfigError
from swirl.export import ExportConfig, export
from swirl.model.gemma import Gemma
from swirl.model.lora import load_adapter, merge_lora
from swirl.train import train
from tests.commands.test_train import small, told  # noqa: F401


@pytest.fixture
def run(small):  # noqa: F811
    """A run of four updates of adapters, a checkpoint after each."""
    config = small(told(6), lora=3, lora_alpha=6.0, learning_rate=3e-2, warmup=0, updates=4, save_every=1, keep=9,
                   kl_coefficient=0.1, baseline="mean")  # fmt: skip
    train(config)
    return config


def weights(folder):
    return Gemma.from_pretrained(folder).state_dict()


def test_adapters_and_the_model_they_make_are_written_and_exported(run, tiny_folder, tmp_path):
    base = weights(tiny_folder)
    trained = weights(run.out / "checkpoint")
    assert not any(torch.equal(trained[name], base[name]) == name.endswith("proj.weight") for name in base)
    merged = merge_lora(load_adapter(Gemma.from_pretrained(tiny_folder), run.out / "adapter"))
    assert all(torch.equal(weight, trained[name]) for name, weight in merged.state_dict().items())
    # a checkpoint of the run is the adapters and their optimizer's state, and a folder that PEFT loads
    names = {path.name for path in (run.out / "checkpoint-4").iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "training.safetensors", "training.json", "digests.json"
    }  # fmt: skip
    assert json.loads((run.out / "adapter" / "adapter_config.json").read_text())["r"] == 3
    export(ExportConfig(run=run.out, out=tmp_path / "last"))
    assert all(torch.equal(weight, trained[name]) for name, weight in weights(tmp_path / "last").items())
    export(ExportConfig(run=run.out, out=tmp_path / "second", update=2))
    loaded, _ = load_model(str(run.out / "checkpoint-2"))
    second = weights(tmp_path / "second")
    assert all(torch.equal(weight, second[name]) for name, weight in loaded.state_dict().items())
    assert not all(torch.equal(weight, trained[name]) for name, weight in second.items())
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_a_run_goes_on_from_its_adapters_to_the_bit(run, small):  # noqa: F811
    whole = weights(run.out / "checkpoint")
    for name in ("checkpoint", "adapter", "checkpoint-3", "checkpoint-4"):
        shutil.rmtree(run.out / name)
    train(small(data=told(6), lora=3, lora_alpha=6.0, learning_rate=3e-2, warmup=0, updates=4, save_every=1, keep=9,
                kl_coefficient=0.1, baseline="mean", resume="auto"))  # fmt: skip
    assert all(torch.equal(weight, whole[name]) for name, weight in weights(run.out / "checkpoint").items())


def test_another_base_is_no_base_and_adapters_of_adapters_are_merged_first(small, tiny_folder, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    config = small(told(4), model=str(base), lora=2, updates=1)
    train(config)
    with pytest.raises(ConfigError, match="--lora 2: --model .* holds adapters already"):
        train(small(told(4), model=str(config.out / "adapter"), out=tmp_path / "again", lora=2))
    Gemma(Gemma.from_pretrained(base).config).init_weights(7).save_pretrained(base)
    with pytest.raises(CheckpointError, match="base: is another model than the one that .*checkpoint-1 was trained on"):
        export(ExportConfig(run=config.out, out=tmp_path / "wrong"))
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="adapters of .*base, which is no folder here and no name on the hub"):
        load_model(str(config.out / "adapter"))
