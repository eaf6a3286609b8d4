"""Digests of what lies on disk."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

_BLOCKS, _BLOCK_BYTES = 256, 4096


def checkpoint_digest(folder: Path) -> str:
    """Tells what lies in a checkpoint's folder from what lay there before it was trained on. Raises OSError.

    Of config.json, tokenizer.json and all *.safetensors it takes name, size and 256 blocks of 4 KiB, evenly spread from
    the first byte to the last: a file of up to 1 MiB whole, and any other in milliseconds. Training moves nearly every
    weight, so a MiB of them shows it. Times are left out: a copy is the same checkpoint.
    """
    digest = blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix != ".safetensors" and path.name not in ("config.json", "tokenizer.json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for k in range(_BLOCKS):
                file.seek(max(k * _BLOCK_BYTES, k * (size - _BLOCK_BYTES) // (_BLOCKS - 1)))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
