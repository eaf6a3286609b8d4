"""Gemma RMSNorm: y = x * rsqrt(mean(x^2) + eps) * (1 + weight), on request y + residual, and the norm of that sum.

x, residual (..., d), weight (d,) -> y (..., d) as x; the kernels save rstd, float32, one a row.
Numerics: all in float32 (float64 for float64), one cast at the store (Gemma's order, not Llama's). The
residual is added to the rounded norm, and the sum rounded again: bitwise what two ops would give. A norm of the
sum reads it rounded; backward the two gradients of the sum are added in float32 and rounded once.
Floor: the forward moves 2 * rows * d * itemsize bytes, the backward 3; with a residual 3 and 3, with the norm of the
sum 4 and 6, where separate ops move 7 and 9.
Source: arXiv:1910.07467; Gemma's (1 + weight) as in google/gemma_pytorch.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from . import _triton, cpu
from ._triton import jit, tl


def rms_norm_reference(x, weight, *, eps=1e-6, residual=None):
    """The definition."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1 + weight.to(dtype))
    return y.to(x.dtype) if residual is None else residual + y.to(x.dtype)


def norm_add_norm_reference(x, weight, residual, next_weight, *, eps=1e-6):
    """The definition."""
    total = rms_norm_reference(x, weight, eps=eps, residual=residual)
    return total, rms_norm_reference(total, next_weight, eps=eps)


@jit()
def _rms_norm_fwd_kernel(
    p_x, p_weight, p_residual, p_y, p_rstd, p_next_weight, p_next_y, p_next_rstd, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    x = tl.load(p_x + row * D + i_d, mask=m_d, other=0.0).to(tl.float32)
    weight = tl.load(p_weight + i_d, mask=m_d, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / D + eps)
    y = (x * rstd * (1.0 + weight)).to(p_y.dtype.element_ty)
    if p_residual is not None:
        y = (y.to(tl.float32) + tl.load(p_residual + row * D + i_d, mask=m_d, other=0.0).to(tl.float32)).to(y.dtype)
    tl.store(p_y + row * D + i_d, y, mask=m_d)
    tl.store(p_rstd + row, rstd)
    if p_next_weight is not None:
        x = y.to(tl.float32)  # zeros beyond D, as all before it
        weight = tl.load(p_next_weight + i_d, mask=m_d, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x) / D + eps)
        tl.store(p_next_y + row * D + i_d, (x * rstd * (1.0 + weight)).to(y.dtype), mask=m_d)
        tl.store(p_next_rstd + row, rstd)


@jit(do_not_specialize=["num_rows"])
def _rms_norm_bwd_kernel(
    p_dy, p_x, p_weight, p_rstd, p_dx, p_d_weight,
    p_next_dy, p_next_x, p_next_weight, p_next_rstd, p_d_residual, p_d_next_weight, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th row, and leaves one partial sum of d_weight."""
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    weight = 1.0 + tl.load(p_weight + i_d, mask=m_d, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    if p_next_weight is not None:
        next_weight = 1.0 + tl.load(p_next_weight + i_d, mask=m_d, other=0.0).to(tl.float32)
        d_next_weight = tl.zeros([BLOCK_D], tl.float32)
    for i_row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(i_row, tl.int64)
        dy = tl.load(p_dy + row * D + i_d, mask=m_d, other=0.0).to(tl.float32)
        if p_next_weight is not None:
            rstd = tl.load(p_next_rstd + row)
            normed = tl.load(p_next_x + row * D + i_d, mask=m_d, other=0.0).to(tl.float32) * rstd
            next_dy = tl.load(p_next_dy + row * D + i_d, mask=m_d, other=0.0).to(tl.float32)
            d_next_weight += next_dy * normed
            d_normed = next_dy * next_weight
            dy += rstd * (d_normed - normed * (tl.sum(d_normed * normed) / D))
            tl.store(p_d_residual + row * D + i_d, dy.to(p_d_residual.dtype.element_ty), mask=m_d)
        rstd = tl.load(p_rstd + row)
        normed = tl.load(p_x + row * D + i_d, mask=m_d, other=0.0).to(tl.float32) * rstd
        d_weight += dy * normed
        d_normed = dy * weight
        dx = rstd * (d_normed - normed * (tl.sum(d_normed * normed) / D))
        tl.store(p_dx + row * D + i_d, dx.to(p_dx.dtype.element_ty), mask=m_d)
    o_part = tl.program_id(0).to(tl.int64) * D
    tl.store(p_d_weight + o_part + i_d, d_weight, mask=m_d)
    if p_next_weight is not None:
        tl.store(p_d_next_weight + o_part + i_d, d_next_weight, mask=m_d)


def _launch_settings(d):
    block = 1 << (d - 1).bit_length()
    return {
        "D": d,
        "BLOCK_D": block,
        "num_warps": min(8, max(1, block // 256)),
    }  # 8 elements a thread, or more


def _rms_norm_fwd(x, weight, residual, eps, next_weight=None):
    """(y, rstd), and with next_weight those of the norm of y."""
    num_rows, d = x.shape
    y, rstd = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    p = {"p_x": x, "p_weight": weight, "p_residual": residual, "p_y": y, "p_rstd": rstd}
    following = (torch.empty_like(y), torch.empty_like(rstd)) if next_weight is not None else (None, None)
    p |= {"p_next_weight": next_weight, "p_next_y": following[0], "p_next_rstd": following[1]}
    _rms_norm_fwd_kernel[(num_rows,)](**p, eps=eps, **_launch_settings(d))
    return (y, rstd) if next_weight is None else (y, rstd, *following)


def _rms_norm_bwd(dy, x, weight, rstd, following=None):
    """(dx, d_weight); with following (next_dy, next_x, next_weight, next_rstd), (dx, d_weight, d_residual,
    d_next_weight).
    """
    num_rows, d = x.shape
    num_programs = min(num_rows, 4 * _triton.num_processors(x.device))
    num_weights = 1 if following is None else 2
    dx = torch.empty_like(x)
    parts = torch.empty(num_weights, num_programs, d, dtype=torch.float32, device=x.device)
    p = {"p_dy": dy, "p_x": x, "p_weight": weight, "p_rstd": rstd, "p_dx": dx, "p_d_weight": parts[0]}
    d_residual = None if following is None else torch.empty_like(x)
    names = ("p_next_dy", "p_next_x", "p_next_weight", "p_next_rstd")
    p |= dict(zip(names, following or [None] * 4, strict=True))
    p |= {"p_d_residual": d_residual, "p_d_next_weight": None if following is None else parts[1]}
    _rms_norm_bwd_kernel[(num_programs,)](**p, num_rows=num_rows, **_launch_settings(d))
    d_weights = parts.sum(1).to(weight.dtype)
    return (dx, d_weights[0]) if following is None else (dx, d_weights[0], d_residual, d_weights[1])


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, eps):
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        residual = None if residual is None else residual.reshape(rows.shape).contiguous()
        y, rstd = _rms_norm_fwd(rows, weight.contiguous(), residual, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        rows, weight, rstd = ctx.saved_tensors
        dx, d_weight = _rms_norm_bwd(dy.reshape(rows.shape).contiguous(), rows, weight.contiguous(), rstd)
        return dx.view(dy.shape), d_weight, dy if ctx.needs_input_grad[2] else None, None


class _NormAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, next_weight, eps):
        rows, residual = (one.reshape(-1, x.shape[-1]).contiguous() for one in (x, residual))
        weights = weight.contiguous(), next_weight.contiguous()
        total, rstd, normed, next_rstd = _rms_norm_fwd(rows, weights[0], residual, eps, weights[1])
        total, normed = total.view(x.shape), normed.view(x.shape)
        ctx.save_for_backward(rows, weights[0], rstd, total, weights[1], next_rstd)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, d_normed):
        rows, weight, rstd, total, next_weight, next_rstd = ctx.saved_tensors
        d_total, d_normed = (dy.reshape(rows.shape).contiguous() for dy in (d_total, d_normed))
        following = d_normed, total, next_weight, next_rstd
        dx, d_weight, d_residual, d_next_weight = _rms_norm_bwd(d_total, rows, weight, rstd, following)
        return dx.view(total.shape), d_weight, d_residual.view(total.shape), d_next_weight, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm over the last dimension: x (..., d), weight (d,) -> (..., d) in x's dtype.

    With residual (..., d), in x's dtype: residual + the norm. Raises ValueError on what does not fit.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual {tuple(residual.shape)} {residual.dtype} must be as x {tuple(x.shape)} {x.dtype}")
    if _triton.takes(x) and _triton.takes(weight) and x.numel():
        with _triton.on_device(x):
            return _RMSNorm.apply(x, weight, residual, eps)
    if cpu.supports_pointwise(x, weight):
        y = cpu.rms_norm(x, weight, eps=eps)
        return y if residual is None else residual + y
    return rms_norm_reference(x, weight, eps=eps, residual=residual)


def norm_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    next_weight: torch.Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual + the norm of x by weight, the norm of that sum by next_weight), one pass over memory on a GPU.

    x and residual (..., d) of one dtype, weights (d,) -> (..., d) each, as x. Raises ValueError on what does not fit.
    """
    if next_weight.shape != weight.shape:
        raise ValueError(f"next_weight {tuple(next_weight.shape)} must be as weight {tuple(weight.shape)}")
    fits = weight.shape == x.shape[-1:] and residual.shape == x.shape and residual.dtype == x.dtype
    if fits and _triton.takes(x) and _triton.takes(weight, next_weight) and x.numel():
        with _triton.on_device(x):
            return _NormAddNorm.apply(x, weight, residual, next_weight, eps)
    total = rms_norm(x, weight, eps=eps, residual=residual)
    return total, rms_norm(total, next_weight, eps=eps)
