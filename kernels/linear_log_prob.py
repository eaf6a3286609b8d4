"""LM head, final softcap and log-prob in one op: log_softmax(softcap(hidden weight^T))[target].

hidden (M, d), weight (V, d), target_ids (M,) int64 -> (M,) float32 (float64 for float64 inputs), and on
request the entropy of each row's whole distribution, (M,), from the same pass.
Never more than a chunk of logits is alive, forward or backward; the backward recomputes them. On CPUs, C++ makes them
tile by tile in the cache (cpp/linear_log_prob.cpp) and torch, where that is not built or float64 or float16 comes in,
some rows at a time.
Numerics: logits, log-sum-exp and gradients in float32, summed in a fixed order, d_hidden in the same one whatever the
chunks. The Triton backward keeps d_hidden in float32 between chunks, as two 16-bit halves, the upper of which lives in
the result. The larger the chunks, the fewer times it is read and written: beside the gradients they take what
`extra_bytes` allows, EXTRA_BYTES at least (for at most 8k rows of Gemma-2 2b; from there on M * d * 2 bytes more).
Floor: 2 * M * d * V FLOPs forward, 6 * M * d * V forward + backward (the recomputation is not counted).
Source: the recomputation is that of cut-cross-entropy (arXiv:2411.09009).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from . import _triton, cpu
from ._triton import LOG2E, jit, softcap_slope, softcapped, tile, tl

CHUNK_BYTES = 32 << 20
EXTRA_BYTES, MOST_EXTRA_BYTES = 64 << 20, 1 << 30  # at 8k rows of Gemma-2 2b: 167 chunks, and 5


def linear_log_prob_reference(hidden, weight, target_ids, *, softcap=None, return_entropy=False):
    """The definition: materialises (M, V) logits, differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = logits.log_softmax(-1)
    log_probs = log_p.gather(1, target_ids[:, None])[:, 0]
    return (log_probs, -(log_p.exp() * log_p).sum(-1)) if return_entropy else log_probs


def _chunk_rows(M, V, dtype):
    return max(1, min(M, CHUNK_BYTES // (V * dtype.itemsize)))


def _vocabulary_parts(weight):
    """Slices of the vocabulary whose weights, as float32, are no more than a chunk."""
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    return [slice(start, start + rows) for start in range(0, weight.shape[0], rows)]


def _logits(hidden, weight, softcap, dtype, out=None):
    if weight.dtype == dtype:
        logits = torch.mm(hidden, weight.T, out=out)
    else:  # a product in float16 or bfloat16 would round the logits
        shape = hidden.shape[0], weight.shape[0]
        logits = torch.empty(shape, dtype=dtype, device=hidden.device) if out is None else out
        for part in _vocabulary_parts(weight):
            torch.mm(hidden.to(dtype), weight[part].to(dtype).T, out=logits[:, part])
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class _ChunkedLinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, softcap, return_entropy):
        M, V = hidden.shape[0], weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(M, dtype=dtype, device=hidden.device)
        log_z = torch.empty(M, dtype=dtype, device=hidden.device)
        entropy = torch.zeros(M, dtype=dtype, device=hidden.device)
        rows = _chunk_rows(M, V, dtype)
        for start in range(0, M, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, softcap, dtype)
            log_z[part] = logits.logsumexp(-1)
            log_probs[part] = logits.gather(1, target_ids[part, None])[:, 0] - log_z[part]
            if return_entropy:
                entropy[part] = log_z[part] - (logits - log_z[part, None]).exp_().mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, target_ids, log_z, entropy)
        ctx.settings = softcap, return_entropy
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_probs, d_entropy):
        hidden, weight, target_ids, log_z, entropy = ctx.saved_tensors
        softcap, return_entropy = ctx.settings
        M, V = hidden.shape[0], weight.shape[0]
        dtype = log_z.dtype
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        rows = _chunk_rows(M, V, dtype)
        for start in range(0, M, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, softcap, dtype)
            d_part = d_log_probs[part, None].to(dtype)
            log_p = logits - log_z[part, None]
            if return_entropy:  # dH / d logit = -p (log p + H)
                d_logits = log_p.exp().mul_(-d_part - d_entropy[part, None] * (log_p + entropy[part, None]))
            else:
                d_logits = log_p.exp_().mul_(-d_part)
            d_logits.scatter_add_(1, target_ids[part, None], d_part)
            if softcap is not None:
                d_logits.mul_(1 - (logits / softcap).square_())
            d_rows = torch.zeros(d_logits.shape[0], hidden.shape[1], dtype=dtype, device=hidden.device)
            for words in _vocabulary_parts(weight):
                d_rows.addmm_(d_logits[:, words], weight[words].to(dtype))
            d_hidden[part] = d_rows
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[part].to(dtype))
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None


@jit(do_not_specialize=["M", "V", "num_tiles"])
def _linear_log_prob_fwd_kernel(
    h_rows, w_rows, p_target, p_target_logit, p_lse, p_mean_logit, M, V, num_tiles,
    D: tl.constexpr, SOFTCAP: tl.constexpr, FIXED_MAXIMUM: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    o_m, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    i_m = o_m + tl.arange(0, BLOCK_M)
    m_m = i_m < M
    target = tl.load(p_target + i_m, mask=m_m, other=-1)
    first, last = split * num_tiles * BLOCK_V, tl.minimum((split + 1) * num_tiles * BLOCK_V, V)
    maximum = tl.full([BLOCK_M], 0.0 if FIXED_MAXIMUM else -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    target_logit = tl.zeros([BLOCK_M], tl.float32)
    for o_v in range(first, last, BLOCK_V):
        dots = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for o_d in range(0, D, BLOCK_D):
            h = tile(h_rows, o_m, o_d, M, D, BLOCK_M, BLOCK_D, TMA)
            w = tile(w_rows, o_v, o_d, V, D, BLOCK_V, BLOCK_D, TMA)
            dots = tl.dot(h, w.T, dots, input_precision=PRECISION)
        i_v = o_v + tl.arange(0, BLOCK_V)
        logits = softcapped(dots, 1.0, SOFTCAP)
        logits = tl.where(i_v[None, :] < V, logits, -1e30)
        target_logit += tl.sum(tl.where(i_v[None, :] == target[:, None], logits, 0.0), 1)
        if FIXED_MAXIMUM:
            p = tl.exp2(logits)
        else:
            higher = tl.maximum(maximum, tl.max(logits, 1))
            shrink = tl.exp2(maximum - higher)
            total *= shrink
            weighted *= shrink
            maximum = higher
            p = tl.exp2(logits - maximum[:, None])
        total += tl.sum(p, 1)
        if ENTROPY:
            weighted += tl.sum(p * logits, 1)
    o_part = split.to(tl.int64) * M + i_m
    tl.store(p_lse + o_part, maximum + tl.log2(total), mask=m_m)
    if ENTROPY:
        tl.store(p_mean_logit + o_part, weighted / total, mask=m_m)
    tl.store(p_target_logit + i_m, target_logit, mask=m_m & (target >= first) & (target < last))


@jit(do_not_specialize=["M", "V", "first", "num_blocks"])
def _d_logits_kernel(
    h_rows, w_rows, p_target, p_lse, p_entropy, p_d_log_prob, p_d_entropy, p_d_logits,
    M, V, first, num_blocks,
    D: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One chunk of num_blocks * BLOCK_V vocabulary entries."""
    o_m, o_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_V
    o_v = first + o_column
    dots = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for o_d in range(0, D, BLOCK_D):
        h = tile(h_rows, o_m, o_d, M, D, BLOCK_M, BLOCK_D, TMA)
        w = tile(w_rows, o_v, o_d, V, D, BLOCK_V, BLOCK_D, TMA)
        dots = tl.dot(h, w.T, dots, input_precision=PRECISION)
    i_m, i_v = o_m + tl.arange(0, BLOCK_M), o_v + tl.arange(0, BLOCK_V)
    m_m = i_m < M
    target = tl.load(p_target + i_m, mask=m_m, other=-1)
    lse = tl.load(p_lse + i_m, mask=m_m, other=0.0)
    d_log_prob = tl.load(p_d_log_prob + i_m, mask=m_m, other=0.0)
    logits = softcapped(dots, 1.0, SOFTCAP)
    log_p = logits - lse[:, None] * LOG2E
    slope = -d_log_prob[:, None]
    if ENTROPY:  # dH / d logit = -p (log p + H), and log_p is in log2
        entropy = tl.load(p_entropy + i_m, mask=m_m, other=0.0)
        d_entropy = tl.load(p_d_entropy + i_m, mask=m_m, other=0.0)
        slope = slope - d_entropy[:, None] * (log_p * (1 / LOG2E) + entropy[:, None])
    d_logits = tl.exp2(log_p) * slope
    d_logits += tl.where(i_v[None, :] == target[:, None], d_log_prob[:, None], 0.0)
    d_logits *= softcap_slope(logits, SOFTCAP)
    d_logits = tl.where(i_v[None, :] < V, d_logits, 0.0)
    num_columns = num_blocks * BLOCK_V
    p_d_logits += o_m.to(tl.int64) * num_columns + o_column
    o = tl.arange(0, BLOCK_M)[:, None] * num_columns + tl.arange(0, BLOCK_V)[None, :]
    tl.store(p_d_logits + o, d_logits.to(p_d_logits.dtype.element_ty), mask=m_m[:, None])


@jit(do_not_specialize=["M", "V", "first", "num_blocks"])
def _d_hidden_kernel(
    g_rows, w_rows, p_d_hidden, p_upper, p_lower, M, V, first, num_blocks,
    D: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """d_hidden += d_logits weight, one chunk. HALVES: between chunks, the float32 sum is two 16-bit words.

    A chunk goes on from the sum of those before it, so that the order of the sum does not depend on where they end.
    """
    o_m, o_d = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_D
    i_m, i_d = o_m + tl.arange(0, BLOCK_M), o_d + tl.arange(0, BLOCK_D)
    o = tl.arange(0, BLOCK_M)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    o_tile = o_m.to(tl.int64) * D + o_d
    p_d_hidden, p_upper, p_lower = p_d_hidden + o_tile, p_upper + o_tile, p_lower + o_tile
    m = (i_m < M)[:, None] & (i_d < D)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if first > 0:
        if HALVES:
            upper = tl.load(p_upper + o, mask=m, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
            lower = tl.load(p_lower + o, mask=m, other=0).to(tl.uint16, bitcast=True).to(tl.uint32)
            total = ((upper << 16) | lower).to(tl.float32, bitcast=True)
        else:
            total = tl.load(p_d_hidden + o, mask=m, other=0.0)
    num_columns = num_blocks * BLOCK_V
    for o_v in range(0, num_columns, BLOCK_V):
        g = tile(g_rows, o_m, o_v, M, num_columns, BLOCK_M, BLOCK_V, TMA, WHOLE=True)
        w = tile(w_rows, first + o_v, o_d, V, D, BLOCK_V, BLOCK_D, TMA)
        total = tl.dot(g, w, total, input_precision=PRECISION)
    if not HALVES:
        tl.store(p_d_hidden + o, total, mask=m)
    elif first + num_columns >= V:
        tl.store(p_d_hidden + o, total.to(p_d_hidden.dtype.element_ty), mask=m)
    else:
        bits = total.to(tl.uint32, bitcast=True)
        tl.store(p_upper + o, (bits >> 16).to(tl.uint16).to(tl.int16, bitcast=True), mask=m)
        tl.store(p_lower + o, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=m)


@dataclass(frozen=True)
class _Config:
    block_m: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


# By architecture and bytes an element: the logits (forward, and again backward), d_hidden. Found by
# compiling, not by timing: the tile whose accumulators take half the registers.
_CONFIGS = {
    (80, 4): (_Config(64, 64, 32, 8, 2), _Config(64, 32, 64, 8, 2)),
    (90, 4): (_Config(64, 64, 32, 8, 2), _Config(64, 32, 64, 8, 2)),
    (100, 4): (_Config(64, 64, 32, 8, 2), _Config(64, 32, 64, 8, 2)),
    (80, 2): (_Config(128, 128, 32, 8, 3), _Config(128, 32, 128, 8, 3)),
    (90, 2): (_Config(128, 256, 64, 8, 3), _Config(128, 64, 256, 8, 3)),
    (100, 2): (_Config(128, 256, 64, 8, 3), _Config(128, 64, 256, 8, 3)),
}


def _settings(hidden, config):
    """What every launch on `hidden` has in common."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "PRECISION": "tf32x3" if hidden.element_size() == 4 else "tf32",
        "TMA": hidden.element_size() == 2 and _triton.architecture(hidden.device) >= 90,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _linear_log_prob_fwd(hidden, weight, target_ids, softcap, return_entropy):
    (M, d), V = hidden.shape, weight.shape[0]
    config = _CONFIGS[_triton.architecture(hidden.device), hidden.element_size()][0]
    settings = _settings(hidden, config)
    num_rows, num_tiles = -(-M // config.block_m), -(-V // config.block_v)
    # some eight programs a processor even out the last wave; rows run fastest, so that they share the weights
    num_splits = max(1, min(num_tiles, 8 * _triton.num_processors(hidden.device) // num_rows))
    tiles_per_split = -(-num_tiles // num_splits)
    num_splits = -(-num_tiles // tiles_per_split)
    # No program owns a target outside the vocabulary: its log-prob is NaN. To look for one, the host would wait.
    target_logit = torch.full((M,), float("nan"), dtype=torch.float32, device=hidden.device)
    lse, mean_logit = torch.empty(2, num_splits, M, dtype=torch.float32, device=hidden.device)  # in log2
    _linear_log_prob_fwd_kernel[(num_rows, num_splits)](
        h_rows=_triton.describe(hidden, [config.block_m, config.block_d], settings["TMA"]),
        w_rows=_triton.describe(weight, [config.block_v, config.block_d], settings["TMA"]),
        p_target=target_ids,
        p_target_logit=target_logit,
        p_lse=lse,
        p_mean_logit=mean_logit,
        M=M,
        V=V,
        num_tiles=tiles_per_split,
        D=d,
        SOFTCAP=softcap,
        FIXED_MAXIMUM=softcap is not None and softcap <= 80,  # exp(80) V is finite
        ENTROPY=return_entropy,
        **settings,
    )
    ln2 = 1 / 1.4426950408889634
    log_z = (lse * ln2).logsumexp(0)
    entropy = torch.zeros_like(log_z)
    if return_entropy:
        entropy = log_z - ((lse * ln2 - log_z).exp() * mean_logit * ln2).sum(0)
    return target_logit * ln2 - log_z, log_z, entropy


def _extra_bytes(device):
    """A quarter of the memory that is free on CUDA, within bounds; a power of two, since the rounding of d_weight may
    depend on how much of it is computed at a time.
    """
    if device.type != "cuda":
        return EXTRA_BYTES
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(EXTRA_BYTES, min(1 << max(free // 4, 1).bit_length() - 1, MOST_EXTRA_BYTES))


def _linear_log_prob_bwd(
    d_log_probs, d_entropy, hidden, weight, target_ids, log_z, entropy, softcap, needs_d_weight, extra_bytes
):
    (M, d), V = hidden.shape, weight.shape[0]
    for_logits, for_hidden = _CONFIGS[_triton.architecture(hidden.device), hidden.element_size()]
    with_logits, with_hidden = _settings(hidden, for_logits), _settings(hidden, for_hidden)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight) if needs_d_weight else None
    halves = hidden.element_size() == 2
    upper, lower = d_hidden, d_hidden  # in float32, the sum lives in d_hidden itself
    if halves:
        upper, lower = d_hidden.view(torch.int16), torch.empty(M, d, dtype=torch.int16, device=hidden.device)
    spare = (_extra_bytes(hidden.device) if extra_bytes is None else extra_bytes) - (lower.nbytes if halves else 0)
    block = max(for_logits.block_v, for_hidden.block_v)
    most_blocks = max(4, spare // (M * hidden.element_size() * block))
    num_chunks = -(-V // (most_blocks * block))
    columns = -(-V // (num_chunks * block)) * block
    d_logits = torch.empty(M, columns, dtype=hidden.dtype, device=hidden.device)
    tma = with_logits["TMA"]
    for first in range(0, V, columns):
        _d_logits_kernel[(-(-M // for_logits.block_m), columns // for_logits.block_v)](
            h_rows=_triton.describe(hidden, [for_logits.block_m, for_logits.block_d], tma),
            w_rows=_triton.describe(weight, [for_logits.block_v, for_logits.block_d], tma),
            p_target=target_ids,
            p_lse=log_z,
            p_entropy=entropy,
            p_d_log_prob=d_log_probs,
            p_d_entropy=d_entropy,
            p_d_logits=d_logits,
            M=M,
            V=V,
            first=first,
            num_blocks=columns // for_logits.block_v,
            D=d,
            SOFTCAP=softcap,
            ENTROPY=d_entropy is not None,
            **with_logits,
        )
        rows = min(columns, V - first)
        if d_weight is not None:
            torch.mm(d_logits[:, :rows].T, hidden, out=d_weight[first : first + rows])
        _d_hidden_kernel[(-(-M // for_hidden.block_m), -(-d // for_hidden.block_d))](
            g_rows=_triton.describe(d_logits, [for_hidden.block_m, for_hidden.block_v], tma),
            w_rows=_triton.describe(weight, [for_hidden.block_v, for_hidden.block_d], tma),
            p_d_hidden=d_hidden,
            p_upper=upper,
            p_lower=lower,
            M=M,
            V=V,
            first=first,
            num_blocks=columns // for_hidden.block_v,
            D=d,
            HALVES=halves,
            **with_hidden,
        )
    return d_hidden, d_weight


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, softcap, return_entropy, extra_bytes):
        hidden, weight, target_ids = hidden.contiguous(), weight.contiguous(), target_ids.contiguous()
        log_probs, log_z, entropy = _linear_log_prob_fwd(hidden, weight, target_ids, softcap, return_entropy)
        ctx.save_for_backward(hidden, weight, target_ids, log_z, entropy)
        ctx.settings = softcap, return_entropy, extra_bytes
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_probs, d_entropy):
        softcap, return_entropy, extra_bytes = ctx.settings
        d_log_probs = d_log_probs.contiguous()
        d_entropy = d_entropy.contiguous() if return_entropy else None
        needs_d_weight = ctx.needs_input_grad[1]
        gradients = _linear_log_prob_bwd(
            d_log_probs, d_entropy, *ctx.saved_tensors, softcap, needs_d_weight, extra_bytes
        )
        return *gradients, None, None, None, None


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    *,
    softcap: float | None = None,
    return_entropy: bool = False,
    extra_bytes: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target under softmax(softcap * tanh(hidden weight^T / softcap)).

    hidden (M, d) and weight (V, d) float, target_ids (M,) int64 in [0, V). Returns (M,) float32
    (float64 for float64 inputs), differentiable in hidden and weight. With return_entropy: (log_probs,
    entropy), the entropy (M,) in nats of each row's distribution, differentiable too.
    On CPUs a row of the result depends on its own row of hidden alone, not on M.
    extra_bytes: of the Triton backward, None: by the memory that is free, EXTRA_BYTES to MOST_EXTRA_BYTES.
    Raises ValueError on shapes that do not fit and, on CPUs, on target_ids outside [0, V); elsewhere their log-probs
    are NaN.
    """
    M, d = hidden.shape
    if weight.shape[1] != d or target_ids.shape != (M,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and "
            f"target_ids {tuple(target_ids.shape)} do not fit (M, d), (V, d), (M,)"
        )
    if target_ids.device.type == "cpu" and M > 0:
        low, high = (x.item() for x in target_ids.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise ValueError(f"target_ids must lie in [0, {weight.shape[0]}), got {low} to {high}")
    # rows of 16 bytes are what TMA can read, and the kernels are written for
    if _triton.takes(hidden, weight) and M > 0 and d * hidden.element_size() % 16 == 0:
        op = lambda *inputs: _LinearLogProb.apply(*inputs, extra_bytes)  # noqa: E731
    else:
        op = cpu.linear_log_prob if cpu.supports_linear_log_prob(hidden, weight) else _ChunkedLinearLogProb.apply
    with _triton.on_device(hidden):
        log_probs, entropy = op(hidden, weight, target_ids, softcap, return_entropy)
    return (log_probs, entropy) if return_entropy else log_probs
