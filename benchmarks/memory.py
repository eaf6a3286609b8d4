"""What does one update hold at its peak? Random weights of a preset's shapes, one update, a process of its own.

  python -m benchmarks.memory --model gemma-2-2b --lora 16 --dtype bfloat16 --activation-checkpointing layers
  python -m benchmarks.memory --layers 2 ...      the same with two of its layers, to try it

The update is that of `swirl.train`: combs of questions with a search tool (benchmarks.train_step) in one micro-batch of
--tokens packed tokens, forward, backward, clipping and the optimizer's step. The peak is the process's resident memory
on a CPU, Python and torch included, and what torch allocated on CUDA.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.harness import append, machine
from benchmarks.train_step import ACTION, Action, UpdateConfig, opened, workload
from swirl.learning import gradient, usage
from swirl.learning.batches import SubTrajectory, num_tokens
from swirl.learning.objective import Objective
from swirl.learning.optimizer import clip_grad_norm, make_optimizer
from swirl.model.lora import LoRA, add_lora
from swirl.tree.pack import pack


def update_of(tokens: int, vocab_size: int) -> list[SubTrajectory]:
    """Combs, and one action in a state that fills the last of `tokens` packed tokens."""
    trees = 1
    while _packed(workload("comb", trees + 1, vocab_size)) <= tokens - 2 * ACTION:
        trees += 1
    actions = workload("comb", trees, vocab_size)
    left = tokens - _packed(actions) - ACTION
    state = [16 + i % (vocab_size - 16) for i in range(left)]
    return [*actions, SubTrajectory(trees, 0, state, Action(tuple(state[:ACTION])), 1.0)]


def _packed(actions: list[SubTrajectory]) -> int:
    return pack([(action.state_ids, action.step.action_ids) for action in actions]).num_tokens


def measured(given: argparse.Namespace) -> dict:
    """The row of one update."""
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    model = opened(given.model, given.layers, dtype, given.device)
    model.activation_checkpointing = given.activation_checkpointing
    num_weights = sum(weight.numel() for weight in model.parameters())
    if device.type == "cpu" and num_weights >= usage.MANY_WEIGHTS:  # as swirl.train does
        usage.unmap_what_is_freed()
    if given.lora:
        add_lora(model, LoRA(given.lora))
    optimizer = make_optimizer(model, learning_rate=1e-5, kind=given.optimizer, offload=given.offload_optimizer)
    config = UpdateConfig(tokens_per_micro_batch=given.tokens)
    objective = Objective(config, model)
    actions = update_of(given.tokens, model.config.vocab_size)
    before, started, cpu = usage.peak_bytes(device), time.perf_counter(), time.process_time()
    sums = gradient.accumulate(model, objective, actions, num_tokens(actions), config)
    norm = clip_grad_norm(model, config.max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - started
    assert sums["computed_tokens"] == given.tokens and norm > 0
    return {
        "benchmark": "memory",
        "model": given.model,
        "layers": model.config.num_hidden_layers,
        "num_weights": num_weights,
        "dtype": given.dtype,
        "lora": given.lora,
        "activation_checkpointing": given.activation_checkpointing,
        "optimizer": given.optimizer,
        "offload_optimizer": given.offload_optimizer,
        "tokens": given.tokens,
        "action_tokens": num_tokens(actions),
        "before_bytes": before,
        "peak_bytes": usage.peak_bytes(device),
        "update_s": seconds,
        "cpu_s": time.process_time() - cpu,
        "flops": sums["flops"],
        "grad_norm": norm,
        **machine(device),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-2-2b", help="a preset's shapes, `almanac`, or a Hugging Face folder")
    parser.add_argument("--layers", type=int, help="of a preset the first so many; default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights are trained")
    parser.add_argument("--activation-checkpointing", choices=("none", "cheap", "layers"), default="none")
    parser.add_argument("--optimizer", choices=("adamw", "adamw-8bit"), default="adamw")
    parser.add_argument("--offload-optimizer", action="store_true")
    parser.add_argument("--tokens", type=int, default=4096, help="packed tokens of the update")
    parser.add_argument("--out", type=Path, help="append the row to this file (.jsonl)")
    given = parser.parse_args(arguments)
    row = measured(given)
    append(given.out, [row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()
