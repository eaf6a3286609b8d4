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
        warnings.warn(f"swirl's C++ ops are not built, CPUs run on the slow reference in torch: {reason}", stacklevel=3)
        return None


def isas() -> list[str]:
    """Names of the instruction sets built and present here, best first; none where nothing is built."""
    return _extension().isas() if _extension() else []


def supports(q: torch.Tensor) -> bool:
    """Whether tree_attention here is built and takes this tensor."""
    return q.device.type == "cpu" and q.dtype in DTYPES and _extension() is not None


def _machine() -> tuple[int, str]:
    """Threads to use, and the instruction set asked for; "" is the best."""
    return torch.get_num_threads(), os.environ.get("SWIRL_CPU_ISA", "")


def _gradients(ctx, *inputs):
    """Memory for the gradients of the first inputs of an autograd function; None for those not needed."""
    return [torch.empty_like(x) if needed else None for x, needed in zip(inputs, ctx.needs_input_grad)]


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
        ctx.options = (scale, softcap or 0.0, window or 0, *_machine())
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


def supports_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether linear here is built, takes these, and is the faster: float32, many rows, a small weight.

    MKL leaves AVX-512 unused on CPUs that are not Intel's, and runs at 0.43 of the rate. For few rows,
    packing the weight costs what it saves; the largest weights want a blocking by cache that is not here.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[:-1].numel() >= 64
        and weight.numel() <= 1 << 21
        and any("avx512" in isa for isa in isas())
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.detach().contiguous(), weight.detach().contiguous()
        y = x.new_empty(x.shape[0], weight.shape[0])
        ctx.machine = _machine()
        _extension().linear_fwd(x, weight, y, *ctx.machine)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = (saved.detach() for saved in ctx.saved_tensors)
        dx, dweight = _gradients(ctx, x, weight)
        _extension().linear_bwd(x, weight, dy.contiguous(), dx, dweight, *ctx.machine)
        return dx, dweight


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.linear without bias: x (..., K), weight (N, K) -> (..., N), where supported.

    A row of the result depends on its own row of x alone; no sum's order depends on the threads.
    """
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def supports_linear_log_prob(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether linear_log_prob here is built, takes these, and is the faster: one dtype, float32 or bfloat16."""
    return (
        hidden.device.type == weight.device.type == "cpu"
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and hidden.numel() * weight.numel() > 0
        and any("avx" in isa for isa in isas())
    )


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, softcap, return_entropy):
        hidden, weight = hidden.detach().contiguous(), weight.detach().contiguous()
        target_ids = target_ids.contiguous()
        log_probs, log_z = (torch.empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
        entropy = torch.empty_like(log_z) if return_entropy else None
        ctx.options = (softcap or 0.0, *_machine())
        _extension().linear_log_prob_fwd(hidden, weight, target_ids, log_probs, log_z, entropy, *ctx.options)
        ctx.save_for_backward(hidden, weight, target_ids, log_z, entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_probs, d_entropy):
        hidden, weight, *rest = (x if x is None else x.detach() for x in ctx.saved_tensors)
        gradients = _gradients(ctx, hidden, weight)
        d_entropy = None if d_entropy is None else d_entropy.contiguous()
        _extension().linear_log_prob_bwd(
            hidden, weight, *rest, d_log_probs.contiguous(), d_entropy, *gradients, *ctx.options
        )
        return *gradients, None, None, None


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target_ids: torch.Tensor,
    softcap: float | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op of linear_log_prob.py where supported: log-probs, and entropies where asked for, (M,) float32.

    A row depends on its own row of hidden alone, not on M; no sum's order depends on the threads.
    Raises ValueError on target_ids outside [0, V) or not int64.
    """
    return _LinearLogProb.apply(hidden, weight, target_ids, softcap, return_entropy)


def supports_pointwise(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether rms_norm, geglu, rope and norm_rope here are built and take these: float32, rows of whole vectors.

    The latter two want the same of half a head.
    """
    return (
        all(y.device.type == "cpu" and y.dtype == torch.float32 for y in (x, *others))
        and x.shape[-1] % 16 == 0
        and x.numel() > 0
        and _extension() is not None
    )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x, weight = x.detach().contiguous(), weight.detach().contiguous()
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0])
        ctx.machine = _machine()
        _extension().rms_norm_fwd(x, weight, y, rstd, eps, *ctx.machine)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = (saved.detach() for saved in ctx.saved_tensors)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _extension().rms_norm_bwd(x, weight, rstd, dy.contiguous(), dx, dweight, *ctx.machine)
        return dx, dweight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """The op of rms_norm.py where supports_pointwise(x, weight): x (..., d) -> (..., d)."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.detach().contiguous(), up.detach().contiguous()
        y = torch.empty_like(gate)
        ctx.machine = _machine()
        _extension().geglu_fwd(gate.view(-1), up.view(-1), y.view(-1), *ctx.machine)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = (saved.detach() for saved in ctx.saved_tensors)
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        flat = [x.view(-1) for x in (gate, up, dy.contiguous(), dgate, dup)]
        _extension().geglu_bwd(*flat, *ctx.machine)
        return dgate, dup


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The op of geglu.py where supports_pointwise(gate, up): (..., F) -> (..., F)."""
    return _GeGLU.apply(gate, up)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.machine = _machine()
        ctx.save_for_backward(cos, sin)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _extension().rope(x.detach().contiguous(), cos, sin, y, 1.0, *ctx.machine)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
        _extension().rope(dy.contiguous(), *ctx.saved_tensors, dx, -1.0, *ctx.machine)
        return dx, None, None


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation of rope.py, given cos and sin (T, D / 2) float32; where D is a multiple of 32.

    x (T, H, D) float32, non-empty -> (T, H, D).
    """
    return _Rope.apply(x, cos.contiguous(), sin.contiguous())


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        x, weight = x.detach().contiguous(), weight.detach().contiguous()
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[:2])
        ctx.machine = _machine()
        _extension().norm_rope_fwd(x, weight, cos, sin, y, rstd, eps, *ctx.machine)
        ctx.save_for_backward(x, weight, cos, sin, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, cos, sin, rstd = (saved.detach() for saved in ctx.saved_tensors)
        dx, dweight = torch.empty_like(x), torch.empty_like(weight)
        _extension().norm_rope_bwd(x, weight, cos, sin, rstd, dy.contiguous(), dx, dweight, *ctx.machine)
        return dx, dweight, None, None, None


def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """The op of norm_rope.py where supports_pointwise(x, weight), given cos and sin as `rope` is.

    x (T, H, D), D a multiple of 32 -> (T, H, D).
    """
    return _NormRope.apply(x, weight, cos.contiguous(), sin.contiguous(), eps)


def supports_decode(x: torch.Tensor) -> bool:
    """Whether `tree_decode`, `draw` and `decode` here are built and take this."""
    taken = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return taken and hasattr(_extension(), "tree_decode")


def tree_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tree: list[torch.Tensor],
    rows: list[torch.Tensor],
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """The op of tree_decode.py where `supports_decode`: tree (slots, subtree_end, position_ids), rows (states,
    own_slots, own_lengths). A row's result is its own to the last bit. Raises ValueError on what points outside.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, keys, values = (x.detach().contiguous() for x in (q, keys, values))
    tree, rows = ([x.int().contiguous() for x in part] for part in (tree, rows))
    _extension().tree_decode(q, keys, values, tree, rows, out, scale, softcap or 0.0, window or 0, *_machine())
    return out


def draw(hidden: torch.Tensor, embedding: torch.Tensor, softcap: float | None, tables: list) -> None:
    """A token from each row of hidden (B, d), by the tables of `decode`. Raises ValueError."""
    _extension().draw(hidden.detach(), embedding, softcap or 0.0, tables, *_machine())


def decode(
    *, layers: list, windows: list[int], final_norm, embedding, num_heads: int, num_kv_heads: int, eps: float,
    embed_scale: float, scale: float, softcap: float | None, final_softcap: float | None, token, tree: list, rows: list,
    tables: list, prefilled: torch.Tensor | None,
) -> None:  # fmt: skip
    """Whole steps of a Gemma: draws into tables (uniform (B, steps), temperature (B,), is_stop (V,) uint8, limit (B,),
    ids (B, steps), log_probs, counts (B,)), going on from token (B,).

    layers: for each, the weights input_norm, q, k, v, q_norm, k_norm (or None), o, post-attention norm, pre-mlp norm,
    gate, up, down, post-mlp norm, then cos and sin (positions, D / 2), and the pools of keys and values, written to.
    tree and rows as for `tree_decode`. With `prefilled` (B, d), the tree's tokens at the states instead. Weights and
    pools and `prefilled` have the embedding's dtype, which every op rounds to but the logits; angles, and what is
    computed within an op, are float32 where that is bfloat16. Raises ValueError.
    """
    threads, isa = _machine()
    _extension().decode(
        layers, windows, final_norm, embedding, num_heads, num_kv_heads, eps, embed_scale, scale, softcap or 0.0,
        final_softcap or 0.0, token, tree, rows, tables, prefilled, threads, isa,
    )  # fmt: skip
