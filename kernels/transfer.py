"""Small tensors of the host on a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ALIGNMENT = 16  # bytes: what torch's own allocations keep to, and Triton compiles kernels for


def to_device(tensors: Sequence[torch.Tensor], device: torch.device | str) -> list[torch.Tensor]:
    """The tensors on `device`. From the host to another device they go as one, out of page-locked memory where that is
    CUDA, so that the host does not wait for what runs there.
    """
    device = torch.device(device)
    if device.type == "cpu" or any(x.device.type != "cpu" for x in tensors):
        return [x.to(device) for x in tensors]
    return as_one(tensors, device, pin=device.type == "cuda")


def as_one(tensors: Sequence[torch.Tensor], device: torch.device, *, pin: bool) -> list[torch.Tensor]:
    """`to_device` through one buffer, which the results are parts of; each begins at a multiple of ALIGNMENT."""
    ends, end = [], 0
    for x in tensors:
        end = -(-end // ALIGNMENT) * ALIGNMENT + x.nbytes
        ends.append(end)
    staged = torch.empty(end, dtype=torch.uint8, pin_memory=pin)

    def part(buffer, x, end):
        return buffer[end - x.nbytes : end].view(x.dtype).view(x.shape)

    for x, end in zip(tensors, ends, strict=True):
        part(staged, x, end).copy_(x)
    arrived = staged.to(device, non_blocking=True)
    return [part(arrived, x, end) for x, end in zip(tensors, ends, strict=True)]
