"""Activations that the backward pass makes again instead of keeping them: those that cost no matrix product."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def kept_as(make: Callable[[], torch.Tensor] | None, tensor: torch.Tensor) -> AbstractContextManager:
    """What the body saves of `tensor` for its backward pass is `make`, which must give the same bits; None keeps it.

    `make` may hold tensors that are kept anyway. It is called once for all that saved `tensor` in the body, and what it
    made is held until the last of them has read it.
    """
    if make is None:
        return nullcontext()
    remade = _Remade(make, tensor)
    return torch.autograd.graph.saved_tensors_hooks(remade.pack, remade.unpack)


class _Remade:
    def __init__(self, make, tensor):
        self._make, self._is = make, (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        self._num_saved = self._num_read = 0
        self._made: torch.Tensor | None = None

    def pack(self, tensor):
        if (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) != self._is:
            return tensor
        self._num_saved += 1
        return self

    def unpack(self, packed):
        if packed is not self:
            return packed
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
        made = self._made
        self._num_read += 1
        if self._num_read % self._num_saved == 0:
            self._made = None
        return made
