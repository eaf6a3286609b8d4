"""Chain attention: tree attention where no tree forks, on kernels of other libraries (flash-attn, xformers).

softmax(softcap(scale * q k^T) + mask) v over B sequences that lie end to end, T tokens in all.
q (T, Hq, D), k and v (T, Hkv, D), Hq a multiple of Hkv -> as q; float16 or bfloat16, on CUDA, D <= 256.
Query i sees key j  <=>  both are in one chain, j <= i, and i - j < window. That is the tree mask of a forest
without forks, where depth counts with the index; of any other it is not, and `chain_lengths` refuses it.
Numerics: theirs, float32 inside. flash-attn is asked for gradients summed in a fixed order. xformers promises
no order, and takes one of its kernels by itself; it has no softcap, and its backward no groups of heads, so
keys and values are repeated for every query head.
Head dims are padded with zeros to a power of two: between those, flash-attn 2.8.3 is reported to read what was
never written (turboderp-org/exllamav3#316).
Floor: that of tree_attention.
Neither is ever chosen by itself: nothing is measured yet that says where it would be the faster one.
Source: flash-attn 2.8.3, `flash_attn_varlen_func` (arXiv:2307.08691); xformers 0.0.35, `ops.fmha`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from .tree_attention import tree_attention_reference

Backend = Literal["flash", "xformers"]  # each an extra of that name
DEVICE_TYPE, DTYPES, MAX_HEAD_DIM = "cuda", (torch.float16, torch.bfloat16), 256


def _load(backend: Backend):
    """flash-attn 2's function (flash-attn-4, which shares its package, has none there), or xformers' module."""
    if backend == "flash":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func
    from xformers.ops import fmha

    return fmha


class ForkError(ValueError):
    """A forest that is no set of chains; `token` is the packed index of the first fork."""

    def __init__(self, token: int, what: str = "the forest"):
        self.token = token
        super().__init__(f"{what} forks at token {token}: chains alone can be computed here")


def chain_lengths(subtree_end: torch.Tensor, position_ids: torch.Tensor) -> tuple[int, ...]:
    """Tokens of each chain of a packed forest, from its (T,) fields, T >= 1; on CUDA the host waits for them.

    Raises ForkError where one token has two children, or a child that is not one position further.
    """
    end, position = subtree_end.cpu(), position_ids.cpu()
    last = end[:-1] == torch.arange(1, end.numel())
    followed = (end[1:] == end[:-1]) & (position[1:] == position[:-1] + 1)
    forks = (~(last | followed)).nonzero()
    if forks.numel():
        raise ForkError(int(forks[0]))
    ends = end.unique_consecutive().long()
    return tuple(ends.diff(prepend=ends.new_zeros(1)).tolist())


@dataclass(frozen=True, eq=False)
class Chains:
    """What `backend` has to know of a batch, made once for all layers: chain b is tokens bounds[b]:bounds[b + 1]."""

    backend: Backend
    lengths: tuple[int, ...]  # B, on the host
    device: torch.device

    @cached_property
    def bounds(self) -> torch.Tensor:
        """(B + 1,) int32, on the device."""
        return torch.tensor((0, *self.lengths)).cumsum(0).int().to(self.device)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def xformers_mask(self):
        """A BlockDiagonalCausalMask without a window."""
        mask = _load("xformers").attn_bias.BlockDiagonalCausalMask
        return mask.from_seqlens(list(self.lengths), device=self.device)


def chain_attention_reference(q, k, v, chains: Chains, *, scale, softcap=None, window=None):
    """The definition: a forest in which every subtree ends where its chain ends."""
    lengths = torch.tensor(chains.lengths, device=q.device)
    subtree_end = lengths.cumsum(0).repeat_interleave(lengths)
    index = torch.arange(q.shape[0], device=q.device)  # in a chain, depths differ as indices do
    return tree_attention_reference(q, k, v, subtree_end, index, scale=scale, softcap=softcap, window=window)


def refusal(
    backend: str, *, head_dim: int, softcap: float | None, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why `backend` cannot compute attention for such a model here, in one line; None where it can."""
    if backend not in get_args(Backend):
        return f"is unknown: expected tree, {' or '.join(get_args(Backend))}"
    if device.type != DEVICE_TYPE:
        return f"needs a CUDA device, not {device}"
    if dtype not in DTYPES:
        return f"computes in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_HEAD_DIM:
        return f"takes a head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
    if backend == "xformers" and softcap is not None:
        return f"has no softcap, and this model's attention has one of {softcap:g}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return f"needs compute capability 8.0 or later, which {torch.cuda.get_device_name(device)} has not"
    try:
        _load(backend)
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        return f"cannot be imported ({reason}): pip install 'swirl[{backend}]'"
    return None


def _flash(q, k, v, chains, scale, softcap, window):
    return _load("flash")(
        q,
        k,
        v,
        chains.bounds,
        chains.bounds,
        chains.longest,
        chains.longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),  # further keys, besides the token itself
        softcap=0.0 if softcap is None else softcap,
        deterministic=True,
    )


def _xformers(q, k, v, chains, scale, window):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mask = chains.xformers_mask if window is None else chains.xformers_mask.make_local_attention(window)
    return _load("xformers").memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]


def chain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chains: Chains,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of every token to those before it in its chain (and itself), at most `window` positions back.

    q (T, Hq, D), k and v (T, Hkv, D), float16 or bfloat16 on CUDA. Returns (T, Hq, D) in q's dtype,
    differentiable in q, k and v. Raises ValueError on misfitting shapes, and saying why where the backend
    cannot compute this.
    """
    T, Hq, D = q.shape
    if k.shape != v.shape or k.shape[0] != T or k.shape[2] != D or Hq % k.shape[1] or sum(chains.lengths) != T:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"{shapes} and chains of {sum(chains.lengths)} tokens do not fit (T, H, D)")
    if softcap is not None and softcap <= 0 or window is not None and window <= 0:
        raise ValueError("softcap and window must be positive, or None")
    if reason := refusal(chains.backend, head_dim=D, softcap=softcap, dtype=q.dtype, device=q.device):
        raise ValueError(f"attention '{chains.backend}' {reason}")
    padding = max(32, 1 << (D - 1).bit_length()) - D
    if padding:
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v))
    window = None if window is None or window >= chains.longest else int(window)
    if chains.backend == "flash":
        o = _flash(q, k, v, chains, scale, softcap, window)
    else:
        o = _xformers(q, k, v, chains, scale, window)
    return o[..., :D] if padding else o
