"""The gradient of an update: forward and backward over each rank's micro-batches, summed over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from swirl.learning import distributed, sharding, usage
from swirl.learning.batches import SubTrajectory, assigned_here, rank_micro_batches
from swirl.learning.objective import Objective
from swirl.model.gemma import Gemma

if TYPE_CHECKING:
    from swirl.config import TrainConfig


def accumulate(
    model: Gemma, objective: Objective, live: Sequence[SubTrajectory], num_action_tokens: int, config: TrainConfig
) -> dict[str, float]:
    """Add the gradient of the update's loss to that of the weights: of the sum over `live`, the actions of all ranks
    that must be computed, divided by `num_action_tokens`, those of the whole update.

    Returns sums over all ranks of what the objective measures (of a `_max` the largest); of `tokens` that separate
    passes would compute, of `computed_tokens` and of `flops`; and the `balance` of the ranks, their mean FLOPs over the
    largest.
    """
    sums = dict.fromkeys((*objective.measures, "tokens", "computed_tokens", "flops"), 0.0)
    of_passes = []
    batches = rank_micro_batches(assigned_here(live, model.config), live, config)
    for number, (batch, members, weight) in enumerate(batches, 1):
        sharding.reduce_over_hosts(model, number == len(batches))
        with distributed.meeting():
            loss, measured = objective(model, batch.to(model.device), members)
            (loss * (weight / num_action_tokens)).backward()
        known = {"tokens": batch.num_separate_tokens, "computed_tokens": batch.num_tokens}
        known["flops"] = usage.update_flops(model.config, batch, lora_rank=model.lora.rank if model.lora else 0)
        of_passes.append((weight, known, measured))
    objective.free()
    for weight, known, measured in of_passes:  # read when all are under way, since to read is to wait
        values = torch.stack([value.double() for value in measured.values()]).tolist()
        for name, value in (known | dict(zip(measured, values, strict=True))).items():
            sums[name] = max(sums[name], weight * value) if name.endswith("_max") else sums[name] + weight * value
    of_ranks = distributed.gather_shares([sums], dict[str, float])
    distributed.sum_gradients(model)
    flops = [of_rank["flops"] for of_rank in of_ranks]
    balance = sum(flops) / (len(flops) * max(flops)) if max(flops) else 1.0
    joined = {name: (max if name.endswith("_max") else sum)(one[name] for one in of_ranks) for name in sums}
    return {**joined, "balance": balance}
