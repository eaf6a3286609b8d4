"""Rotary position embedding, halves rotated: (a, b) -> (a cos - b sin, b cos + a sin).

x (T, H, D), position_ids (T,) int -> (T, H, D) as x; angle of pair i is position * theta^(-2i/D).
Numerics: angles and rotation in float32 (float64 for float64), one cast at the store.
Floor: the forward moves 2 * T * H * D * itemsize bytes.
Source: arXiv:2104.09864, in the half-split layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import torch


def rope_reference(x, position_ids, *, theta=10_000.0):
    """The definition."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    inverse_frequency = theta ** (-torch.arange(half, dtype=dtype, device=x.device) / half)
    angle = (position_ids.to(dtype)[:, None] * inverse_frequency)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half].to(dtype), x[..., half:].to(dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope(x: torch.Tensor, position_ids: torch.Tensor, *, theta: float = 10_000.0) -> torch.Tensor:
    """Rotate x (T, H, D) by position_ids (T,); D even. Returns (T, H, D) in x's dtype. Raises ValueError on shapes."""
    if x.shape[-1] % 2 or position_ids.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} must be (T, H, even D), position_ids {tuple(position_ids.shape)} (T,)")
    return rope_reference(x, position_ids, theta=theta)
