"""GeGLU with the tanh GELU: y = gelu_tanh(gate) * up.

gate, up (..., F) -> (..., F) as gate.
Numerics: float32 inside (float64 for float64), one cast at the store. The kernels use that
gelu_tanh(x) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
Floor: the forward moves 3 * elements * itemsize bytes, the backward 5.
Source: arXiv:2002.05202; the tanh form as in Gemma's `gelu_pytorch_tanh`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import _triton, cpu
from ._triton import LOG2E, jit, tl

BLOCK = 2048  # 16 elements a thread: two 16-byte accesses each way in bfloat16


def geglu_reference(gate, up):
    """The definition."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(dtype), approximate="tanh") * up.to(dtype)).to(gate.dtype)


@jit()
def _sigmoid_2u(x):
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    return 1.0 / (1.0 + tl.exp2(tl.minimum(-2 * LOG2E * u, 126.0)))  # within float32, either side


@jit(do_not_specialize=["n"])
def _geglu_fwd_kernel(p_gate, p_up, p_y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(p_gate + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(p_up + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(p_y + i, (gate * _sigmoid_2u(gate) * up).to(p_y.dtype.element_ty), mask=i < n)


@jit(do_not_specialize=["n"])
def _geglu_bwd_kernel(p_dy, p_gate, p_up, p_d_gate, p_d_up, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(p_dy + i, mask=i < n, other=0.0).to(tl.float32)
    gate = tl.load(p_gate + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(p_up + i, mask=i < n, other=0.0).to(tl.float32)
    s = _sigmoid_2u(gate)
    slope = s + gate * s * (1.0 - s) * (2 * 0.7978845608028654) * (1.0 + 3 * 0.044715 * gate * gate)
    tl.store(p_d_gate + i, (dy * up * slope).to(p_d_gate.dtype.element_ty), mask=i < n)
    tl.store(p_d_up + i, (dy * gate * s).to(p_d_up.dtype.element_ty), mask=i < n)


def _geglu_fwd(gate, up):
    y, n = torch.empty_like(gate), gate.numel()
    _geglu_fwd_kernel[(-(-n // BLOCK),)](p_gate=gate, p_up=up, p_y=y, n=n, BLOCK=BLOCK, num_warps=4)
    return y


def _geglu_bwd(dy, gate, up):
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    p = {"p_dy": dy, "p_gate": gate, "p_up": up, "p_d_gate": d_gate, "p_d_up": d_up}
    _geglu_bwd_kernel[(-(-n // BLOCK),)](**p, n=n, BLOCK=BLOCK, num_warps=4)
    return d_gate, d_up


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _geglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _geglu_bwd(dy.contiguous(), *ctx.saved_tensors)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(gate) * up, elementwise, in gate's dtype. Raises ValueError on shapes that differ."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    if _triton.takes(gate, up) and gate.numel():
        with _triton.on_device(gate):
            return _GeGLU.apply(gate, up)
    if cpu.supports_pointwise(gate, up):
        return cpu.geglu(gate, up)
    return geglu_reference(gate, up)
