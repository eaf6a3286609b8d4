"""Decoding on the packed tree: a new token of each of B sequences attends to its state, and to its own tokens.

Keys and values lie in pools (slots, Hkv, D). Packed token j of the states' tree is in slot slots[j]; a sequence whose
state ends at packed index s sees it  <=>  j <= s < subtree_end[j]  and it is within the window: the training mask, with
one query a row. Own token n of sequence b is in slot own_slots[b, n]; it sees the first own_lengths[b] of them, the new
one the last. The query's position is position_ids[s] + own_lengths[b]; states may differ in depth, and a sequence
without own tokens is a token of the tree itself, as in prefill. Forward only: a gradient takes the reference.
Numerics: scores and softmax in float32 (float64 for float64), parts merged in a fixed order by log-sum-exp.
Floor: keys and values moved once, 2 * (tokens seen by some sequence + own ones) * Hkv * D * itemsize bytes.
Source: shared and own keys apart as in Hydragen (arXiv:2402.05099), for a tree of any shape.
"""

from __future__ import annotations

import torch

from . import _triton, cpu
from ._triton import jit, softcapped, tl


def tree_decode_reference(
    q,
    keys,
    values,
    slots,
    subtree_end,
    position_ids,
    states,
    own_slots,
    own_lengths,
    *,
    scale,
    softcap=None,
    window=None,
):
    """The definition: differentiable by autograd, any device."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    (B, Hq, D), Hkv = q.shape, keys.shape[1]
    (T,), N, device = slots.shape, own_slots.shape[1], q.device
    s, lengths = states.long()[:, None], own_lengths.long()[:, None]
    j, n = torch.arange(T, device=device), torch.arange(N, device=device)
    position = position_ids[states.long()][:, None] + lengths
    window = window or 1 << 60
    sees_tree = (j <= s) & (s < subtree_end) & (position - position_ids < window)
    used = n < lengths
    sees_own = used & (lengths - 1 - n < window)
    # slots not yet written, or of no one, may hold anything, NaN included: 0 * NaN must not reach the sum
    own_slots = torch.where(used, own_slots, 0).long()
    own_k, own_v = (x[own_slots].to(dtype).masked_fill(~used[:, :, None, None], 0) for x in (keys, values))
    queries = q.to(dtype).view(B, Hkv, Hq // Hkv, D)
    of_tree = torch.einsum("bhgd,jhd->bhgj", queries, keys[slots.long()].to(dtype))
    scores = torch.cat((of_tree, torch.einsum("bhgd,bnhd->bhgn", queries, own_k)), -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.cat((sees_tree, sees_own), 1)[:, None, None, :]
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    o = torch.einsum("bhgj,jhd->bhgd", p[..., :T], values[slots.long()].to(dtype))
    o = o + torch.einsum("bhgn,bnhd->bhgd", p[..., T:], own_v)
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


@jit()
def _gathered(p_pool, i_slot, m_slot, kv_head, HKV: tl.constexpr, D: tl.constexpr):
    """(slots, D) of one key head, zeros where not asked for."""
    o = (i_slot.to(tl.int64) * HKV + kv_head)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(p_pool + o, mask=m_slot[:, None], other=0.0)


@jit(do_not_specialize=["B", "T", "split_keys"])
def _tree_kernel(
    p_q, p_keys, p_values, p_slot, p_end, p_position, p_state, p_length, p_part_o, p_part_lse, B, T, split_keys,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A share of the tree's keys of a head against the queries of many sequences: partial softmaxes.

    Blocks of keys that none of the sequences descends from are passed over, neither keys nor values read.
    """
    GROUP: tl.constexpr = HQ // HKV
    kv_head, split = tl.program_id(1), tl.program_id(2)
    i_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    sequence = i_r // GROUP
    m_r = sequence < B
    i_head = sequence * HQ + kv_head * GROUP + i_r % GROUP  # row of (B * Hq)
    o_q = i_head.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(p_q + o_q, mask=m_r[:, None], other=0.0)
    state = tl.load(p_state + sequence, mask=m_r, other=-1)
    position = tl.load(p_position + state, mask=m_r, other=0) + tl.load(p_length + sequence, mask=m_r, other=0)
    o = tl.zeros([BLOCK_R, D], tl.float32)
    maximum = tl.full([BLOCK_R], -1e30, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    last = tl.minimum(tl.minimum((split + 1) * split_keys, T), tl.max(state, 0) + 1)
    for o_k in range(split * split_keys, last, BLOCK_K):
        i_k = o_k + tl.arange(0, BLOCK_K)
        m_k = i_k < last
        end = tl.load(p_end + i_k, mask=m_k, other=0)
        visible = (i_k[None, :] <= state[:, None]) & (state[:, None] < end[None, :])
        if WINDOW is not None:
            key_position = tl.load(p_position + i_k, mask=m_k, other=0)
            visible &= position[:, None] - key_position[None, :] < WINDOW
        if tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0:
            slot = tl.load(p_slot + i_k, mask=m_k, other=0)
            k = _gathered(p_keys, slot, m_k, kv_head, HKV, D)
            v = _gathered(p_values, slot, m_k, kv_head, HKV, D)
            o, maximum, total = _attend(q, k, v, visible, o, maximum, total, SCALE, SOFTCAP, PRECISION)
    total = tl.maximum(total, 1e-37)  # a share may be empty: weight exp2(-1e30) = 0
    o_part = split.to(tl.int64) * B * HQ
    tl.store(p_part_lse + o_part + i_head, maximum + tl.log2(total), mask=m_r)
    tl.store(p_part_o + o_part * D + o_q, o / total[:, None], mask=m_r[:, None])


@jit(do_not_specialize=["B", "N", "num_splits"])
def _own_kernel(
    p_q, p_keys, p_values, p_own_slot, p_length, p_part_o, p_part_lse, p_o, B, N, num_splits,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence's own keys, then the tree's shares merged in, in order."""
    GROUP: tl.constexpr = HQ // HKV
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    i_g = tl.arange(0, BLOCK_G)
    m_g = i_g < GROUP
    i_head = sequence * HQ + kv_head * GROUP + i_g
    o_q = i_head.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    q = tl.load(p_q + o_q, mask=m_g[:, None], other=0.0)
    length = tl.load(p_length + sequence)
    p_own_slot += sequence.to(tl.int64) * N
    o = tl.zeros([BLOCK_G, D], tl.float32)
    maximum = tl.full([BLOCK_G], -1e30, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for o_k in range(0, length, BLOCK_K):
        i_k = o_k + tl.arange(0, BLOCK_K)
        m_k = i_k < length
        if WINDOW is not None:
            m_k &= length - 1 - i_k < WINDOW
        slot = tl.load(p_own_slot + i_k, mask=m_k, other=0)
        k = _gathered(p_keys, slot, m_k, kv_head, HKV, D)
        v = _gathered(p_values, slot, m_k, kv_head, HKV, D)
        visible = m_k[None, :] & m_g[:, None]
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


# By bytes an element: the most query rows and the keys of a block, warps and stages, for the tree; the keys of a block
# for own ones. Found by compiling, not by timing.
_CONFIGS = {2: (64, 32, 8, 2, 32), 4: (16, 16, 8, 1, 16)}


def _tree_decode(
    q, keys, values, slots, subtree_end, position_ids, states, own_slots, own_lengths, scale, softcap, window
):
    (B, Hq, D), Hkv, T, N = q.shape, keys.shape[1], slots.numel(), own_slots.shape[1]
    most_rows, block_k, num_warps, num_stages, own_block = _CONFIGS[q.element_size()]
    block_r = min(most_rows, max(16, 1 << (B * Hq // Hkv - 1).bit_length()))
    row_blocks, key_blocks = -(-B * Hq // Hkv // block_r), -(-T // block_k)
    # two programs a processor, so that a long trunk is read by all of them
    wanted = -(-2 * _triton.num_processors(q.device) // (row_blocks * Hkv))
    split_keys = -(-key_blocks // min(key_blocks, wanted)) * block_k
    num_splits = -(-T // split_keys)
    part_o = torch.empty(num_splits, B, Hq, D, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(num_splits, B, Hq, dtype=torch.float32, device=q.device)
    o = torch.empty_like(q)
    shared = {
        "p_q": q,
        "p_keys": keys,
        "p_values": values,
        "p_length": own_lengths,
        "p_part_o": part_o,
        "p_part_lse": part_lse,
        "HQ": Hq,
        "HKV": Hkv,
        "D": D,
        "SCALE": scale,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "PRECISION": "tf32x3" if q.element_size() == 4 else "tf32",
    }
    _tree_kernel[(row_blocks, Hkv, num_splits)](
        p_slot=slots,
        p_end=subtree_end,
        p_position=position_ids,
        p_state=states,
        B=B,
        T=T,
        split_keys=split_keys,
        BLOCK_R=block_r,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        **shared,
    )
    _own_kernel[(B, Hkv)](
        p_own_slot=own_slots,
        p_o=o,
        B=B,
        N=N,
        num_splits=num_splits,
        BLOCK_G=max(16, 1 << (Hq // Hkv - 1).bit_length()),
        BLOCK_K=own_block,
        num_warps=4,
        num_stages=num_stages,
        **shared,
    )
    return o


def tree_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    subtree_end: torch.Tensor,
    position_ids: torch.Tensor,
    states: torch.Tensor,
    own_slots: torch.Tensor,
    own_lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one token of each of B sequences to its ancestors in the tree and to its own tokens.

    q (B, Hq, D); keys, values (slots, Hkv, D); slots, subtree_end, position_ids (T,); states, own_lengths (B,),
    own_slots (B, N): integers. Fastest where `states` ascend. Returns (B, Hq, D) as q. Raises ValueError on shapes,
    and on a CPU where a slot or a state lies outside its range.
    """
    (B, Hq, D), Hkv, T = q.shape, keys.shape[1], slots.shape
    fits = keys.shape == values.shape == (keys.shape[0], Hkv, D) and subtree_end.shape == position_ids.shape == T
    if not fits or Hq % Hkv or states.shape != (B,) or own_lengths.shape != (B,) or own_slots.shape[:-1] != (B,):
        shapes = [tuple(x.shape) for x in (q, keys, values, slots, subtree_end, position_ids)]
        shapes += [tuple(x.shape) for x in (states, own_slots, own_lengths)]
        raise ValueError(f"{shapes} do not fit (B, Hq, D), (slots, Hkv, D) twice, (T,) thrice, (B,), (B, N), (B,)")
    tensors = q, keys, values
    integers = slots, subtree_end, position_ids, states, own_slots, own_lengths
    settings = {"scale": scale, "softcap": softcap, "window": window}
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) and B:
        if _triton.takes(*tensors) and D in (32, 64, 128, 256):
            with _triton.on_device(q):
                return _tree_decode(
                    *(x.contiguous() for x in tensors), *(x.int().contiguous() for x in integers), **settings
                )
        if cpu.supports_decode(q) and q.dtype == keys.dtype == values.dtype:
            return cpu.tree_decode(*tensors, list(integers[:3]), list(integers[3:]), scale, softcap, window)
    return tree_decode_reference(*tensors, *integers, **settings)
