"""The objective: from the rewards of actions to advantages, and from log-probs to the loss of a micro-batch.

All modes minimise, over the N action tokens of the update (all micro-batches, all ranks; the caller divides by N),

    L = 1/N sum_t l_t  +  beta/N sum_t KL(pi_t || ref_t)

with A the advantage of the token's action and pi_t the policy's distribution there, at the temperature of the draws:

    mode        actions                            A                                       l_t
    sampled     G draws at each recorded state     R(s, a) - mean of the other draws' R    - min(r_t A, clip(r_t) A)
    recorded    those in the data                  R(s, a)                                 - A log pi_t
    imitation   those in the data                  1                                       - log pi_t
    outcome-rl  G whole trajectories a question    outcome - mean of the others' outcome   - min(r_t A, clip(r_t) A)

where r_t = pi_t / drawn_t is the ratio to the policy as it was when it drew, and clip keeps it in [1 - eps, 1 + eps].

With --proximal-every, recorded actions are corrected for the policy that drew them, as decoupled PPO does:
l_t = - w_t min(r_t A, clip(r_t) A), r_t = pi_t / proximal_t, w_t = min(proximal_t / behaviour_t, 2), where the proximal
policy is a copy of the policy, refreshed every so many updates.
docs/objective.md derives and compares them.
Source: SWiRL (arXiv:2504.04736) for the step-wise reward; leave-one-out baseline as in RLOO (arXiv:2402.14740);
clipped ratio as in PPO (arXiv:1707.06347), decoupled as in arXiv:2110.00641; gradient of the KL as in arXiv:2506.09477.
The paper reports none of clip, baseline or beta: their values are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from swirl.kernels.linear_kl import linear_kl
from swirl.learning import sharding
from swirl.learning.batches import SubTrajectory, behaviour_log_probs, token_advantages
from swirl.model.lora import adapters_off
from swirl.tree.batch import PackedBatch

if TYPE_CHECKING:
    from swirl.config import TrainConfig

Baseline = Literal["none", "mean", "leave_one_out"]
MAX_IMPORTANCE_WEIGHT = 2.0  # ours: a token is never worth more than twice what it would be on policy


def advantages_of(rewards: np.ndarray, baseline: Baseline) -> np.ndarray:
    """Each reward less its baseline. rewards (N, G), a row for each group that is compared, NaN where there is none ->
    (N, G) float64, NaN where masked. With a baseline, equal rewards have an advantage of exactly 0.

    none: R. mean: R - mean of all rewards of the update. leave_one_out: R - mean of the other rewards of the row.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if baseline == "none":
        return rewards
    if baseline == "leave_one_out":
        return leave_one_out_advantages(rewards)
    present = rewards[~np.isnan(rewards)]
    if not present.size:
        return rewards
    equal = present.min() == present.max()  # the rounded mean of equal rewards may differ from them
    return rewards - (present[0] if equal else present.mean())


def leave_one_out_advantages(rewards: np.ndarray) -> np.ndarray:
    """A_i = R_i - mean over j != i of R_j, in each row.

    rewards (N, G) float, NaN where the judge failed -> (N, G) float64, NaN where masked. A masked draw takes no
    part in the others' baseline; a draw left alone has nothing to be compared with, and is masked too.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    present = ~np.isnan(rewards)
    others = present.sum(1, keepdims=True) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        baseline = (np.where(present, rewards, 0.0).sum(1, keepdims=True) - rewards) / others
    advantages = np.where(present & (others > 0), rewards - baseline, np.nan)
    highest = np.where(present, rewards, -np.inf).max(1, keepdims=True)
    lowest = np.where(present, rewards, np.inf).min(1, keepdims=True)
    return np.where((highest == lowest) & ~np.isnan(advantages), 0.0, advantages)


class Objective:
    """The loss of a micro-batch under a config, with the policies it needs beside the one that is trained.

    `reference` is the model as it was given, where a KL holds the policy to it: a copy, but of a model with adapters it
    is the model itself, computed with them off. `proximal` is the model at the last `refresh`, where recorded actions
    are corrected for being off policy; it shares the weights that are not trained. `measures` names what a call
    measures: the same on all ranks, and nothing that is not measured.
    """

    def __init__(self, config: TrainConfig, model: torch.nn.Module):
        self.clip, self.kl_coefficient = config.clip, config.kl_coefficient
        self.proximal_every = config.proximal_every
        self.on_policy = config.mode in ("sampled", "outcome-rl")
        self.temperature = config.temperature if self.on_policy else 1.0
        self.reference = (model if model.lora else sharding.frozen_copy(model)) if config.kl_coefficient else None
        self._trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        self.proximal: torch.nn.Module | None = None
        has_ratio = self.on_policy or self.proximal_every
        self.measures = ("loss", "entropy", *(("ratio", "clipped") if has_ratio else ()))
        self.measures += ("sampler_gap", "sampler_gap_max") if self.on_policy else ()
        self.measures += ("kl",) if self.reference is not None else ()

    def refresh(self, model: torch.nn.Module, update: int) -> None:
        """To be called before each update, counted from 0: renews the proximal policy where it is due."""
        if self.proximal_every and update % self.proximal_every == 0:
            self.proximal = sharding.frozen_copy(model)

    def free(self) -> None:
        """Drop what passes of sharded policies have gathered."""
        sharding.free(self.reference)
        sharding.free(self.proximal)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The proximal policy's trained weights, where there is one. The reference is the model the run began with."""
        weights = {} if self.proximal is None else self.proximal.state_dict()
        return {f"proximal.{name}": weights[name] for name in self._trained if name in weights}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
        """The inverse of `state_tensors`, from among `tensors`; `model` is of the same shape. Raises ValueError."""
        weights = {name.removeprefix("proximal."): tensors[name] for name in tensors if name.startswith("proximal.")}
        if weights:
            self.proximal = sharding.frozen_copy(model)
            if weights.keys() != set(self._trained):
                raise ValueError("expected a proximal policy of the same trained weights")
            self.proximal.load_state_dict(weights, strict=False)

    def has_gradient(self, action: SubTrajectory) -> bool:
        """Whether the action must be computed: not masked, and of an advantage other than 0 unless there is a KL."""
        return not np.isnan(action.advantage) and (action.advantage != 0.0 or self.reference is not None)

    def __call__(
        self, model: torch.nn.Module, batch: PackedBatch, actions: Sequence[SubTrajectory]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss, differentiable, a sum over the batch's M action tokens; such sums of all that `measures` names, of a
        name that ends in `_max` the largest: scalars where the model lies, so that the host need not wait for them).
        """
        hidden = model.action_hidden(batch)
        log_probs, entropy = model.head_log_probs(
            hidden, batch.target_ids, temperature=self.temperature, return_entropy=True
        )
        old, weights = self._old_and_weights(batch, actions, log_probs)
        loss, measured = policy_loss(
            log_probs, token_advantages(batch, actions, like=log_probs), old, weights=weights, clip=self.clip
        )
        if self.on_policy:  # the sampler's log-probs of the same ids, apart by rounding, or by a step where drawn ahead
            gap = (log_probs.detach() - old).abs()
            measured |= {"sampler_gap": gap.sum(), "sampler_gap_max": gap.max()}
        if self.reference is not None:
            kl = self._kl(model, batch, hidden)
            within = batch.sub_trajectory if self.on_policy else None
            loss = loss + self.kl_coefficient * kl_loss(kl, log_probs, within)
            measured["kl"] = kl.detach().sum()
        measured |= {"loss": loss.detach(), "entropy": entropy.detach().sum()}
        return loss, {name: measured[name] for name in self.measures}

    def _old_and_weights(self, batch, actions, log_probs):
        """(M,) log-probs of the policy that the clip is held against, None: there is no ratio; and weights, None: 1."""
        if self.on_policy:
            return behaviour_log_probs(actions, like=log_probs), None
        if not self.proximal_every:
            return None, None
        with torch.no_grad():
            proximal = self.proximal.token_log_probs(batch)
        behaviour = behaviour_log_probs(actions, like=log_probs)
        return proximal, (proximal - behaviour).exp().clamp(max=MAX_IMPORTANCE_WEIGHT)

    def _kl(self, model, batch, hidden):
        """(M,) KL of the policy to the reference at each action token, over all vocabulary entries."""
        with torch.no_grad(), adapters_off(self.reference):
            reference_hidden, _ = self.reference.at_temperature(self.reference.action_hidden(batch), self.temperature)
        hidden, softcap = model.at_temperature(hidden, self.temperature)
        weight, reference_weight = (m.model.embed_tokens.weight for m in (model, self.reference))
        return linear_kl(hidden, weight, reference_hidden, reference_weight, softcap=softcap)


def policy_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    old_log_probs: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    clip: float = 0.2,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """- sum_t w_t min(r_t A_t, clip(r_t, 1 - clip, 1 + clip) A_t), with r_t = exp(log_probs - old_log_probs).

    log_probs (M,) of the policy, natural log, differentiable; advantages (M,), the action's own at each of its tokens;
    old_log_probs (M,); weights (M,), None: 1. Returns (loss, {"ratio": sum of r, "clipped": tokens that the clip
    holds}). Without old_log_probs there is no ratio: the loss is - sum_t A_t log_probs_t, and the dict is empty.
    """
    if old_log_probs is None:
        return -(advantages * log_probs).sum(), {}
    ratio = (log_probs - old_log_probs).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    loss = -(gain if weights is None else weights * gain).sum()
    return loss, {"ratio": ratio.detach().sum(), "clipped": (ratio * advantages > gain).detach().sum()}


def kl_loss(kl: torch.Tensor, log_probs: torch.Tensor, sub_trajectory: torch.Tensor | None = None) -> torch.Tensor:
    """A scalar whose value is sum_t KL_t, the KL of the policy to the reference at each action token, and whose
    gradient is that of the KL.

    kl (M,), differentiable, exact at each token; log_probs (M,) of the tokens. At the tokens of recorded actions that
    is all. Where the policy drew the actions itself (`sub_trajectory` (M,) says which token belongs to which), a token
    also decides where the action goes on, so the KL of a whole action has the gradient

        sum_t grad KL_t + (sum over later tokens u of KL_u) * grad log pi_t

    in expectation over the draws. A single draw's k3, differentiated, has that of KL(ref || pi) instead.
    Source: arXiv:2506.09477; exact at each token as in arXiv:2504.10637.
    """
    loss = kl.sum()
    if sub_trajectory is None:
        return loss
    values = kl.detach().double()
    totals = torch.zeros_like(values).index_add(0, sub_trajectory, values)  # there are no more actions than tokens
    through = values.cumsum(0) - (totals.cumsum(0) - totals)[sub_trajectory]  # of the action, this token included
    later = (totals[sub_trajectory] - through).to(log_probs.dtype)
    return loss + (later * (log_probs - log_probs.detach())).sum()
