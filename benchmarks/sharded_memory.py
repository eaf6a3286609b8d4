"""What does a rank hold at its peak when weights lie in shards over 1, 2 or 4 of them?

    python -m benchmarks.sharded_memory                  ranks 1, 2 and 4 on this machine, gloo, a model of 102M weights
    python -m benchmarks.sharded_memory --dtype bfloat16 --ranks 2

Each rank is a process of its own. The peak is the largest resident memory of a rank during two updates, each of one
micro-batch of 170 packed tokens a rank, less what the process held before there was a model. Beside it stands what the
plan of such a run counts (swirl.learning.plan), and of that what is split over ranks: float32 weights, gradients and
AdamW's moments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.harness import append, machine
from benchmarks.train_step import workload
from swirl.config import TrainConfig, sized
from swirl.learning import distributed, gradient, sharding
from swirl.learning.batches import assigned_here, num_tokens, rank_micro_batches
from swirl.learning.objective import Objective
from swirl.learning.optimizer import clip_grad_norm, make_optimizer
from swirl.learning.plan import Job, plan
from swirl.model.config import GemmaConfig
from swirl.model.gemma import Gemma

CONFIG = GemmaConfig(16_384, 512, 2048, 24, 8, 4, head_dim=64, query_pre_attn_scalar=64, sliding_window=512)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def one_rank(dtype: torch.dtype) -> dict:
    """Two updates on this rank; the row of the largest, on every rank."""
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        for name in ("torch._dynamo", "torch.distributed.fsdp"):  # FSDP loads them: no part of what a model costs
            importlib.import_module(name)

        before = resident_bytes()
        with torch.device("meta"):
            model = Gemma(CONFIG).to(dtype)
        model = sharding.shard_as_asked(model, "all", "cpu")
        model.to_empty(device="cpu")
        with torch.no_grad():
            for weight in model.parameters():
                (weight.to_local() if sharding.is_sharded(weight) else weight).fill_(0.01 if weight.ndim > 1 else 0.0)
        config = sized(TrainConfig(mode="recorded"), 0)
        objective, optimizer = Objective(config, model), make_optimizer(model, learning_rate=1e-4)
        actions = workload("chain", distributed.world_size(), CONFIG.vocab_size)
        actions = [action for action in actions if action.k == 0]
        for _ in range(2):
            gradient.accumulate(model, objective, actions, num_tokens(actions), config)
            clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        ranks = distributed.world_size()
        mine = assigned_here(actions, CONFIG)
        tokens = max(batch.num_tokens for batch, *_ in rank_micro_batches(mine, actions, config))
        asked = replace(
            config, shard="all", dtype=str(dtype)[6:], tokens_per_micro_batch=tokens, evaluate_on=(), save_minutes=0
        )
        planned = plan(Job(CONFIG, asked, ranks=ranks, ranks_of_host=ranks))
        return {
            "benchmark": "sharded_memory",
            "model": f"{CONFIG.num_hidden_layers} layers of {CONFIG.hidden_size}",
            "shard": "all" if ranks > 1 else "none",
            "ranks": ranks,
            "weights": CONFIG.num_weights,
            "split_bytes": sum(planned.moments["step"][name] for name in ("weights", "gradients", "optimizer")),
            "planned_bytes": planned.peak_bytes,
            "peak_bytes": max(distributed.gather_shares([peak], int)),
            "dtype": str(dtype)[6:],
            **machine(torch.device("cpu")),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the passes")
    parser.add_argument("--out", type=Path, help="append the rows to this file (.jsonl)")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # one of them, in its process
    args = parser.parse_args()
    if args.rank:
        row = one_rank(getattr(torch, args.dtype))
        if distributed.launched_as_main():
            print(json.dumps(row))
        return
    for ranks in args.ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "benchmarks.sharded_memory", "--rank", "--dtype", args.dtype]
        processes = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, env=os.environ | {k: str(v) for k, v in (where | {"RANK": r}).items()}
            )
            for r in range(ranks)
        ]
        printed = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise SystemExit(f"{ranks} ranks: one of them failed")
        row = json.loads(printed[0].splitlines()[-1])
        append(args.out, [row])
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
