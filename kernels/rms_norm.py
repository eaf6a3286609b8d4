"""Gemma RMSNorm: y = x * rsqrt(mean(x^2) + eps) * (1 + weight), and on request y + residual.

x, residual (..., d), weight (d,) -> y (..., d) as x; the kernels save rstd, float32, one a row.
Numerics: all in float32 (float64 for float64), one cast at the store (Gemma's order, not Llama's). The
residual is added to the rounded norm, and the sum rounded again: bitwise what two ops would give.
Floor: the forward moves 2 * rows * d * itemsize bytes, half as much again with a residual.
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


@jit()
def _rms_norm_fwd_kernel(p_x, p_weight, p_residual, p_y, p_rstd, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
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


@jit(do_not_specialize=["num_rows"])
def _rms_norm_bwd_kernel(
    p_dy, p_x, p_weight, p_rstd, p_dx, p_d_weight, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Each program takes every num_programs-th row, and leaves one partial sum of d_weight."""
    i_d = tl.arange(0, BLOCK_D)
    m_d = i_d < D
    weight = 1.0 + tl.load(p_weight + i_d, mask=m_d, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    for i_row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(i_row, tl.int64)
        rstd = tl.load(p_rstd + row)
        normed = tl.load(p_x + row * D + i_d, mask=m_d, other=0.0).to(tl.float32) * rstd
        dy = tl.load(p_dy + row * D + i_d, mask=m_d, other=0.0).to(tl.float32)
        d_weight += dy * normed
        d_normed = dy * weight
        dx = rstd * (d_normed - normed * (tl.sum(d_normed * normed) / D))
        tl.store(p_dx + row * D + i_d, dx.to(p_dx.dtype.element_ty), mask=m_d)
    tl.store(p_d_weight + tl.program_id(0).to(tl.int64) * D + i_d, d_weight, mask=m_d)


def _launch_settings(d):
    block = 1 << (d - 1).bit_length()
    return {
        "D": d,
        "BLOCK_D": block,
        "num_warps": min(8, max(1, block // 256)),
    }  # 8 elements a thread, or more


def _rms_norm_fwd(x, weight, residual, eps):
    num_rows, d = x.shape
    y, rstd = torch.empty_like(x), torch.empty(num_rows, dtype=torch.float32, device=x.device)
    p = {"p_x": x, "p_weight": weight, "p_residual": residual, "p_y": y, "p_rstd": rstd}
    _rms_norm_fwd_kernel[(num_rows,)](**p, eps=eps, **_launch_settings(d))
    return y, rstd


def _rms_norm_bwd(dy, x, weight, rstd):
    num_rows, d = x.shape
    num_programs = min(num_rows, 4 * _triton.num_processors(x.device))
    dx, d_weight = torch.empty_like(x), torch.empty(num_programs, d, dtype=torch.float32, device=x.device)
    p = {"p_dy": dy, "p_x": x, "p_weight": weight, "p_rstd": rstd, "p_dx": dx, "p_d_weight": d_weight}
    _rms_norm_bwd_kernel[(num_programs,)](**p, num_rows=num_rows, **_launch_settings(d))
    return dx, d_weight.sum(0).to(weight.dtype)


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
