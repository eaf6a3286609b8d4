"""What an update costs: FLOPs by arithmetic, the machine's peak by measurement, memory from the system."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import resource
import subprocess
import time
from pathlib import Path

import torch

from swirl.kernels.linear import goes_through_float32, linear

M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 128 << 10  # of glibc's malloc.h, and the limit that it begins with
MANY_WEIGHTS = 500_000_000  # of a model whose passes leave much of a heap behind


def num_adapter_weights(config, rank: int) -> int:
    """Of adapters of that rank on the seven matrices of every layer."""
    heads = config.num_attention_heads + config.num_key_value_heads
    in_and_out = 7 * config.hidden_size + 2 * config.head_dim * heads + 3 * config.intermediate_size
    return rank * config.num_hidden_layers * in_and_out


def update_flops(config, batch, *, lora_rank: int = 0) -> float:
    """`flops_of` one packed batch."""
    return flops_of(config, batch.position_ids, batch.num_action_tokens, lora_rank=lora_rank)


def flops_of(config, position_ids: torch.Tensor, num_action_tokens: int, *, lora_rank: int = 0) -> float:
    """Forward and backward FLOPs under a GemmaConfig of packed tokens at these positions (T,): 6 per weight and token,
    the head on action rows alone, attention 4 * heads * head_dim a visible pair forward and 2.5 times that backward.
    With adapters of `lora_rank` 4 per weight, which is frozen, and 6 per weight of theirs."""
    weights, adapters, attention = layer_flops(config, position_ids, lora_rank=lora_rank)
    head = head_flops(config, num_action_tokens)
    return (2 if lora_rank else 3) * (weights + head) + 3 * adapters + 3.5 * attention


def layer_flops(config, position_ids: torch.Tensor, *, lora_rank: int = 0) -> tuple[float, float, float]:
    """Those of all layers forward: of their weights, of adapters beside them, of attention."""
    d, D = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = config.num_hidden_layers * (2 * d * D * (heads + kv_heads) + 3 * d * config.intermediate_size)
    depth = position_ids.double() + 1
    pairs = 0.0
    for layer in range(config.num_hidden_layers):
        window = config.window(layer)
        pairs += (depth if window is None else depth.clamp(max=window)).sum().item()
    tokens = position_ids.numel()
    return 2 * weights * tokens, 2 * num_adapter_weights(config, lora_rank) * tokens, 4 * heads * D * pairs


def head_flops(config, num_action_tokens: int) -> float:
    """Those of the head forward."""
    return 2 * num_action_tokens * config.hidden_size * config.vocab_size


@functools.cache
def measured_peak_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a square matrix product, the best of a few, torch's or ours: what utilization is held against.

    Measured once. A few are no more than fit into a second, one of each at least. Where ours goes through float32,
    torch's is left out: one in bfloat16 takes such a CPU eight seconds.
    """
    size = size if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best, began = float("inf"), time.perf_counter()
    products = (linear,) if goes_through_float32(a, b) else (linear, torch.matmul)
    for number, product in enumerate(products * 4):
        if number >= 2 and time.perf_counter() - began > 1:
            break
        _synchronize(device)
        started = time.perf_counter()
        product(a, b)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(model, sums: dict[str, float], peak_flops: float, *, wall_s: float, sample_s: float) -> dict[str, float]:
    """What an update of `wall_s`, `sample_s` of them for its actions and rewards, logs of time and memory.

    `sums`, over all ranks, has the tokens that were computed, those that separate passes would compute, and the FLOPs;
    `peak_flops` is the sum of the ranks' peaks. `utilization` (MFU) is the share of it that was used outside
    `sample_s`: what a rank computes, held against that rank's peak, averaged over ranks.
    """
    return {
        "update_s": wall_s,
        "sample_s": sample_s,
        "tokens_per_s": sums["tokens"] / wall_s,
        "computed_tokens_per_s": sums["computed_tokens"] / wall_s,
        "utilization": sums["flops"] / (wall_s - sample_s) / peak_flops if peak_flops else 0.0,
        "peak_bytes": peak_bytes(model.device),
    }


def peak_rss_bytes() -> int:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_bytes(device: torch.device) -> int:
    """The most device memory held, on a CPU that of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def memory_limit(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """The least limit, in bytes, of this process's control groups and those around them, such as a container's;
    infinity where there is none. `own` lists the groups as the kernel does, `mounted` holds their files, of version 2
    or 1. A container that sees itself as the root finds its limit there.
    """
    least = math.inf
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        group = root / path.lstrip("/")
        for file in (folder / name for folder in (group, *group.parents)):
            limit = file.read_text().strip() if file.is_file() else "max"
            least = min(least, math.inf if limit == "max" else int(limit))
    return least


def unmap_what_is_freed() -> None:
    """Have glibc give back what is freed: each block from MAPPED_BYTES on is mapped alone. Elsewhere nothing is done.

    By itself glibc raises that limit to 32 MiB as such blocks are freed; aligned blocks below it then come from a heap
    that fragments. A rank of shards held 2.4 times what was live, and a 2b's forward pass 165 MB more with each layer
    (docs/log.md). An environment that sets the limit is left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def commit() -> str:
    """The commit of swirl's own checkout, with `+` where it was changed; the package's version where it is none."""
    from swirl import __version__

    root = Path(__file__).resolve().parents[2]

    def git(*words):
        return subprocess.run(
            ("git", "-C", str(root), *words),
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return __version__  # of a repository that merely encloses the installation
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return __version__
