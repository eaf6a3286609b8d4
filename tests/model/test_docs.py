"""docs/models.md says what the presets come to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swirl import Gemma
from swirl.model.config import PRESETS

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


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


if __name__ == "__main__":
    for table in zip(*map(rows, PRESETS), strict=True):
        print("\n".join(table), end="\n\n")
