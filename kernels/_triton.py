"""Triton, where it is installed: a CPU build of torch brings none, and the kernel files import without it.

Under TRITON_INTERPRET=1 the public functions run the kernels, interpreted, on CPU tensors: that is how the
tests reach them on a machine without a GPU. Float64 has no kernels: it belongs to the references.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = tl = TensorDescriptor = None

LOG2E = None if triton is None else tl.constexpr(1.4426950408889634)  # exp(x) = exp2(LOG2E x), and exp2 is in hardware
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def jit(**options):
    """`triton.jit`, or nothing at all where there is no triton."""
    return (lambda fn: fn) if triton is None else triton.jit(**options)


@jit()
def tile(
    source, o_row, o_column, num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr = False,
):  # fmt: skip
    """(ROWS, COLUMNS) of a dense (num_rows, num_columns), zeros beyond; source: descriptor or pointer.

    num_columns is compiled in, or WHOLE: it is a multiple of COLUMNS.
    """
    if TMA:
        block = source.load([o_row, o_column])
    else:
        i_row, i_column = tl.arange(0, ROWS), o_column + tl.arange(0, COLUMNS)
        inside = (o_row + i_row < num_rows)[:, None]
        if not WHOLE:
            if num_columns % COLUMNS != 0:
                inside &= i_column[None, :] < num_columns
        # int64 in the base alone: offsets within a tile are small, and half as many registers
        source += tl.cast(o_row, tl.int64) * num_columns
        block = tl.load(source + (i_row[:, None] * num_columns + i_column[None, :]), mask=inside, other=0.0)
    return block


@jit()
def softcapped(dots, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores in units of log2: scale * dots, capped by c * tanh(x / c) = c - 2c / (1 + exp(2 x / c))."""
    if SOFTCAP is None:  # and `else`, since what follows a return is compiled too
        scores = dots * (SCALE * LOG2E)
    else:
        # 1 / y as rsqrt(y)^2, since y >= 1: a division costs four more instructions a score, for operands near overflow
        root = tl.rsqrt(1.0 + tl.exp2(dots * (2 * LOG2E * SCALE / SOFTCAP)))
        scores = SOFTCAP * LOG2E - (2 * SOFTCAP * LOG2E) * (root * root)
    return scores


@jit()
def softcap_slope(scores, SOFTCAP: tl.constexpr):
    """d score / d (scale * dot), from the capped score in units of log2."""
    if SOFTCAP is None:
        slope = 1.0
    else:
        ratio = scores * (1.0 / (SOFTCAP * LOG2E))
        slope = 1.0 - ratio * ratio
    return slope


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels take these: installed, on CUDA (or interpreted), one type, not float64."""
    if triton is None or any(x.dtype != tensors[0].dtype for x in tensors) or tensors[0].dtype not in TYPES:
        return False
    return triton.knobs.runtime.interpret or all(x.is_cuda for x in tensors)


def on_device(x: torch.Tensor):
    """Makes x's device the current one for the body: Triton launches there, whatever its pointers belong to.

    A thread starts on device 0, whatever the main thread has set. Backward passes need no guard: autograd sets it.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def architecture(device: torch.device) -> int:
    """80 (Ampere and all others), 90 (Hopper) or 100 (Blackwell): what a launch config may depend on."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors: how many programs run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def describe(x: torch.Tensor, block: list[int], tma: bool):
    """What `tile` reads: x (contiguous) itself, or on sm_90 and later its TMA descriptor."""
    return x if not tma else TensorDescriptor(x, list(x.shape), list(x.stride()), block)
