"""The step-wise objective: from the rewards of actions to advantages, and from log-probs to a loss.

Loss = - sum over sub-trajectories of A * ratio-corrected log-prob + beta * KL to the reference policy, as sums over
action tokens; the caller divides by the action tokens of the whole update (all micro-batches, all ranks).
Source: SWiRL (arXiv:2504.04736) for the step-wise reward; leave-one-out baseline as in RLOO (arXiv:2402.14740);
clipped ratio as in PPO (arXiv:1707.06347); the KL estimate is k3 of Schulman's "Approximating KL divergence".
The paper reports none of clip, baseline or beta: their values are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from swirl.config import TrainConfig
from swirl.learning.batches import SubTrajectory, behaviour_log_probs, token_advantages
from swirl.tree.batch import PackedBatch

Baseline = Literal["none", "mean", "leave_one_out"]


def advantages_of(rewards: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Each reward less its baseline. rewards (N, G), a row for each group of actions to be compared, NaN where there is
    none -> (N, G) float64, NaN where masked. Equal rewards have an advantage of exactly 0 (but for `none`).

    none: 0. mean: the mean of all rewards of the update. leave_one_out: the mean of the other rewards of the row.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if baseline == "none":
        return rewards
    if baseline == "leave_one_out":
        return leave_one_out_advantages(rewards)
    present = rewards[~np.isnan(rewards)]
    if not present.size:
        return rewards
    equal = present.min() == present.max()  # their rounded mean may differ from them
    return rewards - (present[0] if equal else present.mean())


def leave_one_out_advantages(rewards: np.ndarray) -> np.ndarray:
    """Advantage of each of G actions drawn at the same state: its reward less the mean of the other draws.

    rewards (N, G) float, NaN where the judge failed -> (N, G) float64, NaN where masked. A masked draw takes no
    part in the others' baseline; a draw left alone has nothing to be compared with, and is masked too.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    present = ~np.isnan(rewards)
    others = present.sum(1, keepdims=True) - 1
    values = np.where(present, rewards, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        baseline = (values.sum(1, keepdims=True) - rewards) / others
    advantages = np.where(present & (others > 0), rewards - baseline, np.nan)
    highest = np.where(present, rewards, -np.inf).max(1, keepdims=True)
    lowest = np.where(present, rewards, np.inf).min(1, keepdims=True)
    return np.where((highest == lowest) & ~np.isnan(advantages), 0.0, advantages)


class Objective:
    """The loss of a micro-batch, with the reference policy where a KL holds the policy: the model as it is now."""

    def __init__(self, config: TrainConfig, model: torch.nn.Module):
        self.clip, self.kl_coefficient = config.clip, config.kl_coefficient
        self.reference = copy.deepcopy(model).requires_grad_(False) if config.kl_coefficient else None

    def has_gradient(self, action: SubTrajectory) -> bool:
        """Whether the action must be computed: not masked, and of an advantage other than 0 unless there is a KL."""
        return not np.isnan(action.advantage) and (action.advantage != 0.0 or self.reference is not None)

    def __call__(
        self, model: torch.nn.Module, batch: PackedBatch, actions: Sequence[SubTrajectory]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss, differentiable, a sum over the batch's M action tokens; sums of what to log)."""
        log_probs = model.token_log_probs(batch)
        with torch.no_grad():
            reference_log_probs = None if self.reference is None else self.reference.token_log_probs(batch)
        loss, sums = policy_loss(
            log_probs,
            token_advantages(batch, actions, like=log_probs),
            behaviour_log_probs=behaviour_log_probs(actions, like=log_probs),
            reference_log_probs=reference_log_probs,
            clip=self.clip,
            kl_coefficient=self.kl_coefficient,
        )
        return loss, {"loss": loss.item(), **{name: value.item() for name, value in sums.items()}}


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
    behaviour_log_probs and reference_log_probs (M,), natural log. Where a behaviour log-prob is NaN, or none are given,
    the ratio is 1 (its gradient is that of the log-prob). Returns (loss_sum, {"kl", "clipped", "ratio"}), each a scalar
    sum.
    """
    now = log_probs.detach()
    old = now if behaviour_log_probs is None else torch.where(behaviour_log_probs.isnan(), now, behaviour_log_probs)
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
