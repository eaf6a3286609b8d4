"""LM head, final softcap and log-prob in one op: log_softmax(softcap(hidden weight^T))[target].

hidden (M, d), weight (V, d), target_ids (M,) int64 -> (M,) float32 (float64 for float64 inputs).
Never more than a chunk of logits is alive, forward or backward; the backward recomputes them.
Numerics: logits, log-sum-exp and gradients in float32, chunks summed in a fixed order.
Floor: 2 * M * d * V FLOPs forward, 6 * M * d * V forward + backward (the recomputation is not counted).
Source: the recomputation is that of cut-cross-entropy (arXiv:2411.09009).
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 32 << 20


def linear_log_prob_reference(hidden, weight, target_ids, *, softcap=None):
    """The definition: materialises (M, V) logits, differentiable by autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


def _chunk_rows(M, V, dtype):
    return max(1, min(M, CHUNK_BYTES // (V * dtype.itemsize)))


def _logits(hidden, weight, softcap, dtype):
    logits = (hidden @ weight.T).to(dtype)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


class _ChunkedLinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target_ids, softcap):
        M, V = hidden.shape[0], weight.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(M, dtype=dtype, device=hidden.device)
        log_z = torch.empty(M, dtype=dtype, device=hidden.device)
        rows = _chunk_rows(M, V, dtype)
        for start in range(0, M, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, softcap, dtype)
            log_z[part] = logits.logsumexp(-1)
            log_probs[part] = logits.gather(1, target_ids[part, None])[:, 0] - log_z[part]
        ctx.save_for_backward(hidden, weight, target_ids, log_z)
        ctx.softcap = softcap
        return log_probs

    @staticmethod
    def backward(ctx, d_log_probs):
        hidden, weight, target_ids, log_z = ctx.saved_tensors
        M, V = hidden.shape[0], weight.shape[0]
        dtype = log_z.dtype
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        rows = _chunk_rows(M, V, dtype)
        for start in range(0, M, rows):
            part = slice(start, start + rows)
            logits = _logits(hidden[part], weight, ctx.softcap, dtype)
            d_part = d_log_probs[part, None].to(dtype)
            d_logits = (logits - log_z[part, None]).exp_().mul_(-d_part)
            d_logits.scatter_add_(1, target_ids[part, None], d_part)
            if ctx.softcap is not None:
                d_logits.mul_(1 - (logits / ctx.softcap).square_())
            d_hidden[part] = d_logits.to(hidden.dtype) @ weight
            d_weight.addmm_(d_logits.T, hidden[part].to(dtype))
        return d_hidden, d_weight.to(weight.dtype), None, None


def linear_log_prob(
    hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor, *, softcap: float | None = None
) -> torch.Tensor:
    """Log-prob of each target under softmax(softcap * tanh(hidden weight^T / softcap)).

    hidden (M, d) and weight (V, d) float, target_ids (M,) int64 in [0, V). Returns (M,) float32
    (float64 for float64 inputs), differentiable in hidden and weight. Raises ValueError on shapes that do not fit.
    """
    M, d = hidden.shape
    if weight.shape[1] != d or target_ids.shape != (M,):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and "
            f"target_ids {tuple(target_ids.shape)} do not fit (M, d), (V, d), (M,)"
        )
    return _ChunkedLinearLogProb.apply(hidden, weight, target_ids, softcap)
