"""The step-wise objective: from the rewards of actions to advantages, and from log-probs to a loss.

Loss = - sum over sub-trajectories of A * ratio-corrected log-prob + beta * KL to the reference policy, as sums over
action tokens; the caller divides by the action tokens of the whole update (all micro-batches, all ranks).
Source: SWiRL (arXiv:2504.04736) for the step-wise reward; leave-one-out baseline as in RLOO (arXiv:2402.14740);
clipped ratio as in PPO (arXiv:1707.06347); the KL estimate is k3 of Schulman's "Approximating KL divergence".
The paper reports none of clip, baseline or beta: their values are ours.
"""

from __future__ import annotations

import numpy as np
import torch


def leave_one_out_advantages(rewards: np.ndarray) -> np.ndarray:
    """Advantage of each of G actions drawn at the same state: its reward less the mean of the other draws.

    rewards (N, G) float, NaN where the judge failed -> (N, G) float64, NaN where masked. A masked draw takes no
    part in the others' baseline; a draw left alone has nothing to be compared with, and is masked too.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    present = ~np.isnan(rewards)
    others = present.sum(1, keepdims=True) - 1
    total = np.where(present, rewards, 0.0).sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        baseline = (total - rewards) / others
    return np.where(present & (others > 0), rewards - baseline, np.nan)


def policy_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    behaviour_log_probs: torch.Tensor | None = None,
    reference_log_probs: torch.Tensor | None = None,
    clip: float = 0.2,
    kl_coefficient: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one micro-batch, as a sum over its M action tokens, and sums of what to log.

    log_probs (M,) of the policy, differentiable; advantages (M,), the action's own at each of its tokens;
    behaviour_log_probs and reference_log_probs (M,), natural log. Without behaviour log-probs the ratio is 1
    (its gradient is that of the log-prob). Returns (loss_sum, {"kl", "clipped", "ratio"}), each a scalar sum.
    """
    old = log_probs.detach() if behaviour_log_probs is None else behaviour_log_probs
    ratio = (log_probs - old).exp()
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    gain = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    loss = -gain.sum()
    metrics = {"ratio": ratio.detach().sum(), "clipped": (ratio * advantages > gain).detach().float().sum()}
    if reference_log_probs is not None:
        gap = reference_log_probs - log_probs
        kl = (gap.exp() - gap - 1).sum()
        loss = loss + kl_coefficient * kl
        metrics["kl"] = kl.detach()
    return loss, metrics
