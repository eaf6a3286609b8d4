"""Tree attention: softmax(softcap(scale * q k^T) + tree mask) v, over a packed forest.

q (T, Hq, D), k and v (T, Hkv, D), Hq a multiple of Hkv; subtree_end, position_ids (T,) int32 -> as q.
Query i sees key j  <=>  j <= i < subtree_end[j]  and  position_ids[i] - position_ids[j] < window.
Numerics: scores and softmax in float32 (float64 for float64 inputs), one cast at the end. The kernels sum every
gradient in a fixed order, without atomics. A softcap bounds the scores, so exp needs no running maximum; without one,
and in float16, whose range is too short for that, the maximum runs. float32 dots run as three tf32 ones. At head_dim
256 the backward stores p and ds of the live blocks, SCRATCH_BYTES at most, so that dK and dV are plain products.
Floor: 4 * Hq * D * (visible pairs) FLOPs forward, 2.5 times that backward.
Source: softcap and window as in Gemma 2 (arXiv:2408.00118), no softcap as in Gemma 3 (arXiv:2503.19786); the mask is
docs/structure.md, "The packed tree".
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _triton, cpu
from ._triton import jit, softcap_slope, softcapped, tile, tl
from .schedule import effective_window, live_blocks_of, schedule_of


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


@jit()
def _visible(i_q, i_k, p_end, p_position, T, WINDOW: tl.constexpr):
    """The tree mask of queries i_q against keys i_k, whose shapes broadcast; beyond T nothing is visible."""
    end = tl.load(p_end + i_k, mask=i_k < T, other=0)
    visible = (i_k <= i_q) & (i_q < end)
    if WINDOW is not None:
        q_position = tl.load(p_position + i_q, mask=i_q < T, other=0)
        k_position = tl.load(p_position + i_k, mask=i_k < T, other=0)
        visible &= q_position - k_position < WINDOW
    return visible


@jit(do_not_specialize=["T", "num_columns"])
def _tree_attention_fwd_kernel(
    k_rows, v_rows, p_q, p_o, p_lse, p_end, p_position, p_columns, p_num_full, p_num_live, p_order,
    T, num_columns,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, FIXED_MAXIMUM: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q rows are BLOCK_Q / TOGETHER queries, each of TOGETHER heads that share keys and values."""
    head = tl.program_id(0) * TOGETHER
    b_q = tl.load(p_order + tl.program_id(1))
    o_q, o_head = b_q * (BLOCK_Q // TOGETHER), head // GROUP * D
    p_columns += b_q.to(tl.int64) * num_columns
    row = tl.arange(0, BLOCK_Q)
    i_q, i_head = o_q + row // TOGETHER, head + row % TOGETHER
    m_q = i_q < T
    o_first = (tl.cast(o_q, tl.int64) * HEADS + head) * D  # int64 in the base alone
    i_row = row // TOGETHER * HEADS + row % TOGETHER
    q = tl.load(p_q + o_first + (i_row[:, None] * D + tl.arange(0, D)[None, :]), mask=m_q[:, None], other=0.0)
    o = tl.zeros([BLOCK_Q, D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    maximum = tl.full([BLOCK_Q], 0.0 if FIXED_MAXIMUM else -1e30, tl.float32)
    start = 0
    for MASKED in tl.static_range(2):
        stop = tl.load((p_num_live if MASKED else p_num_full) + b_q)
        for n in range(start, stop):
            o_k = tl.load(p_columns + n) * BLOCK_K
            k = tile(k_rows, o_k, o_head, T, HEADS // GROUP * D, BLOCK_K, D, TMA)
            scores = softcapped(tl.dot(q, k.T, input_precision=PRECISION), SCALE, SOFTCAP)
            if MASKED:
                i_k = o_k + tl.arange(0, BLOCK_K)
                visible = _visible(i_q[:, None], i_k[None, :], p_end, p_position, T, WINDOW)
                scores = tl.where(visible, scores, float("-inf"))
            if not FIXED_MAXIMUM:
                higher = tl.maximum(maximum, tl.max(scores, 1))
                shrink = tl.exp2(maximum - higher)
                total *= shrink
                o *= shrink[:, None]
                maximum = higher
                scores -= maximum[:, None]
            p = tl.exp2(scores)
            total += tl.sum(p, 1)
            v = tile(v_rows, o_k, o_head, T, HEADS // GROUP * D, BLOCK_K, D, TMA)
            o = tl.dot(p.to(v.dtype), v, o, input_precision=PRECISION)
        start = stop
    total = tl.where(m_q, total, 1.0)  # rows beyond T saw nothing
    tl.store(p_lse + i_head.to(tl.int64) * T + i_q, maximum + tl.log2(total), mask=m_q)
    i_row = (i_q - o_q) * HEADS + i_head - head  # anew: what is kept through the loop takes registers
    o_out = i_row[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(p_o + o_first + o_out, (o / total[:, None]).to(p_o.dtype.element_ty), mask=m_q[:, None])


@jit(do_not_specialize=["T", "num_columns", "num_blocks", "first_head"])
def _tree_attention_dq_kernel(
    q_rows, k_rows, v_rows, o_rows, do_rows, p_dq, p_lse, p_delta, p_p, p_ds, p_first, p_end, p_position,
    p_columns, p_num_full, p_num_live, p_order, T, num_columns, num_blocks, first_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """dQ, and delta. A column is PARTS times BLOCK_K keys. STORE: p and ds of each live block are kept, too."""
    head = first_head + tl.program_id(0)
    b_q = tl.load(p_order + tl.program_id(1))
    o_q, o_head = b_q * BLOCK_Q, head // GROUP * D
    p_columns += b_q.to(tl.int64) * num_columns
    i_q = o_q + tl.arange(0, BLOCK_Q)
    m_q = i_q < T
    do = tile(do_rows, o_q, head * D, T, HEADS * D, BLOCK_Q, D, TMA)
    delta = tl.sum(tile(o_rows, o_q, head * D, T, HEADS * D, BLOCK_Q, D, TMA).to(tl.float32) * do.to(tl.float32), 1)
    o_stat = head.to(tl.int64) * T + i_q
    tl.store(p_delta + o_stat, delta, mask=m_q)
    lse = tl.load(p_lse + o_stat, mask=m_q, other=0.0)
    q = tile(q_rows, o_q, head * D, T, HEADS * D, BLOCK_Q, D, TMA)
    dq = tl.zeros([BLOCK_Q, D], tl.float32)
    first_block = tl.program_id(0) * num_blocks + tl.load(p_first + b_q) if STORE else 0
    start = 0
    for MASKED in tl.static_range(2):
        stop = tl.load((p_num_live if MASKED else p_num_full) + b_q) * PARTS
        for n in range(start, stop):
            o_k = (tl.load(p_columns + n // PARTS) * PARTS + n % PARTS) * BLOCK_K
            k = tile(k_rows, o_k, o_head, T, HEADS // GROUP * D, BLOCK_K, D, TMA)
            scores = softcapped(tl.dot(q, k.T, input_precision=PRECISION), SCALE, SOFTCAP)
            p = tl.exp2(scores - lse[:, None])
            if MASKED:
                i_k = o_k + tl.arange(0, BLOCK_K)
                visible = _visible(i_q[:, None], i_k[None, :], p_end, p_position, T, WINDOW)
                p = tl.where(visible, p, 0.0)
            v = tile(v_rows, o_k, o_head, T, HEADS // GROUP * D, BLOCK_K, D, TMA)
            dp = tl.dot(do, v.T, input_precision=PRECISION)
            ds = p * (dp - delta[:, None]) * softcap_slope(scores, SOFTCAP)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
            if STORE:
                block = first_block + n // PARTS
                o_tile = (tl.cast(block, tl.int64) * BLOCK_Q * PARTS + n % PARTS) * BLOCK_K
                o = tl.arange(0, BLOCK_Q)[:, None] * (PARTS * BLOCK_K) + tl.arange(0, BLOCK_K)[None, :]
                tl.store(p_p + o_tile + o, p.to(p_p.dtype.element_ty))
                tl.store(p_ds + o_tile + o, ds.to(p_ds.dtype.element_ty))
        start = stop
    p_dq += (tl.cast(o_q, tl.int64) * HEADS + head) * D
    o_out = tl.arange(0, BLOCK_Q)[:, None] * (HEADS * D) + tl.arange(0, D)[None, :]
    tl.store(p_dq + o_out, (dq * SCALE).to(p_dq.dtype.element_ty), mask=m_q[:, None])


@jit(do_not_specialize=["T", "num_columns", "num_blocks", "first_kv_head"])
def _stored_dkv_kernel(
    s_rows, x_rows, p_out, p_blocks, p_columns, p_num_live, p_order, T, num_columns, num_blocks, first_kv_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dK from what is stored of dS, and Q; or dV from P and dO. A column is PARTS times BLOCK_Q queries."""
    local, b_k = tl.program_id(0), tl.load(p_order + tl.program_id(1))
    kv_head = first_kv_head + local
    p_columns += b_k.to(tl.int64) * num_columns
    p_blocks += b_k.to(tl.int64) * num_columns
    num_parts = tl.load(p_num_live + b_k) * PARTS
    total = tl.zeros([BLOCK_K, D], tl.float32)
    for member in range(GROUP):
        head, o_block = kv_head * GROUP + member, (local * GROUP + member) * num_blocks
        for n in range(num_parts):
            o_s = ((o_block + tl.load(p_blocks + n // PARTS)) * PARTS + n % PARTS) * BLOCK_Q
            s = tile(s_rows, o_s, 0, o_s + BLOCK_Q, BLOCK_K, BLOCK_Q, BLOCK_K, TMA)
            o_q = (tl.load(p_columns + n // PARTS) * PARTS + n % PARTS) * BLOCK_Q
            x = tile(x_rows, o_q, head * D, T, HEADS * D, BLOCK_Q, D, TMA)
            total = tl.dot(s.T, x, total, input_precision=PRECISION)
    m_k = b_k * BLOCK_K + tl.arange(0, BLOCK_K) < T
    p_out += (tl.cast(b_k * BLOCK_K, tl.int64) * (HEADS // GROUP) + kv_head) * D
    o_out = tl.arange(0, BLOCK_K)[:, None] * (HEADS // GROUP * D) + tl.arange(0, D)[None, :]
    tl.store(p_out + o_out, (total * SCALE).to(p_out.dtype.element_ty), mask=m_k[:, None])


@jit(do_not_specialize=["T", "num_columns"])
def _tree_attention_dkv_kernel(
    q_rows, k_rows, v_rows, do_rows, p_dk, p_dv, p_lse, p_delta, p_end, p_position,
    p_columns, p_num_full, p_num_live, p_order, T, num_columns,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    b_k = tl.load(p_order + tl.program_id(1))
    o_k = b_k * BLOCK_K
    p_columns += b_k.to(tl.int64) * num_columns
    i_k = o_k + tl.arange(0, BLOCK_K)
    k = tile(k_rows, o_k, kv_head * D, T, HEADS // GROUP * D, BLOCK_K, D, TMA)
    if DK:
        v = tile(v_rows, o_k, kv_head * D, T, HEADS // GROUP * D, BLOCK_K, D, TMA)
    dk = tl.zeros([BLOCK_K, D], tl.float32)
    dv = tl.zeros([BLOCK_K, D], tl.float32)
    for head in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        o_stat = tl.cast(head, tl.int64) * T
        start = 0
        for MASKED in tl.static_range(2):
            stop = tl.load((p_num_live if MASKED else p_num_full) + b_k)
            for n in range(start, stop):
                o_q = tl.load(p_columns + n) * BLOCK_Q
                i_q = o_q + tl.arange(0, BLOCK_Q)
                q = tile(q_rows, o_q, head * D, T, HEADS * D, BLOCK_Q, D, TMA)
                lse = tl.load(p_lse + o_stat + i_q, mask=i_q < T, other=0.0)
                # transposed from the start: on Hopper a dot of a transposed dot was wrong (flash-linear-attention #640)
                scores = softcapped(tl.dot(k, q.T, input_precision=PRECISION), SCALE, SOFTCAP)
                p = tl.exp2(scores - lse[None, :])
                if MASKED:
                    visible = _visible(i_q[None, :], i_k[:, None], p_end, p_position, T, WINDOW)
                    p = tl.where(visible, p, 0.0)
                do = tile(do_rows, o_q, head * D, T, HEADS * D, BLOCK_Q, D, TMA)
                if DV:
                    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                if DK:
                    delta = tl.load(p_delta + o_stat + i_q, mask=i_q < T, other=0.0)
                    dp = tl.dot(v, do.T, input_precision=PRECISION)
                    ds = p * (dp - delta[None, :]) * softcap_slope(scores, SOFTCAP)
                    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
            start = stop
    m_k = i_k < T
    o_out = tl.arange(0, BLOCK_K)[:, None] * (HEADS // GROUP * D) + tl.arange(0, D)[None, :]
    o_tile = (tl.cast(o_k, tl.int64) * (HEADS // GROUP) + kv_head) * D
    if DK:
        tl.store(p_dk + o_tile + o_out, (dk * SCALE).to(p_dk.dtype.element_ty), mask=m_k[:, None])
    if DV:
        tl.store(p_dv + o_tile + o_out, dv.to(p_dv.dtype.element_ty), mask=m_k[:, None])


class _Config(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class _Configs(NamedTuple):
    """dv None: dK and dV in one kernel. stored None: they are not made from a stored p and ds.

    running: the forward where the maximum is not fixed, if that wants tiles of its own.
    """

    forward: _Config
    dq: _Config
    dk: _Config
    dv: _Config | None = None
    stored: _Config | None = None
    running: _Config | None = None


# By architecture, bytes an element and head_dim. Found by compiling, not by timing: the largest tiles that keep
# to the spill budget of tests/test_triton_compile.py. At head_dim 256 on Hopper dK and dV, made anew, are two kernels:
# that costs an eighth dot, but their accumulators fit beside 128 keys.
_FLOAT32 = {  # tf32x3 wants six registers where bfloat16 wants one: small tiles, plain loads
    256: _Configs(_Config(16, 16, 8, 1), _Config(16, 16, 8, 1), _Config(16, 16, 8, 1)),
    128: _Configs(_Config(32, 32, 8, 1), _Config(32, 32, 8, 1), _Config(32, 32, 8, 1)),
    64: _Configs(_Config(32, 32, 4, 1), _Config(32, 32, 4, 1), _Config(32, 32, 4, 1)),
}
_CONFIGS = {
    (80, 4): _FLOAT32,
    (90, 4): _FLOAT32,
    (100, 4): _FLOAT32,
    (80, 2): {
        256: _Configs(
            _Config(64, 32, 4, 2),
            _Config(64, 32, 8, 1),
            _Config(32, 32, 8, 2),
            stored=_Config(32, 64, 8, 5),
            running=_Config(64, 32, 8, 2),  # four warps would spill it
        ),
        128: _Configs(_Config(64, 64, 4, 2), _Config(64, 64, 4, 2), _Config(32, 64, 8, 2)),
        64: _Configs(_Config(128, 64, 8, 2), _Config(128, 64, 8, 2), _Config(32, 64, 4, 2)),
    },
    (90, 2): {
        256: _Configs(
            _Config(128, 64, 8, 2),
            _Config(128, 32, 8, 2),
            _Config(32, 128, 8, 2),
            _Config(32, 128, 8, 3),
            stored=_Config(64, 128, 8, 5),
        ),
        128: _Configs(_Config(128, 64, 8, 3), _Config(128, 64, 8, 2), _Config(64, 64, 8, 2)),
        64: _Configs(_Config(128, 64, 8, 3), _Config(128, 64, 8, 2), _Config(64, 128, 8, 2)),
    },
    (100, 2): {
        256: _Configs(
            _Config(128, 64, 8, 2), _Config(128, 32, 8, 2), _Config(64, 64, 8, 1), stored=_Config(64, 128, 8, 5)
        ),
        128: _Configs(_Config(128, 64, 8, 3), _Config(128, 64, 8, 2), _Config(64, 64, 8, 2)),
        64: _Configs(_Config(128, 64, 8, 3), _Config(128, 64, 8, 2), _Config(64, 64, 8, 2)),
    },
}
SCRATCH_BYTES = 4 << 30  # what the backward may store of p and ds at a time; where one head needs more: recomputed


def _configs(q) -> _Configs:
    return _CONFIGS[_triton.architecture(q.device), q.element_size()][max(q.shape[2], 64)]


def _settings(q, k, config):
    """What every launch has in common."""
    (T, Hq, D), Hkv = q.shape, k.shape[1]
    return {
        "T": T,
        "HEADS": Hq,
        "GROUP": Hq // Hkv,
        "D": D,
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "PRECISION": "tf32x3" if q.element_size() == 4 else "tf32",
        "TMA": q.element_size() == 2 and _triton.architecture(q.device) >= 90,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _launch(
    kernel, config, rows, queries, keys, p, subtree_end, position_ids, scale, softcap, window,
    *, num_heads=None, column_keys=None, **more,
):  # fmt: skip
    """One launch over `num_heads` (all): `queries` and `keys` are read in tiles, `p` are pointers by name.

    Where heads lie TOGETHER in a block, it is of so many times fewer queries than it has rows.
    """
    together = more.get("TOGETHER", 1)
    settings = _settings(p["q"] if "q" in p else queries["q"], keys["k"], config)
    T, D = settings["T"], settings["D"]
    column_keys = column_keys or config.block_k
    schedule = schedule_of(subtree_end, position_ids, config.block_q // together, column_keys, window, rows)
    tiles = {}
    for tensors, block in ((queries, config.block_q), (keys, config.block_k)):
        for name, x in tensors.items():
            tiles[f"{name}_rows"] = _triton.describe(x.view(T, -1), [block, D], settings["TMA"])
    num_rows, num_columns = schedule.columns.shape
    all_heads = settings["HEADS"] // (together if rows == "queries" else settings["GROUP"])
    kernel[(num_heads or all_heads, num_rows)](
        **tiles,
        **{f"p_{name}": x for name, x in p.items()},
        p_end=subtree_end,
        p_position=position_ids,
        p_columns=schedule.columns,
        p_num_full=schedule.num_full,
        p_num_live=schedule.num_live,
        p_order=schedule.order,
        num_columns=num_columns,
        SCALE=scale,
        SOFTCAP=softcap,
        WINDOW=effective_window(subtree_end, position_ids, window),
        **settings,
        **more,
    )


def _tree_attention_fwd(q, k, v, *mask):
    o, softcap = torch.empty_like(q), mask[3]
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)  # (Hq, T), in log2
    fixed = softcap is not None and softcap <= 80 and q.dtype != torch.float16  # exp(80) T is finite
    p, keys = {"q": q, "o": o, "lse": lse}, {"k": k, "v": v}
    configs = _configs(q)
    config = configs.forward if fixed else configs.running or configs.forward
    together = _heads_together(q.shape[1] // k.shape[1], config.block_q)
    _launch(_tree_attention_fwd_kernel, config, "queries", {}, keys, p, *mask, TOGETHER=together, FIXED_MAXIMUM=fixed)
    return o, lse


def _heads_together(group, block_q):
    """How many of the `group` query heads of a key head share the rows of a block: their keys are the same, and the
    fewer queries a block has, the fewer pairs it visits that none of them sees. A power of two; in blocks of fewer than
    128 rows one, since those have few queries, and on sm_80 no registers left.
    """
    return min(group & -group, 8) if block_q >= 128 else 1


def _tree_attention_bwd(do, q, k, v, o, lse, *mask):
    """dK and dV from stored p and ds: 5 dots, one softmax; or anew from q and k: 7 or 8 dots, two or three."""
    configs = _configs(q)
    if configs.stored is not None:
        block_q, block_k = configs.dq.block_q, configs.stored.block_k
        blocks = live_blocks_of(*mask[:2], block_q, block_k, mask[4])
        elements = q.shape[1] // k.shape[1] * blocks.count * block_q * block_k  # of p, for one key head
        num_heads = min(k.shape[1], SCRATCH_BYTES // (2 * q.element_size() * elements))
        if num_heads:
            p, ds = torch.empty(2, num_heads * elements, dtype=q.dtype, device=q.device)
            return _bwd_stored(do, q, k, v, o, lse, mask, p, ds, blocks, num_heads)
    return _bwd_anew(do, q, k, v, o, lse, mask)


def _bwd_anew(do, q, k, v, o, lse, mask):
    configs = _configs(q)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    queries, keys, statistics = {"q": q, "do": do}, {"k": k, "v": v}, {"lse": lse, "delta": delta}
    p = {"dq": dq, **statistics, "p": None, "ds": None, "first": None}
    nothing_stored = dict(num_blocks=0, first_head=0, PARTS=1, STORE=False)
    _launch(_tree_attention_dq_kernel, configs.dq, "queries", {**queries, "o": o}, keys, p, *mask, **nothing_stored)
    p = {"dk": dk, "dv": dv, **statistics}
    for config, dk_too, dv_too in ((configs.dk, True, configs.dv is None), (configs.dv, False, True)):
        if config is not None:
            _launch(_tree_attention_dkv_kernel, config, "keys", queries, keys, p, *mask, DK=dk_too, DV=dv_too)
    return dq, dk, dv


def _bwd_stored(do, q, k, v, o, lse, mask, p, ds, blocks, num_heads):
    """`num_heads` key heads at a time, whose p and ds, block by block, are what the two of that name hold."""
    configs, group = _configs(q), q.shape[1] // k.shape[1]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    pointers = {"dq": dq, "lse": lse, "delta": delta, "p": p, "ds": ds, "first": blocks.first}
    config, settings = configs.stored, _settings(q, k, configs.stored)
    schedule = schedule_of(*mask[:2], configs.dq.block_q, config.block_k, mask[4], "keys")
    for first in range(0, k.shape[1], num_heads):
        heads = min(num_heads, k.shape[1] - first)
        _launch(
            _tree_attention_dq_kernel, configs.dq, "queries", {"q": q, "do": do, "o": o}, {"k": k, "v": v}, pointers,
            *mask, num_heads=heads * group, column_keys=config.block_k, num_blocks=blocks.count,
            first_head=first * group, PARTS=config.block_k // configs.dq.block_k, STORE=True,
        )  # fmt: skip
        for out, stored, x, scale in ((dv, p, do, 1.0), (dk, ds, q, mask[2])):
            stored, x = stored.view(-1, config.block_k), x.view(x.shape[0], -1)
            _stored_dkv_kernel[(heads, schedule.columns.shape[0])](
                s_rows=_triton.describe(stored, [config.block_q, config.block_k], settings["TMA"]),
                x_rows=_triton.describe(x, [config.block_q, q.shape[2]], settings["TMA"]),
                p_out=out,
                p_blocks=blocks.by_keys,
                p_columns=schedule.columns,
                p_num_live=schedule.num_live,
                p_order=schedule.order,
                num_columns=schedule.columns.shape[1],
                num_blocks=blocks.count,
                first_kv_head=first,
                SCALE=scale,
                PARTS=configs.dq.block_q // config.block_q,
                **settings,
            )
    return dq, dk, dv


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, subtree_end, position_ids, scale, softcap, window):
        tensors = tuple(x.contiguous() for x in (q, k, v))
        mask = (subtree_end.contiguous(), position_ids.contiguous())
        o, lse = _tree_attention_fwd(*tensors, *mask, scale, softcap, window)
        ctx.save_for_backward(*tensors, o, lse, *mask)
        ctx.settings = (scale, softcap, window)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        *tensors, subtree_end, position_ids = ctx.saved_tensors
        gradients = _tree_attention_bwd(do.contiguous(), *tensors, subtree_end, position_ids, *ctx.settings)
        return *gradients, None, None, None, None, None


def _tree_attention_triton(q, k, v, subtree_end, position_ids, scale, softcap, window):
    """The kernels know head_dim 32, 64, 128 and 256; any other is padded with zeros, which no dot sees."""
    D = q.shape[2]
    padding = max(32, 1 << (D - 1).bit_length()) - D
    if padding:
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v))
    o = _TreeAttention.apply(q, k, v, subtree_end.int(), position_ids.int(), scale, softcap, window)
    return o[..., :D] if padding else o


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
    Returns (T, Hq, D) in q's dtype, differentiable in q, k and v. Raises ValueError on misfitting shapes.
    """
    _check(q, k, v, subtree_end, position_ids, softcap, window)
    if _triton.takes(q, k, v) and q.shape[0] and q.shape[2] <= 256:
        with _triton.on_device(q):
            return _tree_attention_triton(q, k, v, subtree_end, position_ids, scale, softcap, window)
    if cpu.supports(q):
        return cpu.tree_attention(q, k, v, subtree_end, position_ids, scale=scale, softcap=softcap, window=window)
    return tree_attention_reference(q, k, v, subtree_end, position_ids, scale=scale, softcap=softcap, window=window)
