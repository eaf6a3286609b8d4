"""The packed tree: what one forward pass over many sub-trajectories needs to know."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from swirl.kernels.schedule import came_from
from swirl.kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """S sub-trajectories as one packed forest of T tokens, with M action tokens to predict: (T,) fields, then (M,).

    Query i sees key j  <=>  j <= i < subtree_end[j]  and  position_ids[i] - position_ids[j] < window.
    M runs pair by pair in the order given to `pack`, each in token order; at a fork one source row serves
    several targets, and two identical pairs share their tree tokens but have rows of their own.
    """

    input_ids: torch.Tensor  # (T,) int64: each distinct prefix token once, depth first
    position_ids: torch.Tensor  # (T,) int32: depth in its tree, from 0
    subtree_end: torch.Tensor  # (T,) int32: one past the last packed index that descends from this token
    source_rows: torch.Tensor  # (M,) int64: packed index of the token before each action token
    target_ids: torch.Tensor  # (M,) int64: the action token predicted there
    sub_trajectory: torch.Tensor  # (M,) int64: the pair it belongs to, in [0, S)
    num_sub_trajectories: int  # S
    num_separate_tokens: int  # what S separate passes would process: the sum of all pairs' lengths
    chain_lengths: tuple[int, ...] | None = None  # tokens of each tree where known not to fork (`pack_chains`)

    @property
    def num_tokens(self) -> int:
        """T, the packed tokens."""
        return self.input_ids.numel()

    @property
    def num_action_tokens(self) -> int:
        """M, duplicates counted."""
        return self.target_ids.numel()

    @property
    def token_ratio(self) -> float:
        """Separate tokens over packed tokens: the speed-up if time were tokens."""
        return self.num_separate_tokens / self.num_tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`, by one transfer that the host does not wait for."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        moved = replace(self, **dict(zip(tensors, to_device(list(tensors.values()), device), strict=True)))
        if self.subtree_end.device.type == "cpu" != moved.subtree_end.device.type:
            came_from(moved.subtree_end, moved.position_ids, (self.subtree_end, self.position_ids))
        return moved


@dataclass(frozen=True, eq=False)
class PackedStates:
    """S bare states as one packed forest of T tokens; numpy arrays, the tree as in PackedBatch.

    Token t of state s lies at packed index paths[offsets[s] + t].
    """

    input_ids: np.ndarray  # (T,) int64
    position_ids: np.ndarray  # (T,) int32
    subtree_end: np.ndarray  # (T,) int32
    paths: np.ndarray  # (N,) int64: packed index of every token of every state, state by state
    offsets: np.ndarray  # (S + 1,) int64: where each state's begin

    @property
    def last(self) -> np.ndarray:
        """(S,) packed index of each state's last token."""
        return self.paths[self.offsets[1:] - 1]
