"""AdamW for fine-tuning, Muon for training from nothing, their schedule, and clipping by the global norm."""

from __future__ import annotations

import torch


def make_optimizer(
    model: torch.nn.Module, *, learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95); norms (1-d weights) are never decayed."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def make_optimizers_from_nothing(
    model: torch.nn.Module, *, embedding: torch.nn.Parameter, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms, at one learning rate.

    From random weights Muon needs a fraction of AdamW's updates (docs/log.md).
    Source: Keller Jordan, "Muon", 2024; update scaled to AdamW's RMS as in arXiv:2502.16982.
    """
    layers = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(layers, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [embedding, *norms], lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def learning_rate_at(update: int, num_updates: int, peak: float, *, warmup: int, floor: float) -> float:
    """Linear warm-up over `warmup` updates, then linear decay to `floor` times the peak at the last update."""
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, num_updates - 1 - warmup)
    return peak * (1 - (1 - floor) * min(1.0, done))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_grad_norm(model: torch.nn.Module, limit: float) -> torch.Tensor:
    """Scale gradients in place to a global L2 norm of at most `limit`; returns the norm before, a scalar."""
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
