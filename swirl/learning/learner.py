"""One update: scored actions in, packed, forward and backward over this rank's trees, one optimizer call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from swirl.config import TrainConfig
from swirl.errors import ConfigError
from swirl.kernels.chain_attention import ForkError
from swirl.learning import distributed, usage
from swirl.learning.objective import policy_loss
from swirl.learning.optimizer import clip_grad_norm, learning_rate_at, make_optimizer, set_learning_rate
from swirl.tree.batch import PackedBatch
from swirl.tree.pack import pack_chains, pack_micro_batches, separate


@dataclass(frozen=True)
class ScoredAction:
    """One sub-trajectory to learn from. Actions of one `tree` share a prefix and stay on one rank.

    `advantage` is NaN where the reward is masked; `behaviour_log_probs` (natural log, one per action id, under the
    distribution drawn from) is None where the data has none: the ratio is then 1. The policy is that of temperature 1.
    """

    tree: int
    state_ids: list[int]
    action_ids: tuple[int, ...]
    advantage: float
    behaviour_log_probs: tuple[float, ...] | None = None


class Learner:
    """A model, its optimizer, and the reference policy where a KL holds it."""

    def __init__(self, config: TrainConfig, model: torch.nn.Module):
        self.config, self.model = config, model
        self.optimizer = make_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        self.reference = copy.deepcopy(model).requires_grad_(False) if config.kl_coefficient else None

    def update(self, scored: list[ScoredAction], update: int) -> dict[str, float]:
        """One optimizer call on all ranks alike; returns what to log, summed over ranks and per action token.

        Where no rank had an action to compute there is no gradient and no call: neither momentum nor weight decay moves
        the weights. Masked actions count nowhere. Raises NonFiniteError, on every rank and before the weights are
        touched.
        """
        metrics = self.accumulate(scored)
        distributed.sum_gradients(self.model)
        metrics["grad_norm"] = clip_grad_norm(self.model, self.config.max_grad_norm).item()
        distributed.require_finite(f"update {update + 1}: loss", metrics["loss"])
        distributed.require_finite(f"update {update + 1}: gradient norm", metrics["grad_norm"])
        config = self.config
        metrics["learning_rate"] = learning_rate_at(
            update,
            config.updates,
            config.learning_rate,
            warmup=config.warmup,
            floor=config.final_learning_rate,
        )
        set_learning_rate(self.optimizer, metrics["learning_rate"])
        if metrics["computed_tokens"]:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def accumulate(self, scored: list[ScoredAction]) -> dict[str, float]:
        """Add this rank's part of the gradient of the update's loss to the weights' `grad`.

        Actions of advantage 0 have no gradient: they are not computed unless a KL is, but they count among the action
        tokens the loss is divided by. `ratio` and `clipped` are means over the tokens that are computed. Raises
        ConfigError where a tree forks and `attention` computes chains alone.
        """
        scored = [action for action in scored if not np.isnan(action.advantage)]
        num_action_tokens = max(1, sum(len(action.action_ids) for action in scored))
        live = [action for action in scored if action.advantage != 0.0 or self.reference is not None]
        num_live_tokens = max(1, sum(len(action.action_ids) for action in live))
        mine = _my_trees(live)
        totals = dict.fromkeys(("loss", "kl", "clipped", "ratio", "tokens", "computed_tokens", "flops"), 0.0)
        for batch, members in self._micro_batches(mine):
            loss_sum, metrics = self._loss(batch.to(self.model.device), [mine[i] for i in members])
            (loss_sum / num_action_tokens).backward()
            totals["loss"] += loss_sum.item() / num_action_tokens
            for name, value in metrics.items():
                totals[name] += value.item() / (num_action_tokens if name == "kl" else num_live_tokens)
            totals["tokens"] += batch.num_separate_tokens
            totals["computed_tokens"] += batch.num_tokens
            totals["flops"] += usage.update_flops(self.model.config, batch)
        sums = distributed.sum_scalars(list(totals.values()), self.model.device)
        return {**dict(zip(totals, sums, strict=True)), "action_tokens": num_action_tokens}

    def _micro_batches(self, actions: list[ScoredAction]):
        pairs = [(action.state_ids, action.action_ids) for action in actions]
        if not pairs:
            return []
        config = self.config
        if config.packed and config.attention != "tree":
            trees = [[(a.state_ids, a.action_ids) for a in tree] for _, tree in groupby(actions, lambda a: a.tree)]
            try:
                return pack_chains(trees, config.tokens_per_micro_batch)
            except ForkError as fork:
                raise ConfigError(f"--attention {config.attention}: {fork}; take --attention tree") from None
        if config.packed:
            return pack_micro_batches(pairs, config.tokens_per_micro_batch)
        return [(batch, np.array([i])) for i, batch in enumerate(separate(pairs))]

    def _loss(self, batch: PackedBatch, actions: list[ScoredAction]):
        log_probs = self.model.token_log_probs(batch)
        advantages = log_probs.new_tensor([action.advantage for action in actions])
        behaviour = log_probs.detach().clone()
        row = 0
        for action in actions:
            end = row + len(action.action_ids)
            if action.behaviour_log_probs is not None:
                behaviour[row:end] = log_probs.new_tensor(action.behaviour_log_probs)
            row = end
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference.token_log_probs(batch)
        return policy_loss(
            log_probs,
            advantages[batch.sub_trajectory],
            behaviour_log_probs=behaviour,
            reference_log_probs=reference,
            clip=self.config.clip,
            kl_coefficient=self.config.kl_coefficient,
        )


def _my_trees(scored: list[ScoredAction]) -> list[ScoredAction]:
    """This rank's actions: whole trees, dealt by the packed tokens they take at most."""
    trees: dict[int, list[ScoredAction]] = {}
    for action in scored:
        trees.setdefault(action.tree, []).append(action)
    members = list(trees.values())
    costs = [max(len(a.state_ids) for a in tree) + sum(len(a.action_ids) for a in tree) for tree in members]
    return [action for index in distributed.deal(costs)[distributed.rank()] for action in members[index]]
