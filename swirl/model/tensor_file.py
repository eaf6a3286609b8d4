"""safetensors files, read a piece at a time, of a sharded tensor this rank's rows alone, and written one tensor at a
time: a tensor may be made when its turn comes, and is freed after it.

Source: the format, https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from swirl.errors import CheckpointError

PIECE_BYTES = 1 << 28  # read of a file at a time

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Deferred:
    """A tensor that `make` makes when it is written: gathered from its shards, say."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor | Deferred]) -> None:
    """Write a new file, tensors in their order. Raises OSError."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            made = tensor.make() if isinstance(tensor, Deferred) else tensor
            out.write(made.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            del made


def open_tensors(file: Path):
    """A safetensors file, opened to be read. Raises CheckpointError."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(file, "no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file, f"truncated, or not a safetensors file ({error})") from None


@torch.no_grad()
def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(what of a tensor this rank holds, the number of its first row): all of it, or a shard's rows."""
    if not hasattr(tensor, "device_mesh"):
        return tensor.detach(), 0
    ranks, rank = tensor.device_mesh.size(-1), tensor.device_mesh.get_coordinate()[-1]
    return tensor.to_local(), min(tensor.shape[0], rank * -(-tensor.shape[0] // ranks))


def pieces_of(file: Path, name: str, own: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(rows of `own`, the same of the file's tensor, whose row `first` is own's row 0), some PIECE_BYTES at a time.

    What has been read of an open file stays mapped, and counts as this process's memory: each piece opens it anew.
    """
    at_once = max(1, PIECE_BYTES // max(1, own[:1].nbytes))
    for start in range(0, len(own), at_once):
        rows = own[start : start + at_once]
        with open_tensors(file) as tensors:
            yield rows, tensors.get_slice(name)[first + start : first + start + len(rows)]


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all that a safetensors file holds, one at a time, as copies. Raises CheckpointError."""
    with open_tensors(file) as tensors:
        names = list(tensors.keys())
    for name in names:
        yield name, read_tensor(file, name)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, as a copy. Raises CheckpointError."""
    with open_tensors(file) as tensors:
        try:
            return tensors.get_tensor(name).clone()
        except SafetensorError as error:
            raise CheckpointError(file, f"tensor '{name}': {error}") from None
