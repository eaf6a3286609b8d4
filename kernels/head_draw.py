"""LM head and one draw a row in one op: ids from softmax(softcap(hidden weight^T) / temperature), by the inverse CDF.

hidden (B, d), weight (V, d), uniforms and temperatures (B,) -> ids (B,) int64 and their log-probs (B,) float32. A draw
is the first entry whose cumulative probability passes the uniform; temperature 0 takes the likeliest, with its log-prob
at temperature 1. On a GPU no (B, V) logits are in memory: one kernel leaves, of each row and chunk of the vocabulary,
the largest logit and the sum of exponentials below it; another finds by these sums the chunk that the uniform falls in,
computes its logits again, and draws within it. The log-prob is that of both choices together, so it is exactly of what
was drawn from, at any temperature.
Numerics: logits in float32 (float64 for float64), never rounded to 16 bits; cumulative sums in float64. Entries at a
boundary may fall to the other side than in the reference, whose logits are summed in another order.
Floor: V * d * itemsize bytes of weights, read once, or 2 * B * d * V FLOPs, which take longer from B = 180 or so on an
H200. Beyond it a chunk of weights a row is read again, B * BLOCK_V * d * itemsize bytes: at B = 64 of 256,000 entries
3%; and 16 * B * V / BLOCK_V bytes of sums are written and read. By count alone: this was never run on a GPU.
"""

from __future__ import annotations

import torch

from . import _triton
from ._triton import LOG2E, jit, softcapped, tile, tl
from .linear_log_prob import _Config, _settings

WIDE_ROWS = 8192  # vocabulary entries whose weights are widened at a time


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """(B, V), float32 at least: a logit of 16 rounded to bfloat16 is off by up to 0.06."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == dtype:
        logits = hidden @ weight.T
    elif weight.is_cuda:
        logits = torch.mm(hidden, weight.T, out_dtype=dtype)
    else:
        logits = torch.cat([hidden.to(dtype) @ rows.to(dtype).T for rows in weight.split(WIDE_ROWS)], 1)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def tempered(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """(B, V) logits below their maximum, over the (B,) temperatures: 0 is taken for 1."""
    scale = torch.where(temperatures == 0, 1.0, temperatures).clamp_(min=torch.finfo(logits.dtype).tiny)
    # Shifted first, so that no temperature, however small, overflows.
    return (logits - logits.amax(-1, keepdim=True)) / scale.to(logits.dtype)[:, None]


def drawn_from(
    logits: torch.Tensor, uniforms: torch.Tensor, temperatures: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) ids and log-probs from (B, V) tempered logits and (B,) float64 uniforms; where temperatures are 0 greedy."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    ids = torch.where(temperatures == 0, logits.argmax(-1), ids.clamp_(max=logits.shape[1] - 1))
    return ids, logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def head_draw_reference(hidden, weight, uniforms, temperatures, *, softcap=None):
    """The definition: materialises (B, V) logits."""
    return drawn_from(tempered(head_logits(hidden, weight, softcap), temperatures), uniforms, temperatures)


@jit()
def _inverse(temperature):
    """1 / temperature in float32, whose least normal number is the least temperature; 1 where it is 0."""
    return 1.0 / tl.maximum(tl.where(temperature == 0, 1.0, temperature), 1.1754943508222875e-38).to(tl.float32)


@jit(do_not_specialize=["B", "V", "num_chunks"])
def _chunks_kernel(
    h_rows, w_rows, p_temperature, p_maximum, p_total, B, V, num_chunks,
    D: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M rows and one chunk: the largest logit in units of log2, and the sum of tempered exponentials."""
    o_m, chunk = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    o_v = chunk * BLOCK_V
    dots = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for o_d in range(0, D, BLOCK_D):
        h = tile(h_rows, o_m, o_d, B, D, BLOCK_M, BLOCK_D, TMA)
        w = tile(w_rows, o_v, o_d, V, D, BLOCK_V, BLOCK_D, TMA)
        dots = tl.dot(h, w.T, dots, input_precision=PRECISION)
    i_m = o_m + tl.arange(0, BLOCK_M)
    m_m, m_v = i_m < B, o_v + tl.arange(0, BLOCK_V) < V
    inverse = _inverse(tl.load(p_temperature + i_m, mask=m_m, other=1.0))
    logits = softcapped(dots, 1.0, SOFTCAP)
    maximum = tl.max(tl.where(m_v[None, :], logits, float("-inf")), 1)
    p = tl.exp2((logits - maximum[:, None]) * inverse[:, None])
    o_part = i_m.to(tl.int64) * num_chunks + chunk
    tl.store(p_maximum + o_part, maximum, mask=m_m)
    tl.store(p_total + o_part, tl.sum(tl.where(m_v[None, :], p, 0.0), 1), mask=m_m)


@jit()
def _first_beyond(share, p, mask, i):
    """The first index at which the sums of p pass `share` of their total: one at which p is not 0."""
    passed = tl.sum(((tl.cumsum(p, 0) <= share * tl.sum(p, 0)) & mask).to(tl.int32), 0)
    return tl.minimum(passed, tl.max(tl.where(p > 0, i, 0), 0))


@jit()
def _likeliest(x, i, N: tl.constexpr):
    """The first index of the largest of x; N where all are NaN."""
    return tl.min(tl.where(x == tl.max(x, 0), i, N), 0)


@jit(do_not_specialize=["V", "num_chunks"])
def _draw_kernel(
    p_hidden, p_weight, p_uniform, p_temperature, p_maximum, p_total, p_id, p_log_prob, V, num_chunks,
    D: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row: the chunk by the chunks' sums, then the entry by the chunk's logits, made again."""
    row = tl.program_id(0).to(tl.int64)
    uniform, temperature = tl.load(p_uniform + row), tl.load(p_temperature + row)
    greedy, inverse = temperature == 0, _inverse(temperature)
    i_c = tl.arange(0, BLOCK_C)
    m_c = i_c < num_chunks
    maxima = tl.load(p_maximum + row * num_chunks + i_c, mask=m_c, other=float("-inf"))
    totals = tl.load(p_total + row * num_chunks + i_c, mask=m_c, other=0.0)
    highest = tl.max(maxima, 0)
    masses = tl.where(m_c, totals * tl.exp2((maxima - highest) * inverse), 0.0).to(tl.float64)
    chunk = tl.where(greedy, _likeliest(maxima, i_c, BLOCK_C), _first_beyond(uniform, masses, m_c, i_c))
    chunk = tl.minimum(chunk, num_chunks - 1)
    mass, whole = tl.sum(tl.where(i_c == chunk, masses, 0.0), 0), tl.sum(masses, 0)
    before = tl.sum(tl.where(i_c < chunk, masses, 0.0), 0)
    share = (uniform * whole - before) / mass  # of the chunk's own mass

    o_v = chunk * BLOCK_V
    products = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for o_d in range(0, D, BLOCK_D):
        i_d = o_d + tl.arange(0, BLOCK_D)
        h = tl.load(p_hidden + row * D + i_d, mask=i_d < D, other=0.0).to(tl.float32)
        products += tile(p_weight, o_v, o_d, V, D, BLOCK_V, BLOCK_D, False).to(tl.float32) * h[None, :]
    i_v = tl.arange(0, BLOCK_V)
    m_v = o_v + i_v < V
    logits = tl.where(m_v, softcapped(tl.sum(products, 1), 1.0, SOFTCAP), float("-inf"))
    below = logits - tl.max(logits, 0)
    p = tl.where(m_v, tl.exp2(below * inverse), 0.0)
    i = tl.where(greedy, _likeliest(logits, i_v, BLOCK_V), _first_beyond(share, p.to(tl.float64), m_v, i_v))
    i = tl.minimum(i, V - 1 - o_v)
    # log2 of the chunk's share of all, and of the entry's share of the chunk; each total is 1 or more, or NaN
    maximum, total = tl.sum(tl.where(i_c == chunk, maxima, 0.0), 0), tl.sum(tl.where(i_c == chunk, totals, 0.0), 0)
    of_chunk = (maximum - highest) * inverse + tl.log2(total) - tl.log2(whole.to(tl.float32))
    of_entry = tl.sum(tl.where(i_v == i, below, 0.0), 0) * inverse - tl.log2(tl.sum(p, 0))
    tl.store(p_id + row, (o_v + i).to(tl.int64))
    tl.store(p_log_prob + row, (of_chunk + of_entry) / LOG2E)


# By architecture and bytes an element: for up to 64 rows, where weights stream past two programs a processor, and for
# more. Found by compiling, not by timing.
_CONFIGS = {
    (80, 4): (_Config(64, 64, 32, 8, 2), _Config(64, 64, 32, 8, 2)),
    (90, 4): (_Config(64, 64, 32, 8, 2), _Config(64, 64, 32, 8, 2)),
    (100, 4): (_Config(64, 64, 32, 8, 2), _Config(64, 64, 32, 8, 2)),
    (80, 2): (_Config(64, 128, 64, 4, 3), _Config(128, 128, 32, 8, 3)),
    (90, 2): (_Config(64, 128, 64, 4, 4), _Config(128, 256, 64, 8, 3)),
    (100, 2): (_Config(64, 128, 64, 4, 4), _Config(128, 256, 64, 8, 3)),
}


def _head_draw(hidden, weight, uniforms, temperatures, softcap):
    (B, d), V = hidden.shape, weight.shape[0]
    config = _CONFIGS[_triton.architecture(hidden.device), hidden.element_size()][B > 64]
    settings = _settings(hidden, config)
    num_chunks = -(-V // config.block_v)
    maximum, total = torch.empty(2, B, num_chunks, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(B, dtype=torch.int64, device=hidden.device)
    log_probs = torch.empty(B, dtype=torch.float32, device=hidden.device)
    # rows run fastest, so that they share the weights
    _chunks_kernel[(-(-B // config.block_m), num_chunks)](
        h_rows=_triton.describe(hidden, [config.block_m, config.block_d], settings["TMA"]),
        w_rows=_triton.describe(weight, [config.block_v, config.block_d], settings["TMA"]),
        p_temperature=temperatures,
        p_maximum=maximum,
        p_total=total,
        B=B,
        V=V,
        num_chunks=num_chunks,
        D=d,
        SOFTCAP=softcap,
        **settings,
    )
    _draw_kernel[(B,)](
        p_hidden=hidden,
        p_weight=weight,
        p_uniform=uniforms,
        p_temperature=temperatures,
        p_maximum=maximum,
        p_total=total,
        p_id=ids,
        p_log_prob=log_probs,
        V=V,
        num_chunks=num_chunks,
        D=d,
        SOFTCAP=softcap,
        BLOCK_V=config.block_v,
        BLOCK_D=(1 << 14) // config.block_v,  # 64 products a thread
        BLOCK_C=max(16, 1 << (num_chunks - 1).bit_length()),
        num_warps=8,
    )
    return ids, log_probs


def head_draw(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    uniforms: torch.Tensor,
    temperatures: torch.Tensor,
    *,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One vocabulary entry a row, drawn from softmax(softcap * tanh(hidden weight^T / softcap) / temperature).

    hidden (B, d) and weight (V, d) float; uniforms in [0, 1) and temperatures >= 0, (B,) float64. Returns ids (B,)
    int64 in [0, V) and log-probs (B,) float32 (float64 for float64 inputs) of the distribution drawn from. Temperature
    0 takes the likeliest entry, with its log-prob at temperature 1. Where a logit is NaN, so is the log-prob. No
    gradient. Raises ValueError on shapes that do not fit.
    """
    B, d = hidden.shape
    if weight.shape[1:] != (d,) or uniforms.shape != (B,) or temperatures.shape != (B,):
        shapes = [tuple(x.shape) for x in (hidden, weight, uniforms, temperatures)]
        raise ValueError(f"{shapes} do not fit (B, d), (V, d), (B,), (B,)")
    hidden, weight = hidden.detach(), weight.detach()
    # rows of 16 bytes are what TMA can read, and the kernels are written for
    if _triton.takes(hidden, weight) and B and d * hidden.element_size() % 16 == 0:
        with _triton.on_device(hidden):
            rows = uniforms.double().contiguous(), temperatures.double().contiguous()
            return _head_draw(hidden.contiguous(), weight.contiguous(), *rows, softcap)
    return head_draw_reference(hidden, weight, uniforms, temperatures, softcap=softcap)
