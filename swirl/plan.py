"""Will a training run fit, and how long will an update take? From shapes alone: no weight is read.

  python -m swirl.plan --model gemma-2-9b --gpus 8 --memory-gb 80
  python -m swirl.plan --model path/to/gemma --tokens 4096 --lora 16        on this machine's CPU

Memory is of one GPU, or of one process on a CPU, in GB of 10^9 bytes. A line for each thing in memory, a column for
each of the moments of a run: sampling, passes (forward and backward of the largest micro-batch), step (the optimizer's)
and, on a CPU, comparing (the model as it was beside it as it is, where it is evaluated). What GPUs leave to their
host's memory, offloaded state and the copy that a checkpoint is written from, is a line of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from swirl.app import command, planning
from swirl.config import MAX_CACHE_TOKENS, TrainConfig, settled, sized
from swirl.errors import ConfigError
from swirl.learning import plan as plans
from swirl.learning.plan import Job, Plan
from swirl.learning.usage import measured_peak_flops

CARDS_GB = (24, 40, 80, 141)
GPUS_OF_HOST = 8


@dataclass(frozen=True)
class PlanConfig:
    """Defaults are those of `train`."""

    model: str = "almanac"
    """What `train --model` takes, or a shape by name: gemma-2-2b, -9b, -27b, gemma-3-270m, -1b, -4b, -12b, -27b."""
    gpus: int | None = None
    """GPUs of the job; 0: a CPU. Default: those of this machine."""
    memory_gb: float | None = None
    """Memory of each, in GB of 10^9 bytes. Default: that of the GPU, or of the CPU's machine, that is here."""
    tokens: int | None = None
    """Packed tokens of an update, over all GPUs. Default: one micro-batch each."""
    tokens_per_micro_batch: int | None = None
    """Packed tokens in one backward pass at most. Default: as in `train`, by the model's size."""
    mode: Literal["sampled", "recorded"] = "sampled"
    """Whether updates draw actions, which takes a cache of keys and values, or take those of the data."""
    evaluate: bool = True
    """Whether the run is evaluated before and after."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPUs, float32 on CPUs."""
    lora: int = 0
    """Rank of adapters; 0: train the weights."""
    kl_coefficient: float = 0.0
    """Above 0, a reference policy is held, too."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """AdamW with moments of 8 bytes a weight, or of 2."""
    offload_optimizer: bool = False
    """The optimizer's state in the host's memory, beside a GPU."""
    shard: Literal["auto", "none", "node", "all"] = "auto"
    """How weights lie on the GPUs, as in `train`; a host is taken to have eight."""
    activation_checkpointing: Literal["none", "cheap", "layers"] = "none"
    """What the backward pass computes again, as in `train`."""
    max_cache_tokens: int = MAX_CACHE_TOKENS
    """Tokens whose keys and values the sampler holds, at most."""

    def __post_init__(self):
        command.require_at_least(1, self, "tokens", "tokens_per_micro_batch", "max_cache_tokens")
        command.require_at_least(0, self, "gpus", "lora", "kl_coefficient")
        if self.memory_gb is not None and not 0 < self.memory_gb < math.inf:
            raise ConfigError(f"--memory-gb {self.memory_gb}: expected more than 0, and finite")


def job_of(config: PlanConfig, gpus: int, host_memory: float = math.inf) -> Job:
    """The training run that the flags describe, on so many GPUs; 0: on one CPU. `host_memory` is that of the machine
    that they are in, in bytes, where it is known.
    """
    ranks, model = max(1, gpus), planning.shape_of(config.model)
    asked = TrainConfig(
        mode=config.mode,
        reward="rule" if config.mode == "sampled" else "outcome",
        evaluate_on=("bridge",) if config.evaluate else (),
        dtype=config.dtype,
        lora=config.lora,
        kl_coefficient=config.kl_coefficient,
        activation_checkpointing=config.activation_checkpointing,
        data=(Path("data.jsonl"),),
        shard=config.shard,
        optimizer=config.optimizer,
        offload_optimizer=config.offload_optimizer,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
        max_cache_tokens=config.max_cache_tokens,
    )
    asked = settled(asked, {"bridge"}, "cuda" if gpus else "cpu")
    asked = sized(asked, model.num_weights)
    if config.tokens is not None:
        asked = replace(asked, tokens_per_micro_batch=min(asked.tokens_per_micro_batch, -(-config.tokens // ranks)))
    on_host = min(ranks, GPUS_OF_HOST)
    return planning.job_of(model, asked, on_gpu=gpus > 0, ranks=ranks, ranks_of_host=on_host, host_memory=host_memory)


def table(plan: Plan) -> str:
    """A line a part, a column a moment, GB; the columns' sums last."""
    names = [name for name in dict.fromkeys(n for parts in plan.moments.values() for n in parts)]
    lines = [["GB", *plan.moments]]
    for name in names:
        sizes = [parts.get(name, 0) for parts in plan.moments.values()]
        if any(sizes):
            lines.append([name, *(f"{size / 1e9:.2f}" if size else "" for size in sizes)])
    lines.append(["sum", *(f"{sum(parts.values()) / 1e9:.2f}" for parts in plan.moments.values())])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in shown)


def verdict(job: Job, plan: Plan, memory_bytes: int | None) -> str:
    """Whether it fits, and where it does not, what would make it."""
    needed = planning.needed_bytes(job, plan)
    if plan.offloaded_bytes > job.host_memory:
        offloaded, has = planning.gb(plan.offloaded_bytes), planning.gb(job.host_memory)
        return f"does not fit: --offload-optimizer takes {offloaded} of the host's {has}"
    if memory_bytes is None:
        fits = [card for card in CARDS_GB if needed <= card * 10**9]
        smallest = f"fits a card of {fits[0]} GB" if fits else f"fits no card of {CARDS_GB[-1]} GB"
        rest = "" if fits else f"; there {planning.advice(job, CARDS_GB[-1] * 10**9)}"
        return f"{smallest}: {planning.gb(needed)}{rest}"
    if needed <= memory_bytes:
        return f"fits: {planning.gb(needed)} of {planning.gb(memory_bytes)}"
    advice = planning.advice(job, memory_bytes)
    return f"does not fit: {planning.gb(needed)} of {planning.gb(memory_bytes)}; {advice}"


def main(config: PlanConfig) -> None:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = here if config.gpus is None else config.gpus
    device = torch.device("cuda" if gpus and here else "cpu")
    job = job_of(config, gpus, planning.memory_of_host().total if here else math.inf)
    plan = plans.plan(job)
    where = f"{gpus} GPU{'s' if gpus > 1 else ''}" if gpus else "a CPU"
    print(
        f"{config.model}, {job.model.num_weights / 1e9:.2f}B weights, {job.config.dtype}, on {where}: "
        f"micro-batches of {job.tokens:,} tokens"
    )
    print(table(plan))
    if plan.host_bytes:
        print(f"besides: {planning.host_line(job, plan)}")
    if bool(gpus) == (device.type == "cuda"):
        rate = measured_peak_flops(device, getattr(torch, job.config.dtype)) * planning.share_of_peak(job)
        update = config.tokens or job.tokens * job.ranks
        took = planning.seconds(plan, rate) * update / (job.tokens * job.ranks)
        print(f"an update of {update:,} packed tokens: about {took:.2g} s beside sampling and judging")
    else:
        print("the time of an update is not known: there is no GPU here whose rate could be measured")
    memory = None if config.memory_gb is None else int(config.memory_gb * 1e9)
    if memory is None and bool(gpus) == (device.type == "cuda"):
        memory = planning.memory_here(device).total
    print(verdict(job, plan, memory))


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, PlanConfig, __doc__)


if __name__ == "__main__":
    run_command()
