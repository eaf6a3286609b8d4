"""docs/models.md and docs/memory.md say what the presets come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swirl import Gemma
from swirl.model.config import PRESETS
from swirl.model.lora import LoRA, add_lora

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
MEMORY = DOCS.with_name("memory.md")


def rows(name):
    """The rows of the two tables that are computed from a preset: its shape, and gigabytes (10^9 bytes)."""
    config = PRESETS[name]
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Gemma(config).parameters())
    assert weights == config.num_weights
    heads = f"{config.num_attention_heads} / {config.num_key_value_heads} × {config.head_dim}"
    windowed = sum(config.window(layer) is not None for layer in range(config.num_hidden_layers))
    layers = f"{config.num_hidden_layers} ({windowed} of {config.sliding_window})"
    widths = f"{config.hidden_size} / {config.intermediate_size}"
    shape = f"| {name} | {weights / 1e9:.2f} | {layers} | {widths} | {heads} | {config.vocab_size:,} |"
    cache = 2 * config.num_key_value_heads * config.head_dim * 2
    context = cache * sum(
        min(config.window(layer) or 8192, 8192) for layer in range(config.num_hidden_layers)
    )  # where layers keep their window alone
    kept = cache * config.num_hidden_layers
    kilobytes = f"{kept / 1024:.0f}"
    boundaries = config.num_hidden_layers * config.hidden_size * 2 * 8192
    memory = f"| {name} | {2 * weights / 1e9:.1f} | {16 * weights / 1e9:.1f} | {18 * weights / 1e9:.1f} |"
    return shape, f"{memory} {kilobytes} | {context / 1e9:.2f} | {boundaries / 1e9:.2f} |"


@pytest.mark.parametrize("name", PRESETS)
def test_tables_are_computed(name):
    lines = DOCS.read_text().splitlines()
    for row in rows(name):
        assert row in lines


def memory_rows(name):
    """The rows of the two tables of docs/memory.md: gigabytes without activations, kilobytes of activations a token."""
    config = PRESETS[name]
    with torch.device("meta"):
        model = add_lora(Gemma(config), LoRA(16))
    adapters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    modes = [bytes_ * config.num_weights / 1e9 for bytes_ in (16, 18, 12, 6)]
    modes.append((2 * config.num_weights + 16 * adapters) / 1e9)
    held = f"| {name} | {adapters / 1e6:.1f} | " + " | ".join(f"{gigabytes:.1f}" for gigabytes in modes) + " |"
    d, F, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    made_again = 2 * d + F  # by norms and the GeGLU
    layer = 6 * d + 2 * D * heads + 3 * F + (D * heads if config.qk_norm else 0)
    L = config.num_hidden_layers
    kept = [L * layer, L * (layer - made_again), L * d + layer]
    return held, f"| {name} | " + " | ".join(f"{2 * values / 1e3:,.0f}" for values in kept) + " |"


@pytest.mark.parametrize("name", PRESETS)
def test_tables_of_memory_are_computed(name):
    lines = MEMORY.read_text().splitlines()
    for row in memory_rows(name):
        assert row in lines


if __name__ == "__main__":
    for table in zip(*map(rows, PRESETS), strict=True):
        print("\n".join(table), end="\n\n")
    for table in zip(*map(memory_rows, PRESETS), strict=True):
        print("\n".join(table), end="\n\n")
