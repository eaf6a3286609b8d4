"""LoRA: every linear layer of a model frozen, and beside it a trained product of two thin matrices.

y = x W^T + s (x A^T) B^T, with W (out, in) frozen, A (r, in) drawn, B (out, r) zero at first, s = alpha / r. So a new
adapter changes nothing, and a model with its adapters off is the model that it began as: the reference of a KL needs no
second copy of the weights. A and B are float32, as an optimizer wants them, and round to the dtype of x in a product.
Files are those of PEFT: adapter_config.json, and adapter_model.safetensors with the names PEFT gives.
Source: LoRA (arXiv:2106.09685); A uniform in +-1/sqrt(in), as in PEFT; on every layer, as in Thinking Machines, "LoRA
Without Regret", 2025.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from swirl.errors import CheckpointError
from swirl.kernels.linear import linear
from swirl.model.checkpoint import PREFIXES, read_json, replace_folder, require_digests
from swirl.model.gemma import Gemma, Linear
from swirl.model.tensor_file import own_rows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_MODEL = "base_model.model."  # what PEFT wraps a model in
_VISION_PREFIX = PREFIXES[2]  # where transformers keeps the text model of a Gemma 3 that sees
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What else an adapter_config.json may ask for that changes the computation, and the only value computed here.
_FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "trainable_token_indices": None,
}
# How A and B may have begun; with any other, such as "pissa", PEFT changes the base's weights as it loads them, too.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
# The fields that change nothing once there are A and B. Any other that holds something asks for what is not known here.
_OF_NO_EFFECT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
                 "r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules", "exclude_modules",
                 "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
                 "ensure_weight_tying"}  # fmt: skip


@dataclass(frozen=True)
class LoRA:
    """The shape of adapters: `rank` rows in A, and `alpha` / `rank` before the product."""

    rank: int
    alpha: float = 32.0


class LoRALinear(Linear):
    """A frozen Linear with an adapter beside it, which `adapters_off` leaves out.

    A Linear becomes one, and a Linear again, in place: FSDP gathers a weight into the module that it found it in. The
    weight may lie in shards; A and B are whole on every rank.
    """

    @staticmethod
    def adapt(linear: Linear, lora: LoRA) -> LoRALinear:
        """Give it an adapter whose A is not set yet."""
        (rows, columns), device = linear.weight.shape, linear.weight.device
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        linear.__class__ = LoRALinear
        linear.lora_A = nn.Parameter(torch.empty(lora.rank, columns, dtype=dtype, device=device))
        linear.lora_B = nn.Parameter(torch.zeros(rows, lora.rank, dtype=dtype, device=device))
        linear.scale = lora.alpha / lora.rank
        linear.on = True
        return linear

    def merge(self) -> None:
        """Add the adapter to the weight, of a sharded one to this rank's rows, and be without it."""
        rows, first = own_rows(self.weight)
        rows.copy_(self._merged(rows, self.lora_B[first : first + len(rows)]))
        del self.lora_A, self.lora_B, self.scale, self.on
        self.__class__ = Linear

    def forward(self, x):
        y = super().forward(x)
        if not self.on:
            return y
        thin = linear(x, self.lora_A.to(x.dtype))
        return y.add_(linear(thin, self.lora_B.to(x.dtype)), alpha=self.scale)

    def merged(self) -> torch.Tensor:
        return self._merged(self.weight, self.lora_B)

    def _merged(self, rows, lora_B):
        return torch.addmm(rows.to(lora_B.dtype), lora_B, self.lora_A, alpha=self.scale).to(rows.dtype)


def add_lora(model: Gemma, lora: LoRA, *, seed: int = 0) -> Gemma:
    """Freeze every weight, and give every linear layer an adapter; the same `seed` draws the same on every device."""
    model.requires_grad_(False)
    generator = torch.Generator("cpu").manual_seed(seed)
    for layer in _linears(model):
        adapted = LoRALinear.adapt(layer, lora)
        bound = adapted.lora_A.shape[1] ** -0.5
        with torch.no_grad():
            drawn = torch.rand(adapted.lora_A.shape, generator=generator, dtype=torch.float64)
            adapted.lora_A.copy_((2 * drawn - 1) * bound)
    model.lora = lora
    return model


@torch.no_grad()
def merge_lora(model: Gemma) -> Gemma:
    """Add every adapter to its weight, in place, each weight rounded once; what remains is a plain model, frozen."""
    for layer in _linears(model):
        if isinstance(layer, LoRALinear):
            layer.merge()
    model.lora = None
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before its adapters, for as long as the body runs; one that has none is as it is."""
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for module in adapted:
        module.on = False
    try:
        yield
    finally:
        for module in adapted:
            module.on = True


def _linears(model: Gemma) -> list[Linear]:
    """Every linear layer, in the model's order."""
    return [module for module in model.modules() if isinstance(module, Linear)]


def adapter_weights(model: Gemma) -> dict[str, torch.Tensor]:
    """A and B of every layer by PEFT's names, such as base_model.model.model.layers.0.mlp.up_proj.lora_A.weight."""
    sees = model.origin is not None and model.origin.prefix != PREFIXES[0]
    prefix = _PEFT_MODEL + (_VISION_PREFIX if sees else PREFIXES[0])
    return {
        f"{prefix}{name.removeprefix(PREFIXES[0])}.weight": weight.detach()
        for name, weight in model.named_parameters()
        if name.rpartition(".")[2] in ("lora_A", "lora_B")
    }


@torch.no_grad()
def load_adapter_weights(model: Gemma, weights: Mapping[str, torch.Tensor]) -> None:
    """Give a model's adapters A and B by PEFT's names; a layer that they leave out keeps a B of zero.

    Raises ValueError on a name or a shape that the model has no adapter for, and where one of A and B is missing.
    """
    mine = {name: weight for name, weight in model.named_parameters() if name.rpartition(".")[2].startswith("lora_")}
    theirs = {_our_name(name): (name, weight) for name, weight in weights.items()}
    for name, (their_name, weight) in theirs.items():
        if name not in mine:
            raise ValueError(f"tensor '{their_name}' is no adapter of this model")
        if mine[name].shape != weight.shape:
            expected, got = tuple(mine[name].shape), tuple(weight.shape)
            raise ValueError(f"tensor '{their_name}': expected shape {expected}, got {got}")
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in theirs:
            raise ValueError(f"tensor '{their_name}' is there without its lora_{other[-1]}")
    for name, parameter in mine.items():
        if name in theirs:
            parameter.copy_(theirs[name][1])
        elif name.endswith("lora_B"):
            parameter.zero_()


def _our_name(name: str) -> str:
    inner = name.removeprefix(_PEFT_MODEL).removesuffix(".weight")
    prefix = next((prefix for prefix in reversed(PREFIXES) if inner.startswith(prefix)), "")
    return PREFIXES[0] + inner.removeprefix(prefix)


def save_adapter(model: Gemma, path: str | os.PathLike) -> None:
    """Write the adapters of a model as a folder that PEFT loads; aside, then renamed into place.

    Raises CheckpointError where it cannot be written, or where `path` holds something that is no adapter.
    """
    weights = {name: weight.cpu() for name, weight in adapter_weights(model).items()}
    replace_folder(
        path, lambda folder: write_adapter(folder, weights, adapter_config(model)), config=CONFIG, weights=(WEIGHTS,)
    )


def adapter_config(model: Gemma) -> dict:
    """The content of adapter_config.json; the base is the folder that the model was read from, or its name on a hub."""
    sees = model.origin is not None and model.origin.prefix != PREFIXES[0]
    targets = rf".*language_model.*\.({'|'.join(_TARGETS)})" if sees else list(_TARGETS)
    base = None if model.origin is None else str(model.origin.folder)
    revision = None
    if model.origin is not None and model.origin.hub_name:
        base, _, revision = model.origin.hub_name.partition("@")
    return {
        "base_model_name_or_path": base,
        "revision": revision or None,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": targets,
        **_FIXED,
    }


def write_adapter(folder: Path, weights: Mapping[str, torch.Tensor], config: dict) -> None:
    """The two files into an empty folder, without digests or fsync. Raises OSError, SafetensorError."""
    tensors = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it readable by its owner alone
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_name(folder: Path) -> str:
    """What an adapter's folder names as its base: a folder, or `owner/name[@revision]` on a hub.

    Raises CheckpointError where it names nothing.
    """
    content = read_json(folder / CONFIG)
    name, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            folder / CONFIG, f"field 'base_model_name_or_path': expected the base model's folder or name, got {name!r}"
        )
    return f"{name}@{revision}" if revision and not Path(name).is_dir() else name


def read_adapter(folder: str | os.PathLike) -> tuple[LoRA, dict[str, torch.Tensor]]:
    """(shape, weights by PEFT's names) of a folder that PEFT or swirl wrote.

    Raises CheckpointError naming the file: missing, damaged, or an adapter that is not computed here.
    """
    folder = Path(folder)
    content = read_json(folder / CONFIG)
    for name, only in _FIXED.items():
        if content.get(name, only) not in (only, None):
            raise CheckpointError(folder / CONFIG, f"field '{name}': {content[name]!r} is not supported, only {only!r}")
    for name in content.keys() - _FIXED.keys() - _OF_NO_EFFECT:
        if content[name]:
            raise CheckpointError(folder / CONFIG, f"field '{name}': {content[name]!r} is not supported")
    beginning = content.get("init_lora_weights")
    if beginning not in _BEGINNINGS:
        raise CheckpointError(
            folder / CONFIG,
            f"field 'init_lora_weights': {beginning!r} changes the base's weights, which is not supported; PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=…) makes a plain adapter of it",
        )
    rank, alpha = content.get("r"), content.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(folder / CONFIG, f"expected numbers 'r' and 'lora_alpha', got {rank!r} and {alpha!r}")
    require_digests(folder, WEIGHTS)
    try:
        return LoRA(rank, float(alpha)), load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(folder / WEIGHTS, f"cannot be read ({error})") from None


def load_adapter(model: Gemma, folder: str | os.PathLike) -> Gemma:
    """Give a model the adapters of a folder, to be trained on or merged. Raises CheckpointError."""
    lora, weights = read_adapter(folder)
    add_lora(model, lora)
    try:
        load_adapter_weights(model, weights)
    except ValueError as error:
        raise CheckpointError(Path(folder) / WEIGHTS, str(error)) from None
    return model
