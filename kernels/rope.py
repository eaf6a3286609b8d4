"""Rotary position embedding, halves rotated: (a, b) -> (a cos - b sin, b cos + a sin).

x (T, H, D), position_ids (T,) int -> (T, H, D) as x; angle of pair i is position / factor * theta^(-2i/D).
Numerics: angles and rotation in float32 (float64 for float64), one cast at the store.
Floor: the forward moves 2 * T * H * D * itemsize bytes; the backward is the same rotation, turned back.
The kernel makes cosines and sines from positions, in registers: read instead, they would add 4 * D bytes a token to the
floor. Elsewhere they are made once a batch.
Source: arXiv:2104.09864, in the half-split layout of Hugging Face checkpoints.
"""

from __future__ import annotations

import functools

import torch
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from . import _triton, cpu
from ._triton import jit, tl


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def inverse_frequency(half, theta, factor, dtype, device):
    """(half,): what each pair is turned by from one position to the next. Made once, and not to be written to."""
    return theta ** (-torch.arange(half, dtype=dtype, device=device) / half) / factor


def angles(position_ids, half, theta, factor, dtype):
    """(T, half): what each pair is turned by."""
    return position_ids.to(dtype)[:, None] * inverse_frequency(half, theta, factor, dtype, position_ids.device)


_kept = WeakIdKeyDictionary()  # position_ids -> {settings: cos and sin}; gone with the batch


def cos_and_sin(position_ids, half, theta, factor, dtype=torch.float32):
    """Two (T, half), made once a batch: kept as long as position_ids lives and is not written to."""
    version = None if position_ids.is_inference() else position_ids._version
    kept, key = _kept.setdefault(position_ids, {}), (half, theta, factor, dtype)
    found = kept.get(key)
    if found is None or found[0] != version:
        with torch.inference_mode(position_ids.is_inference()):  # else a backward pass could not be given them
            angle = angles(position_ids, half, theta, factor, dtype)
            found = kept[key] = (version, angle.cos(), angle.sin())
    return found[1:]


def rotated(x, cos, sin):
    """x (T, H, D) by cosines and sines (T, D / 2) of the dtype that is computed in."""
    a, b = (half.to(cos.dtype) for half in x.chunk(2, -1))
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def rope_reference(x, position_ids, *, theta=10_000.0, factor=1.0):
    """The definition."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    angle = angles(position_ids, x.shape[-1] // 2, theta, factor, dtype)
    return rotated(x, angle.cos(), angle.sin())


@jit()
def _rope_kernel(
    p_x, p_position, p_inverse_frequency, p_y,
    SIGN: tl.constexpr, H: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One token, all its heads: their angles are the same."""
    token = tl.program_id(0).to(tl.int64)
    i_half, i_h = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_H)
    m = (i_h < H)[:, None] & (i_half < HALF)[None, :]
    inverse_frequency = tl.load(p_inverse_frequency + i_half, mask=i_half < HALF, other=0.0)
    angle = tl.load(p_position + token).to(tl.float32) * inverse_frequency
    cos, sin = tl.cos(angle)[None, :], SIGN * tl.sin(angle)[None, :]
    o = token * (2 * H * HALF) + i_h[:, None] * (2 * HALF) + i_half[None, :]
    a = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    b = tl.load(p_x + o + HALF, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o, (a * cos - b * sin).to(p_y.dtype.element_ty), mask=m)
    tl.store(p_y + o + HALF, (b * cos + a * sin).to(p_y.dtype.element_ty), mask=m)


def _rope(x, position_ids, inverse_frequency, sign):
    T, H, D = x.shape
    y = torch.empty_like(x)
    _rope_kernel[(T,)](
        p_x=x,
        p_position=position_ids,
        p_inverse_frequency=inverse_frequency,
        p_y=y,
        SIGN=sign,
        H=H,
        HALF=D // 2,
        BLOCK_H=1 << (H - 1).bit_length(),
        BLOCK_HALF=1 << (D // 2 - 1).bit_length(),
        num_warps=4 if H * D > 512 else 1,  # four elements a thread, or more
    )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, position_ids, theta, factor):
        frequency = inverse_frequency(x.shape[-1] // 2, theta, factor, torch.float32, x.device)
        ctx.save_for_backward(position_ids, frequency)
        return _rope(x.contiguous(), position_ids, frequency, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _rope(dy.contiguous(), *ctx.saved_tensors, -1), None, None, None


def rope(x: torch.Tensor, position_ids: torch.Tensor, *, theta: float = 10_000.0, factor: float = 1.0) -> torch.Tensor:
    """Rotate x (T, H, D), D even, by position_ids (T,) / factor: as x. Raises ValueError on shapes."""
    if x.shape[-1] % 2 or position_ids.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)} must be (T, H, even D), position_ids {tuple(position_ids.shape)} (T,)")
    if _triton.takes(x) and x.numel():
        with _triton.on_device(x):
            return _Rope.apply(x, position_ids.contiguous(), theta, factor)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos_and_sin(position_ids, x.shape[-1] // 2, theta, factor, dtype)
    in_cpp = x.shape[-1] % 32 == 0 and cpu.supports_pointwise(x)
    return cpu.rope(x, cos, sin) if in_cpp else rotated(x, cos, sin)
