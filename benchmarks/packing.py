"""How fast are sub-trajectories packed into trees? One core; the rate counts input tokens.

  python -m benchmarks.packing [--tokens 1000000] [--json]

Workloads: chain (8 steps of recorded actions), comb (8 states with 4 sampled actions each), agent (50 steps of 60 + 580
tokens), and pairs that share nothing, where the cost is a pair's, not its tokens'. `pack` takes Python lists,
`pack_flat` flat arrays, `pack_micro_batches` cuts at 65,536. Floor: each input token is read once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import append
from benchmarks.train_step import cpu_name
from swirl.learning.usage import commit
from swirl.tree.pack import _flatten, pack, pack_flat, pack_micro_batches

SHAPES = {"chain": (8, 20, 60, 1), "comb": (8, 20, 60, 4), "agent": (50, 60, 580, 1), "unrelated": (1, 2, 0, 1)}


def sub_trajectories(name: str, tokens: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Pairs of about `tokens` input tokens in all."""
    rng = np.random.default_rng(seed)
    steps, action, observation, samples = SHAPES[name]
    pairs, total = [], 0
    while total < tokens:
        state = rng.integers(0, 256_000, 3 if name == "unrelated" else 150).tolist()
        for _ in range(steps):
            draws = [rng.integers(0, 256_000, action).tolist() for _ in range(samples)]
            pairs += [(list(state), draw) for draw in draws]
            total += samples * (len(state) + action)
            state += draws[0] + rng.integers(0, 256_000, observation).tolist()
    return pairs


def seconds(function, *arguments, repeats: int = 7) -> float:
    """Median of `repeats` calls after a first."""
    function(*arguments)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="one JSON row a workload instead of the table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    args = parser.parse_args()
    for name in SHAPES:
        pairs = sub_trajectories(name, args.tokens)
        flat = _flatten(pairs)
        batch = pack(pairs)
        row = {
            "benchmark": "packing",
            "workload": name,
            "input_tokens": batch.num_separate_tokens,
            "packed_tokens": batch.num_tokens,
            "sub_trajectories": batch.num_sub_trajectories,
            "pack_tokens_per_s": batch.num_separate_tokens / seconds(pack, pairs),
            "pack_flat_tokens_per_s": batch.num_separate_tokens / seconds(pack_flat, *flat),
            "pack_micro_batches_tokens_per_s": batch.num_separate_tokens / seconds(pack_micro_batches, pairs, 65_536),
            "hardware": cpu_name(),
            "commit": commit(),
        }
        append(args.out, [row])
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            rates = "  ".join(
                f"{way} {row[f'{way}_tokens_per_s'] / 1e6:7.1f}" for way in ("pack", "pack_flat", "pack_micro_batches")
            )
            print(f"{name:<10} {row['input_tokens']:>9,} tokens in {row['sub_trajectories']:>7,} pairs   M/s: {rates}")


if __name__ == "__main__":
    main()
