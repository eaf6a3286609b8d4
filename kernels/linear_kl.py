"""KL divergence between two LM heads in one op: KL(p || q), p = softmax(softcap(hidden weight^T)), q = the reference's.

hidden (M, d), weight (V, d), reference_hidden (M, d'), reference_weight (V, d') -> (M,) float32 (float64 for float64
inputs) in nats, the exact sum over the V vocabulary entries, differentiable in hidden and weight. The reference has no
gradient. Never more than a chunk of logits is alive, forward or backward; the backward recomputes them.
Numerics: logits, log-sum-exp and gradients in float32. Gradient of a row by logit v: p_v (log p_v - log q_v - KL).
Floor: 2 * M * (d + d') * V FLOPs forward, 4 * M * d * V more backward (the recomputation is not counted).
Source: the chunks are those of linear_log_prob.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from .linear_log_prob import CHUNK_BYTES, _logits, _vocabulary_parts

NUM_WORKSPACES = 3  # of a chunk's size: logits, and what is made of both distributions


def linear_kl_reference(hidden, weight, reference_hidden, reference_weight, *, softcap=None):
    """The definition: materialises (M, V) logits twice, differentiable by autograd."""

    def log_softmax(h, w):
        dtype = torch.promote_types(h.dtype, torch.float32)
        logits = h.to(dtype) @ w.to(dtype).T
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    log_p = log_softmax(hidden, weight)
    log_q = log_softmax(reference_hidden, reference_weight).detach()
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _chunks(M, V, dtype):
    rows = max(1, min(M, CHUNK_BYTES // (V * dtype.itemsize)))
    return [slice(start, start + rows) for start in range(0, M, rows)]


def _workspaces(chunks, V, like):
    """For each chunk NUM_WORKSPACES of (its rows, V), in one allocation for all, which a heap can use again whole."""
    room = torch.empty(NUM_WORKSPACES, chunks[0].stop if chunks else 0, V, dtype=like.dtype, device=like.device)
    return [room[:, : min(rows.stop, len(like)) - rows.start] for rows in chunks]


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, reference_hidden, reference_weight, softcap):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        kl = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        chunks = _chunks(hidden.shape[0], weight.shape[0], dtype)
        for rows, (logits, log_p, log_q) in zip(chunks, _workspaces(chunks, weight.shape[0], kl), strict=True):
            torch.log_softmax(_logits(hidden[rows], weight, softcap, dtype, out=logits), -1, out=log_p)
            torch.log_softmax(
                _logits(reference_hidden[rows], reference_weight, softcap, dtype, out=logits), -1, out=log_q
            )
            torch.sub(log_p, log_q, out=log_q)
            kl[rows] = log_p.exp_().mul_(log_q).sum(-1)
        ctx.save_for_backward(hidden, weight, reference_hidden, reference_weight, kl)
        ctx.softcap = softcap
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, d_kl):
        hidden, weight, reference_hidden, reference_weight, kl = ctx.saved_tensors
        d_hidden = torch.empty(hidden.shape, dtype=kl.dtype, device=kl.device)
        d_weight = torch.zeros(weight.shape, dtype=kl.dtype, device=kl.device) if ctx.needs_input_grad[1] else None
        chunks = _chunks(hidden.shape[0], weight.shape[0], kl.dtype)
        for rows, (logits, log_p, log_q) in zip(chunks, _workspaces(chunks, weight.shape[0], kl), strict=True):
            # the reference first: the policy's logits are wanted once more
            _logits(reference_hidden[rows], reference_weight, ctx.softcap, kl.dtype, out=logits)
            torch.log_softmax(logits, -1, out=log_q)
            torch.log_softmax(_logits(hidden[rows], weight, ctx.softcap, kl.dtype, out=logits), -1, out=log_p)
            torch.sub(log_p, log_q, out=log_q)
            d_logits = log_p.exp_().mul_(log_q.sub_(kl[rows, None])).mul_(d_kl[rows, None])
            if ctx.softcap is not None:  # 1 - tanh^2
                d_logits.addcmul_(d_logits, logits.div_(ctx.softcap).square_(), value=-1)
            d_rows = torch.zeros(d_logits.shape[0], hidden.shape[1], dtype=kl.dtype, device=kl.device)
            for part in _vocabulary_parts(weight):
                d_rows.addmm_(d_logits[:, part], weight[part].to(kl.dtype))
            d_hidden[rows] = d_rows
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[rows].to(kl.dtype))
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden.to(hidden.dtype), d_weight, None, None, None


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    reference_hidden: torch.Tensor,
    reference_weight: torch.Tensor,
    *,
    softcap: float | None = None,
) -> torch.Tensor:
    """KL(p || q) of each row, p of hidden and weight, q of the reference's; both with the same `softcap`.

    hidden (M, d), weight (V, d), reference_hidden (M, d'), reference_weight (V, d') float. Returns (M,) float32
    (float64 for float64 inputs), >= 0 but for rounding, differentiable in hidden and weight.
    Raises ValueError on shapes that do not fit.
    """
    (M, d), (V, d_reference) = hidden.shape, reference_weight.shape
    if weight.shape != (V, d) or reference_hidden.shape != (M, d_reference):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, reference_hidden "
            f"{tuple(reference_hidden.shape)} and reference_weight {tuple(reference_weight.shape)} do not fit "
            "(M, d), (V, d), (M, d'), (V, d')"
        )
    return _LinearKL.apply(hidden, weight, reference_hidden, reference_weight, softcap)
