"""Gemma RMSNorm: y = x * rsqrt(mean(x^2) + eps) * (1 + weight).

x (..., d), weight (d,) -> y (..., d) as x.
Numerics: all in float32 (float64 for float64), one cast at the store (Gemma's order, not Llama's).
Floor: the forward moves 2 * rows * d * itemsize bytes.
Source: arXiv:1910.07467; Gemma's (1 + weight) as in google/gemma_pytorch.
"""

from __future__ import annotations

import torch


def rms_norm_reference(x, weight, *, eps=1e-6):
    """The definition."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + weight.to(dtype))).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm over the last dimension: x (..., d), weight (d,) -> (..., d) in x's dtype. Raises ValueError on shapes."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    return rms_norm_reference(x, weight, eps=eps)
