"""Tree attention: softmax(softcap(scale * q k^T) + tree mask) v, over a packed forest.

q (T, Hq, D), k and v (T, Hkv, D), Hq a multiple of Hkv; subtree_end, position_ids (T,) int32 -> (T, Hq, D) as q.
Query i sees key j  <=>  j <= i < subtree_end[j]  and  position_ids[i] - position_ids[j] < window.
Numerics: scores and softmax in float32 (float64 for float64 inputs), one cast at the end.
Floor: 4 * Hq * D * (visible pairs) FLOPs forward, 2.5 times that backward.
Source: softcap and window as in Gemma 2 (arXiv:2408.00118); the mask is docs/structure.md, "The packed tree".
"""

from __future__ import annotations

import torch

from . import cpu


def tree_mask(subtree_end: torch.Tensor, position_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """(T, T) bool: entry [i, j] says whether query i sees key j. The definition, in words of tensors."""
    index = torch.arange(subtree_end.numel(), device=subtree_end.device)
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < subtree_end[None, :])
    if window is not None:
        mask &= position_ids[:, None] - position_ids[None, :] < window
    return mask


def tree_attention_reference(q, k, v, subtree_end, position_ids, *, scale, softcap=None, window=None):
    """The definition: dense, differentiable by autograd, any device."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = torch.einsum("ihd,jhd->hij", queries, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~tree_mask(subtree_end, position_ids, window), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), values).to(q.dtype)


def _check(q, k, v, subtree_end, position_ids, softcap, window):
    T, Hq, D = q.shape
    if k.shape != v.shape or k.shape[0] != T or k.shape[2] != D or Hq % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit (T, H, D)")
    if subtree_end.shape != (T,) or position_ids.shape != (T,):
        raise ValueError(f"subtree_end and position_ids must be ({T},), one entry a packed token")
    if softcap is not None and softcap <= 0 or window is not None and window <= 0:
        raise ValueError("softcap and window must be positive, or None")


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
    """Attention of every packed token to its ancestors (and itself), at most `window` positions back.

    q (T, Hq, D), k and v (T, Hkv, D), float; subtree_end and position_ids (T,) int32.
    Returns (T, Hq, D) in q's dtype, differentiable in q, k and v. Raises ValueError on shapes that do not fit.
    """
    _check(q, k, v, subtree_end, position_ids, softcap, window)
    if cpu.supports(q):
        return cpu.tree_attention(
            q, k, v, subtree_end, position_ids, scale=scale, softcap=softcap, window=window
        )
    return tree_attention_reference(
        q, k, v, subtree_end, position_ids, scale=scale, softcap=softcap, window=window
    )
