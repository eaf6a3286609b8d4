"""From actions to micro-batches: what an update takes, which rank computes it, and how it is packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from swirl.errors import ConfigError
from swirl.kernels.chain_attention import ForkError
from swirl.kernels.transfer import to_device
from swirl.learning import distributed
from swirl.learning.usage import update_flops
from swirl.model.config import GemmaConfig
from swirl.tree.batch import PackedBatch
from swirl.tree.pack import pack, pack_chains, pack_micro_batches, separate

if TYPE_CHECKING:
    from swirl.config import TrainConfig
    from swirl.trajectories.record import Step


@dataclass(frozen=True)
class SubTrajectory:
    """One action to learn from, in its state. Actions of one `tree` share a prefix and stay on one rank.

    `k` is the step's number, from 0. `advantage` is NaN where the action is masked: it then counts nowhere.
    """

    tree: int
    k: int
    state_ids: Sequence[int]
    step: Step
    advantage: float


def shuffled(num_trajectories: int, per_update: int, seed: int) -> Iterator[list[int]]:
    """Indices of the trajectories of each update, forever: shuffled anew each time round, the same on every rank."""
    rng = np.random.default_rng(seed)
    waiting = rng.permutation(num_trajectories)
    while True:
        while len(waiting) < per_update:
            waiting = np.concatenate([waiting, rng.permutation(num_trajectories)])
        yield waiting[:per_update].tolist()
        waiting = waiting[per_update:]


def present(actions: Sequence[SubTrajectory]) -> list[SubTrajectory]:
    """Those that are not masked."""
    return [action for action in actions if not np.isnan(action.advantage)]


def num_tokens(actions: Sequence[SubTrajectory]) -> int:
    """Action tokens in all."""
    return sum(len(action.step.action_ids) for action in actions)


def assigned_here(actions: Sequence[SubTrajectory], model: GemmaConfig) -> list[SubTrajectory]:
    """This rank's actions: whole trees, balanced by the FLOPs they take in a model of that config."""
    trees: dict[int, list[SubTrajectory]] = {}
    for action in actions:
        trees.setdefault(action.tree, []).append(action)
    members = list(trees.values())
    if distributed.world_size() == 1:
        return [action for tree in members for action in tree]
    costs = [update_flops(model, pack((a.state_ids, a.step.action_ids) for a in tree)) for tree in members]
    return [action for index in distributed.assign(costs)[distributed.rank()] for action in members[index]]


def rank_micro_batches(
    mine: Sequence[SubTrajectory], everyone_s: Sequence[SubTrajectory], config: TrainConfig
) -> list[tuple[PackedBatch, list[SubTrajectory], float]]:
    """(batch, its actions, weight) of this rank, as many on every rank, so that ranks can meet within each of them.

    All are of weight 1, but where a rank has fewer: the shortest action of any rank then stands in, with weight 0.
    The largest come first on every rank. Raises ConfigError as `micro_batches` does.
    """
    batches = micro_batches(mine, config)
    number = distributed.most(len(batches))
    if distributed.world_size() > 1 and mine:
        batches = micro_batches(mine, config, num_batches=number)
    batches.sort(key=lambda one: -one[0].num_tokens)
    weighted = [(batch, members, 1.0) for batch, members in batches]
    if len(weighted) < number:
        stand_in = min(everyone_s, key=lambda action: len(action.state_ids) + len(action.step.action_ids))
        weighted += [(*one, 0.0) for one in micro_batches([stand_in], config)] * (number - len(weighted))
    return weighted


def micro_batches(
    actions: Sequence[SubTrajectory], config: TrainConfig, *, num_batches: int | None = None
) -> list[tuple[PackedBatch, list[SubTrajectory]]]:
    """(batch, its actions in the batch's order) of at most `tokens_per_micro_batch` packed tokens each.

    With `num_batches`, at least as many as there would be, trees are cut into so many of like sizes where they can be.

    Raises ConfigError where a tree forks and `attention` computes chains alone.
    """
    pairs = [(action.state_ids, action.step.action_ids) for action in actions]
    if not pairs:
        return []
    if not config.packed:
        return [(batch, [action]) for batch, action in zip(separate(pairs), actions, strict=True)]
    if config.attention == "tree":
        packed = pack_micro_batches(pairs, config.tokens_per_micro_batch, num_batches=num_batches)
    else:
        trees = [[(a.state_ids, a.step.action_ids) for a in tree] for _, tree in groupby(actions, lambda a: a.tree)]
        try:
            packed = pack_chains(trees, config.tokens_per_micro_batch)
        except ForkError as fork:
            raise ConfigError(f"--attention {config.attention}: {fork}; take --attention tree") from None
    return [(batch, [actions[i] for i in members]) for batch, members in packed]


def token_advantages(batch: PackedBatch, actions: Sequence[SubTrajectory], like: torch.Tensor) -> torch.Tensor:
    """(M,) the advantage of each token's action, in the dtype and on the device of `like`."""
    return _on_device([action.advantage for action in actions], like)[batch.sub_trajectory]


def behaviour_log_probs(actions: Sequence[SubTrajectory], like: torch.Tensor) -> torch.Tensor:
    """(M,) the log-probs that the actions were drawn with, NaN for the tokens of an action that carries none."""
    values = (a.step.log_probs or (float("nan"),) * len(a.step.action_ids) for a in actions)
    return _on_device([value for of_action in values for value in of_action], like)


def _on_device(values: list[float], like: torch.Tensor) -> torch.Tensor:
    """In the dtype and on the device of `like`, which the host does not wait for."""
    return to_device([torch.tensor(values, dtype=like.dtype, device="cpu")], like.device)[0]
