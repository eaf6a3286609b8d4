"""Decoding over a shared trunk: a new token for each of B branches, whose keys are the trunk's and their own.

q (B, Hq, D); trunk_k, trunk_v (L, Hkv, D); branch_k, branch_v (B, N, Hkv, D), of which branch b has used
branch_lengths[b] >= 1, its new token's included -> (B, Hq, D) as q. Positions run on: L + n for branch key n.
The queries of all branches meet a trunk key in one matrix product, so that it is read once for 64 query rows
of a key head, and not once a branch. Forward only: a gradient takes the reference.
Numerics: scores and softmax in float32 (float64 for float64), parts merged in a fixed order by log-sum-exp.
Floor: keys and values moved once, 2 * (L + sum of branch_lengths) * Hkv * D * itemsize bytes.
Source: the split into shared and own keys is Hydragen's (arXiv:2402.05099).
"""

from __future__ import annotations

import torch

from . import _triton
from ._triton import jit, softcapped, tile, tl


def tree_decode_reference(q, trunk_k, trunk_v, branch_k, branch_v, branch_lengths, *, scale, softcap=None, window=None):
    """The definition: differentiable by autograd, any device."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (B, Hq, D), (L, Hkv, _), N = q.shape, trunk_k.shape, branch_k.shape[1]
    queries = q.to(dtype).view(B, Hkv, Hq // Hkv, D)
    trunk = torch.einsum("bhgd,jhd->bhgj", queries, trunk_k.to(dtype))
    branch = torch.einsum("bhgd,bjhd->bhgj", queries, branch_k.to(dtype))
    scores = torch.cat((trunk, branch), -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = (L + branch_lengths[:, None] - 1) - torch.arange(L + N, device=q.device)
    visible = (distance >= 0) & (distance < (window or L + N + 1))
    p = scores.masked_fill(~visible[:, None, None, :], float("-inf")).softmax(-1)
    o = torch.einsum("bhgj,jhd->bhgd", p[..., :L], trunk_v.to(dtype))
    # keys not yet used may hold anything, NaN included: 0 * NaN must not reach the sum
    used = (torch.arange(N, device=q.device) < branch_lengths[:, None])[:, :, None, None]
    o = o + torch.einsum("bhgj,bjhd->bhgd", p[..., L:], branch_v.to(dtype).masked_fill(~used, 0))
    return o.reshape(B, Hq, D).to(q.dtype)


@jit()
def _attend(q, k, v, visible, o, maximum, total, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys into the running sums of softmax(scores) v."""
    scores = softcapped(tl.dot(q, k.T, input_precision=PRECISION), SCALE, SOFTCAP)
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(maximum, tl.max(scores, 1))
    shrink = tl.exp2(maximum - higher)
    p = tl.exp2(scores - higher[:, None])
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision=PRECISION)
    return o, higher, total * shrink + tl.sum(p, 1)


@jit(do_not_specialize=["B", "L", "split_keys"])
def _trunk_kernel(
    p_q, k_rows, v_rows, p_lengths, p_part_o, p_part_lse, B, L, split_keys,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """A share of the trunk's keys of a head against the queries of many branches: partial softmaxes."""
    GROUP: tl.constexpr = HQ // HKV
    kv_head, split = tl.program_id(1), tl.program_id(2)
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    branch = i_r // GROUP
    m_r = branch < B
    i_head = branch * HQ + kv_head * GROUP + i_r % GROUP  # row of (B * Hq)
    o_q = i_head.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(p_q + o_q, mask=m_r[:, None], other=0.0)
    length = tl.load(p_lengths + branch, mask=m_r, other=1)
    o = tl.zeros([BLOCK_R, D], tl.float32)
    maximum = tl.full([BLOCK_R], -1e30, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    last = tl.minimum((split + 1) * split_keys, L)
    for o_k in range(split * split_keys, last, BLOCK_K):
        k = tile(k_rows, o_k, kv_head * D, L, HKV * D, BLOCK_K, D, TMA)
        v = tile(v_rows, o_k, kv_head * D, L, HKV * D, BLOCK_K, D, TMA)
        i_k = o_k + tl.arange(0, BLOCK_K)
        visible = (i_k < last)[None, :] & m_r[:, None]
        if WINDOW is not None:
            visible &= (L + length - 1)[:, None] - i_k[None, :] < WINDOW
        o, maximum, total = _attend(q, k, v, visible, o, maximum, total, SCALE, SOFTCAP, PRECISION)
    total = tl.maximum(total, 1e-37)  # beyond the window a share is empty: weight exp2(-1e30) = 0
    o_part = split.to(tl.int64) * B * HQ
    tl.store(p_part_lse + o_part + i_head, maximum + tl.log2(total), mask=m_r)
    tl.store(p_part_o + o_part * D + o_q, o / total[:, None], mask=m_r[:, None])


@jit(do_not_specialize=["B", "N", "num_splits"])
def _branch_kernel(
    p_q, p_k, p_v, p_lengths, p_part_o, p_part_lse, p_o, B, N, num_splits,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch's own keys, then the trunk's shares merged in, in order."""
    GROUP: tl.constexpr = HQ // HKV
    branch, kv_head = tl.program_id(0), tl.program_id(1)
    i_g = tl.arange(0, BLOCK_G)
    m_g = i_g < GROUP
    i_head = branch * HQ + kv_head * GROUP + i_g
    o_q = i_head.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(p_q + o_q, mask=m_g[:, None], other=0.0)
    length = tl.load(p_lengths + branch)
    p_k += branch.to(tl.int64) * N * (HKV * D)
    p_v += branch.to(tl.int64) * N * (HKV * D)
    o = tl.zeros([BLOCK_G, D], tl.float32)
    maximum = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for o_k in range(0, length, BLOCK_K):
        k = tile(p_k, o_k, kv_head * D, length, HKV * D, BLOCK_K, D, False)
        v = tile(p_v, o_k, kv_head * D, length, HKV * D, BLOCK_K, D, False)
        i_k = o_k + tl.arange(0, BLOCK_K)
        visible = (i_k < length)[None, :] & m_g[:, None]
        if WINDOW is not None:
            visible &= (length - 1 - i_k < WINDOW)[None, :]
        o, maximum, total = _attend(q, k, v, visible, o, maximum, total, SCALE, SOFTCAP, PRECISION)
    for split in range(0, num_splits):
        o_part = tl.cast(split, tl.int64) * B * HQ
        lse = tl.load(p_part_lse + o_part + i_head, mask=m_g, other=-1e30)
        part = tl.load(p_part_o + o_part * D + o_q, mask=m_g[:, None], other=0.0)
        higher = tl.maximum(maximum, lse)
        shrink, share = tl.exp2(maximum - higher), tl.exp2(lse - higher)
        o, total, maximum = o * shrink[:, None] + part * share[:, None], total * shrink + share, higher
    total = tl.where(m_g, total, 1.0)
    tl.store(p_o + o_q, (o / total[:, None]).to(p_o.dtype.element_ty), mask=m_g[:, None])


# By bytes an element: the most query rows and the keys of a block, warps and stages, for the trunk; the keys
# of a block for a branch. Found by compiling, not by timing.
_CONFIGS = {2: (64, 32, 4, 2, 32), 4: (16, 16, 4, 1, 16)}


def _tree_decode(q, trunk_k, trunk_v, branch_k, branch_v, branch_lengths, scale, softcap, window):
    (B, Hq, D), (L, Hkv, _), N = q.shape, trunk_k.shape, branch_k.shape[1]
    most_rows, block_k, num_warps, num_stages, branch_block = _CONFIGS[q.element_size()]
    block_r = min(most_rows, max(16, 1 << (B * Hq // Hkv - 1).bit_length()))
    row_blocks, key_blocks = -(-B * Hq // Hkv // block_r), -(-L // block_k)
    # two programs a processor, so that a long trunk is read by all of them
    wanted = -(-2 * _triton.num_processors(q.device) // (row_blocks * Hkv))
    split_keys = -(-key_blocks // min(max(key_blocks, 1), wanted)) * block_k
    num_splits = -(-L // split_keys) if L else 0
    part_o = torch.empty(num_splits, B, Hq, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(num_splits, B, Hq, dtype=torch.float32, device=q.device)
    o = torch.empty_like(q)
    settings = {
        "HQ": Hq,
        "HKV": Hkv,
        "D": D,
        "SCALE": scale,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "PRECISION": "tf32x3" if q.element_size() == 4 else "tf32",
    }
    p = {"p_q": q, "p_lengths": branch_lengths, "p_part_o": part_o, "p_part_lse": part_lse}
    tma = q.element_size() == 2 and _triton.architecture(q.device) >= 90
    if L:
        _trunk_kernel[(row_blocks, Hkv, num_splits)](
            k_rows=_triton.describe(trunk_k.view(L, -1), [block_k, D], tma),
            v_rows=_triton.describe(trunk_v.view(L, -1), [block_k, D], tma),
            B=B,
            L=L,
            split_keys=split_keys,
            BLOCK_R=block_r,
            BLOCK_K=block_k,
            TMA=tma,
            num_warps=num_warps,
            num_stages=num_stages,
            **p,
            **settings,
        )
    _branch_kernel[(B, Hkv)](
        p_k=branch_k,
        p_v=branch_v,
        p_o=o,
        B=B,
        N=N,
        num_splits=num_splits,
        BLOCK_G=max(16, 1 << (Hq // Hkv - 1).bit_length()),
        BLOCK_K=branch_block,
        num_warps=4,
        num_stages=num_stages,
        **p,
        **settings,
    )
    return o


def tree_decode(
    q: torch.Tensor,
    trunk_k: torch.Tensor,
    trunk_v: torch.Tensor,
    branch_k: torch.Tensor,
    branch_v: torch.Tensor,
    branch_lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one new token a branch to the trunk's L keys and to its own branch_lengths[b] keys.

    q (B, Hq, D); trunk_k, trunk_v (L, Hkv, D); branch_k, branch_v (B, N, Hkv, D), whose keys from
    branch_lengths[b] (int, 1 to N) on are not read. Returns (B, Hq, D) as q. Raises ValueError on shapes.
    """
    (B, Hq, D), (L, Hkv, _), N = q.shape, trunk_k.shape, branch_k.shape[1]
    fits = trunk_k.shape == trunk_v.shape == (L, Hkv, D) and branch_k.shape == branch_v.shape == (
        B,
        N,
        Hkv,
        D,
    )
    if not fits or Hq % Hkv or branch_lengths.shape != (B,):
        raise ValueError(
            f"q {tuple(q.shape)}, trunk {tuple(trunk_k.shape)}, branches {tuple(branch_k.shape)} and "
            f"branch_lengths {tuple(branch_lengths.shape)} do not fit "
            "(B, Hq, D), (L, Hkv, D), (B, N, Hkv, D), (B,)"
        )
    tensors = (q, trunk_k, trunk_v, branch_k, branch_v)
    settings = {"scale": scale, "softcap": softcap, "window": window}
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if _triton.takes(*tensors) and not wants_gradient and B and D in (32, 64, 128, 256):
        tensors, lengths = [x.contiguous() for x in tensors], branch_lengths.int().contiguous()
        with _triton.on_device(q):
            return _tree_decode(*tensors, lengths, **settings)
    return tree_decode_reference(*tensors, branch_lengths, **settings)
