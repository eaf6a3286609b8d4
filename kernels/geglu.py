"""GeGLU with the tanh GELU: y = gelu_tanh(gate) * up.

gate, up (..., F) -> (..., F) as gate.
Numerics: float32 inside (float64 for float64), one cast at the store.
Floor: the forward moves 3 * elements * itemsize bytes.
Source: arXiv:2002.05202; the tanh form as in Gemma's `gelu_pytorch_tanh`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def geglu_reference(gate, up):
    """The definition."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(dtype), approximate="tanh") * up.to(dtype)).to(gate.dtype)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(gate) * up, elementwise, in gate's dtype. Raises ValueError on shapes that differ."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    return geglu_reference(gate, up)
