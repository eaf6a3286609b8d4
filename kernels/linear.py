"""Linear layer without bias: y = x weight^T.

x (..., K), weight (N, K) -> (..., N) as x.
Numerics: float32 accumulation in the library's or the C++ kernel's own fixed order.
Floor: 2 * rows * K * N FLOPs forward, twice that backward.
On CPUs whose AVX-512 the BLAS of torch leaves unused, the C++ kernel serves (kernels/cpu.py says where). On CPUs that
have no bfloat16 instructions torch's bfloat16 product runs at a seventh of float32's rate, and its backward at a
hundredth, so many rows go through float32, some at a time. Elsewhere the BLAS.
"""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import cpu

WIDE_ROWS = 1024  # of x that are float32 at a time, beside the whole weight
FEW_ROWS = 32  # fewer are not worth widening the weight
KEPT_BYTES = 32 << 20  # larger blocks glibc maps one by one
_kept = threading.local()

linear_reference = F.linear


@functools.cache
def _computes_bfloat16() -> bool:
    """Whether this CPU has instructions that torch's bfloat16 products use."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def goes_through_float32(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` widens these, since torch's own product of theirs crawls on this CPU."""
    narrow = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    return narrow and x.shape[:-1].numel() >= FEW_ROWS and x.shape[-1] == weight.shape[1] and not _computes_bfloat16()


def _widened(weight: torch.Tensor) -> torch.Tensor:
    """(N, K) float32, until this thread widens another: a smaller one lies where the last one lay, since glibc's heap
    does not use again what an aligned block of the same size has left.
    """
    size = weight.numel()
    if 4 * size > KEPT_BYTES:
        return weight.float()
    room = getattr(_kept, "room", None)
    if room is None or room.numel() < size:
        room = _kept.room = torch.empty(size)
    return room[:size].view(weight.shape).copy_(weight)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, k) bfloat16, b (k, m) float32 -> (n, m) bfloat16, some rows at a time."""
    return torch.cat([(rows.float() @ b).bfloat16() for rows in a.split(WIDE_ROWS)])


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, _widened(weight).T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = _product(dy, _widened(weight)) if ctx.needs_input_grad[0] else None
        if x is None:
            return dx, None
        dweight = torch.zeros(weight.shape, dtype=torch.float32)
        for rows, dy_rows in zip(x.split(WIDE_ROWS), dy.split(WIDE_ROWS), strict=True):
            dweight.addmm_(dy_rows.float().T, rows.float())
        return dx, dweight.bfloat16()


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K), weight (N, K) -> (..., N) in x's dtype, differentiable. Raises RuntimeError on shapes that differ."""
    if cpu.supports_linear(x, weight) and x.shape[-1] == weight.shape[1]:
        return cpu.linear(x, weight)
    if goes_through_float32(x, weight):
        y = _WideLinear.apply(x.reshape(-1, x.shape[-1]), weight)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)
    return linear_reference(x, weight)
