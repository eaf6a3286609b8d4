"""The C++ ops of cpp/ (module swirl.kernels._cpu) as autograd functions; absent, the references serve.

The instruction set is the best one that the machine has; SWIRL_CPU_ISA names another (plain, avx2, avx512,
avx512_bf16). Threads follow torch.set_num_threads.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def _extension():
    """The built module, or None: then it is said, once, that the slow references serve instead, and why."""
    try:
        from . import _cpu

        return _cpu
    except ImportError as error:
        reason_file = Path(__file__).with_name("_cpu_build_error.txt")  # written by setup.py
        reason = reason_file.read_text().strip() if reason_file.exists() else str(error)
        warnings.warn(
            f"swirl's C++ ops are not built, CPU attention runs on the slow reference: {reason}", stacklevel=3
        )
        return None


def isas() -> list[str]:
    """Names of the instruction sets built and present here, best first; none where nothing is built."""
    return _extension().isas() if _extension() else []


def supports(q: torch.Tensor) -> bool:
    """Whether the C++ ops are built and take this tensor."""
    return q.device.type == "cpu" and q.dtype in DTYPES and _extension() is not None


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, subtree_end, position_ids, scale, softcap, window):
        T, Hq, _ = q.shape
        q, k, v = (x.detach().contiguous() for x in (q, k, v))
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.empty_like(q)
        softmax = torch.empty(2, Hq, T, dtype=wide)  # maxima and sums
        # The backward wants O before rounding: bfloat16's own error would enter dQ and dK through dO . O.
        keep_wide = q.dtype != wide and any(ctx.needs_input_grad)
        out_wide = torch.empty_like(q, dtype=wide) if keep_wide else None
        isa = os.environ.get("SWIRL_CPU_ISA", "")
        ctx.options = (scale, softcap or 0.0, window or 0, torch.get_num_threads(), isa)
        mask = (subtree_end, position_ids)
        _extension().tree_attention_fwd(q, k, v, *mask, out, softmax, out_wide, *ctx.options)
        ctx.save_for_backward(q, k, v, *mask, out_wide if keep_wide else out, softmax)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, *_ = saved = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        saved = [x.detach() for x in saved]
        _extension().tree_attention_bwd(*saved, d_out.contiguous(), dq, dk, dv, *ctx.options)
        return dq, dk, dv, None, None, None, None, None


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    subtree_end: torch.Tensor,
    position_ids: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The op of tree_attention.py on CPU tensors: live blocks alone, sums in an order no thread count moves.

    Shapes and dtypes as there (float16 goes through float32); differentiable once. ValueError on misfits.
    """
    subtree_end, position_ids = (x.to(torch.int32).contiguous() for x in (subtree_end, position_ids))
    if q.dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
        out = _TreeAttention.apply(q, k, v, subtree_end, position_ids, scale, softcap, window)
        return out.to(torch.float16)
    return _TreeAttention.apply(q, k, v, subtree_end, position_ids, scale, softcap, window)
