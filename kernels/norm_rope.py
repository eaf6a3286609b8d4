"""RMSNorm of every head, then rotary position embedding, in one pass: what Gemma 3 does to queries and keys.

x (T, H, D), weight (D,), position_ids (T,) int -> (T, H, D) as x: rope(rms_norm(x, weight)).
Numerics: norm, angles and rotation in float32 (float64 for float64), one cast at the store; two ops would round
between. The backward reads x again and saves nothing else.
Floor: the forward moves 2 * T * H * D * itemsize bytes, the backward 3; two ops move twice that and 5.
Source: Gemma 3 (arXiv:2503.19786); the parts are those of rms_norm.py and rope.py.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import _triton, cpu
from ._triton import jit, tl
from .rms_norm import rms_norm_reference
from .rope import cos_and_sin, inverse_frequency, rope_reference, rotated


def norm_rope_reference(x, weight, position_ids, *, theta=10_000.0, factor=1.0, eps=1e-6):
    """The definition."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = rms_norm_reference(x.to(dtype), weight.to(dtype), eps=eps)
    return rope_reference(normed, position_ids, theta=theta, factor=factor).to(x.dtype)


@jit()
def _halves(p_x, token, H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """All heads of one token, (BLOCK_H, BLOCK_HALF) each half in float32, zeros beyond."""
    i_half, i_h = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_H)
    m = (i_h < H)[:, None] & (i_half < HALF)[None, :]
    p_x += token * (2 * H * HALF) + i_h[:, None] * (2 * HALF) + i_half[None, :]
    return tl.load(p_x, mask=m, other=0.0).to(tl.float32), tl.load(p_x + HALF, mask=m, other=0.0).to(tl.float32)


@jit()
def _store_halves(
    p_y, token, a, b, H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr
):  # fmt: skip
    i_half, i_h = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_H)
    m = (i_h < H)[:, None] & (i_half < HALF)[None, :]
    p_y += token * (2 * H * HALF) + i_h[:, None] * (2 * HALF) + i_half[None, :]
    tl.store(p_y, a.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_y + HALF, b.to(p_y.dtype.element_ty), mask=m)


@jit()
def _gains(p_weight, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    i_half = tl.arange(0, BLOCK_HALF)
    m = i_half < HALF
    a = tl.load(p_weight + i_half, mask=m, other=0.0).to(tl.float32)
    b = tl.load(p_weight + HALF + i_half, mask=m, other=0.0).to(tl.float32)
    return 1.0 + a[None, :], 1.0 + b[None, :]


@jit()
def _turn(p_position, p_inverse_frequency, token, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    i_half = tl.arange(0, BLOCK_HALF)
    frequency = tl.load(p_inverse_frequency + i_half, mask=i_half < HALF, other=0.0)
    angle = tl.load(p_position + token).to(tl.float32) * frequency
    return tl.cos(angle)[None, :], tl.sin(angle)[None, :]


@jit()
def _norm_rope_fwd_kernel(
    p_x, p_weight, p_position, p_inverse_frequency, p_y, eps,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token, all its heads: their angles are the same."""
    token = tl.program_id(0).to(tl.int64)
    a, b = _halves(p_x, token, H, HALF, BLOCK_H, BLOCK_HALF)
    gain_a, gain_b = _gains(p_weight, HALF, BLOCK_HALF)
    cos, sin = _turn(p_position, p_inverse_frequency, token, HALF, BLOCK_HALF)
    rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
    a, b = a * rstd * gain_a, b * rstd * gain_b
    _store_halves(p_y, token, a * cos - b * sin, b * cos + a * sin, H, HALF, BLOCK_H, BLOCK_HALF)


@jit(do_not_specialize=["T"])
def _norm_rope_bwd_kernel(
    p_dy, p_x, p_weight, p_position, p_inverse_frequency, p_dx, p_d_weight, T, eps,
    H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th token, and leaves one partial sum of d_weight."""
    gain_a, gain_b = _gains(p_weight, HALF, BLOCK_HALF)
    d_weight_a, d_weight_b = tl.zeros([BLOCK_HALF], tl.float32), tl.zeros([BLOCK_HALF], tl.float32)
    for i_token in range(tl.program_id(0), T, tl.num_programs(0)):
        token = tl.cast(i_token, tl.int64)
        a, b = _halves(p_x, token, H, HALF, BLOCK_H, BLOCK_HALF)
        da, db = _halves(p_dy, token, H, HALF, BLOCK_H, BLOCK_HALF)
        cos, sin = _turn(p_position, p_inverse_frequency, token, HALF, BLOCK_HALF)
        da, db = da * cos + db * sin, db * cos - da * sin  # turned back
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * HALF) + eps)[:, None]
        a, b = a * rstd, b * rstd
        d_weight_a += tl.sum(da * a, 0)
        d_weight_b += tl.sum(db * b, 0)
        da, db = da * gain_a, db * gain_b
        along = (tl.sum(da * a + db * b, 1) / (2 * HALF))[:, None]
        _store_halves(p_dx, token, rstd * (da - a * along), rstd * (db - b * along), H, HALF, BLOCK_H, BLOCK_HALF)
    i_half = tl.arange(0, BLOCK_HALF)
    p_d_weight += tl.program_id(0).to(tl.int64) * (2 * HALF) + i_half
    tl.store(p_d_weight, d_weight_a, mask=i_half < HALF)
    tl.store(p_d_weight + HALF, d_weight_b, mask=i_half < HALF)


def _launch_settings(x):
    _, H, D = x.shape
    return {
        "H": H,
        "HALF": D // 2,
        "BLOCK_H": 1 << (H - 1).bit_length(),
        "BLOCK_HALF": 1 << (D // 2 - 1).bit_length(),
        "num_warps": 4 if H * D > 512 else 1,  # four elements a thread, or more
    }


def _norm_rope_fwd(x, weight, position_ids, frequency, eps):
    y = torch.empty_like(x)
    p = {"p_x": x, "p_weight": weight, "p_position": position_ids, "p_inverse_frequency": frequency, "p_y": y}
    _norm_rope_fwd_kernel[(x.shape[0],)](**p, eps=eps, **_launch_settings(x))
    return y


def _norm_rope_bwd(dy, x, weight, position_ids, frequency, eps):
    T, num_programs = x.shape[0], min(x.shape[0], 4 * _triton.num_processors(x.device))
    dx = torch.empty_like(x)
    d_weight = torch.empty(num_programs, x.shape[2], dtype=torch.float32, device=x.device)
    p = {"p_dy": dy, "p_x": x, "p_weight": weight, "p_position": position_ids, "p_inverse_frequency": frequency}
    settings = _launch_settings(x)
    _norm_rope_bwd_kernel[(num_programs,)](**p, p_dx=dx, p_d_weight=d_weight, T=T, eps=eps, **settings)
    return dx, d_weight.sum(0).to(weight.dtype)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, position_ids, theta, factor, eps):
        x, weight = x.contiguous(), weight.contiguous()
        frequency = inverse_frequency(x.shape[-1] // 2, theta, factor, torch.float32, x.device)
        ctx.save_for_backward(x, weight, position_ids, frequency)
        ctx.eps = eps
        return _norm_rope_fwd(x, weight, position_ids, frequency, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *_norm_rope_bwd(dy.contiguous(), *ctx.saved_tensors, ctx.eps), None, None, None, None


def norm_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    theta: float = 10_000.0,
    factor: float = 1.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """RMSNorm of x (T, H, D), D even, by weight (D,), then rotation by position_ids (T,) / factor: as x.

    Differentiable in x and weight. Raises ValueError on shapes.
    """
    if x.shape[-1] % 2 or position_ids.shape != x.shape[:1] or weight.shape != x.shape[-1:]:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and position_ids {tuple(position_ids.shape)}"
        raise ValueError(f"{shapes} do not fit (T, H, even D), (D,), (T,)")
    if _triton.takes(x, weight) and x.numel():
        with _triton.on_device(x):
            return _NormRope.apply(x, weight, position_ids.contiguous(), theta, factor, eps)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos_and_sin(position_ids, x.shape[-1] // 2, theta, factor, dtype)
    if x.shape[-1] % 32 == 0 and cpu.supports_pointwise(x, weight):
        return cpu.norm_rope(x, weight, cos, sin, eps=eps)
    normed = rms_norm_reference(x.to(dtype), weight.to(dtype), eps=eps)
    return rotated(normed, cos, sin).to(x.dtype)
