"""How much faster is the packed update than one pass a sub-trajectory, and how near to the token ratio?

  python -m benchmarks.train_step            the README's chain and comb workloads, on this machine
  python -m benchmarks.train_step --json     one row a workload

Workloads (token ids drawn at random, the shape of a question with a search tool):
  chain   8 steps of recorded actions: prompt 150 tokens, actions of 20, observations of 60
  comb    the same 8 states with 4 sampled actions at each
Both sides make the same update (loss and gradient norm are compared) with the model that ships with swirl, or --model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace

import numpy as np
import torch

from swirl.config import TrainConfig
from swirl.learning.learner import Learner, ScoredAction
from swirl.learning.usage import commit
from swirl.model.gemma import Gemma, GemmaConfig

PROMPT, ACTION, OBSERVATION, STEPS, SAMPLES = 150, 20, 60, 8, 4
DEFAULT_SHAPE = GemmaConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=128,
)


def workload(name: str, num_trees: int, vocab_size: int, seed: int = 0) -> list[ScoredAction]:
    """Scored actions of `num_trees` chains or combs."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return rng.integers(16, vocab_size, length).tolist()

    scored = []
    for tree in range(num_trees):
        state = ids(PROMPT)
        for _ in range(STEPS):
            draws = [ids(ACTION) for _ in range(SAMPLES if name == "comb" else 1)]
            scored += [ScoredAction(tree, list(state), tuple(draw), float(rng.normal())) for draw in draws]
            state += (ids(ACTION) if name == "comb" else draws[0]) + ids(OBSERVATION)
    return scored


def measure(learner: Learner, scored: list[ScoredAction], repeats: int) -> tuple[list[float], dict]:
    """Seconds of each forward and backward over the update, and what it computed."""
    times = []
    for _ in range(repeats + 1):
        learner.model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        metrics = learner.accumulate(scored)
        if learner.model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.model.parameters()]).item()
    return times[1:], {**metrics, "grad_norm": norm}


def compare(name: str, model: Gemma, num_trees: int, repeats: int) -> dict:
    """Both sides in one run, in turn, so that a drift of the machine's speed meets both."""
    scored = workload(name, num_trees, model.config.vocab_size)
    config = TrainConfig()
    packed, separate = (Learner(replace(config, packed=p), model) for p in (True, False))
    times = {"packed": [], "separate": []}
    for _ in range(repeats):
        for side, learner in (("packed", packed), ("separate", separate)):
            seconds, metrics = measure(learner, scored, 1)
            times[side] += seconds
            times[side + "_metrics"] = metrics
    a, b = times["packed_metrics"], times["separate_metrics"]
    if abs(a["grad_norm"] - b["grad_norm"]) > 1e-4 * b["grad_norm"]:
        raise SystemExit(f"{name}: gradients differ, {a['grad_norm']} and {b['grad_norm']}: nothing to time")
    packed_s, separate_s = statistics.median(times["packed"]), statistics.median(times["separate"])
    return {
        "benchmark": "train_step",
        "workload": name,
        "trees": num_trees,
        "sub_trajectories": len(scored),
        "packed_tokens": int(a["computed_tokens"]),
        "separate_tokens": int(b["computed_tokens"]),
        "ideal_ratio": b["computed_tokens"] / a["computed_tokens"],
        "measured_ratio": separate_s / packed_s,
        "packed_s": packed_s,
        "separate_s": separate_s,
        "packed_tokens_per_s": a["computed_tokens"] / packed_s,
        "repeats": repeats,
        "hardware": torch.cuda.get_device_name() if model.device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="a Hugging Face folder; default: the shipped base's shape, random weights"
    )
    parser.add_argument("--trees", type=int, default=4, help="trees in an update")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON row a workload instead of the table")
    args = parser.parse_args()
    if args.model:
        model = Gemma.from_pretrained(args.model, device=args.device)
    else:
        model = Gemma(DEFAULT_SHAPE).init_weights(0).to(args.device)
    rows = [compare(name, model, args.trees, args.repeats) for name in ("chain", "comb")]
    for row in rows:
        if args.json:
            print(json.dumps(row))
        else:
            print(
                f"{row['workload']:<6} {row['sub_trajectories']:>4} sub-trajectories  "
                f"{row['separate_tokens']:>7,} -> {row['packed_tokens']:>6,} tokens  "
                f"separate {row['separate_s'] * 1e3:8.1f} ms  packed {row['packed_s'] * 1e3:7.1f} ms  "
                f"measured {row['measured_ratio']:.2f}x  ideal {row['ideal_ratio']:.2f}x  "
                f"({row['measured_ratio'] / row['ideal_ratio']:.0%} of ideal)"
            )


if __name__ == "__main__":
    main()
