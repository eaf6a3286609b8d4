"""Will a run fit? Its plan (swirl.learning.plan) against the memory that is there, and the flag that makes it fit."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median

import torch

from swirl.app import resolve
from swirl.config import TrainConfig
from swirl.errors import CheckpointError, ConfigError, OutOfMemory
from swirl.learning import plan as plans
from swirl.learning import usage
from swirl.learning.optimizer import adamw_8bit, why_refused
from swirl.learning.plan import Job, Plan
from swirl.model import checkpoint
from swirl.model.config import PRESETS, GemmaConfig
from swirl.tree.pack import pack

LATER_BYTES = 30_000_000  # tools, logs and records of a run under way, as measured
CUDA_BYTES = 1_500_000_000  # context, libraries' workspaces, what the allocator cannot use; assumed, not measured
TRAJECTORY_TOKENS = 512  # a prompt of 150 and 5 steps of some 70
NUM_STEPS = 5
SMALL_CACHE = 16_384
SHARES = {"float32": 0.6, "bfloat16": 0.6, "cuda": 0.4}


def shape_of(spec: str) -> GemmaConfig:
    """The config of a preset (gemma-2-9b), or of what `--model` names; no weight is read. Raises CheckpointError."""
    if spec in PRESETS:
        return PRESETS[spec]
    folder = resolve.model_folder(spec)
    if not folder.is_dir():
        expected = f"expected `almanac`, a folder of a Gemma, its name on the hub, or one of {', '.join(PRESETS)}"
        raise CheckpointError(folder, f"no such folder: {expected}")
    file = resolve.base_folder(folder) / "config.json"
    try:
        return GemmaConfig.from_json(checkpoint.read_json(file))
    except ConfigError as error:
        raise CheckpointError(file, str(error)) from None


def job_of(
    model: GemmaConfig,
    config: TrainConfig,
    *,
    on_gpu: bool,
    ranks: int = 1,
    ranks_of_host: int | None = None,
    host_memory: float = math.inf,
) -> Job:
    """What a training run comes to on this machine; `config` is settled and sized.

    Raises ConfigError where its optimizer does not take weights as they lie on the ranks.
    """
    sampled = min(config.max_cache_tokens, _sampled_tokens(config, ranks))
    job = Job(model, config, on_gpu, ranks, ranks_of_host or ranks, cache_tokens=sampled, host_memory=host_memory)
    if reason := _why_refused(job):
        raise ConfigError(reason)
    return job if on_gpu else replace(job, process_bytes=_process_bytes(config))


def _why_refused(job: Job) -> str | None:
    config = job.config
    return why_refused(config.optimizer, offload=config.offload_optimizer, sharded=job.trains_shards, on_gpu=job.on_gpu)


def _sampled_tokens(config: TrainConfig, ranks: int) -> int:
    """Of which the sampler would keep keys, had it room: of all trajectories it plays with the same weights, or of the
    draws of an update.
    """
    played = config.evaluate_num_questions * len(config.evaluate_on)
    if config.generates:
        played += config.num_questions * len(config.task) * config.samples
    draws = 0
    if config.mode == "sampled":
        drawn = NUM_STEPS * config.samples_per_state * config.max_new_tokens
        draws = config.trajectories_per_update * (TRAJECTORY_TOKENS + drawn)
    elif config.mode == "outcome-rl":
        draws = config.trajectories_per_update * TRAJECTORY_TOKENS
    return max(played * TRAJECTORY_TOKENS, draws) // ranks


def _process_bytes(config: TrainConfig) -> int:
    """What this process holds beside a model, once it has loaded all that training needs."""
    pack([([0], [0])])  # compiled code
    if config.optimizer == "adamw-8bit":
        with suppress(ConfigError):  # `swirl plan` needs none
            adamw_8bit()  # hundreds of MB
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # most of torch that is not loaded yet
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + LATER_BYTES


@dataclass(frozen=True)
class Memory:
    """Of a GPU, or of this machine, in bytes: all of it, and what is free or could be."""

    total: int
    available: int


def memory_here(device: torch.device) -> Memory:
    """Of the device, its ranks' share of the machine where that is a CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    host, ranks = memory_of_host(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Memory(host.total // ranks, host.available // ranks)


def memory_of_host() -> Memory:
    """Of this machine, or of the container that this is."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    limit = usage.memory_limit()
    return Memory(*(min(limit, int(lines[name].split()[0]) * 1024) for name in ("MemTotal", "MemAvailable")))


def needed_bytes(job: Job, plan: Plan) -> int:
    """The plan's peak, and on a GPU what no tensor takes."""
    return plan.peak_bytes + (CUDA_BYTES if job.on_gpu else 0)


def advice(job: Job, limit: int) -> str:
    """The first flag that brings the job below `limit` bytes, with the peak it then has; or several together; or that
    none does.
    """
    found = next((tried for tried in chain(_each_alone(job), _together(job)) if _peak(tried[1]) <= limit), None)
    if found is None:
        least = min((_peak(tried) for _, tried in _together(job)), default=_peak(job))
        return f"no flag makes it fit: with all of them it takes {gb(least)}; take a smaller model, or a larger card"
    flags, changed = found
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in flags.items()]
    beside = f", and {gb(plans.plan(changed).host_bytes)} of its host's" if changed.offloads else ""
    return f"{' '.join(words)} makes it fit, in {gb(_peak(changed))}{beside}"


def _peak(job: Job) -> int:
    return needed_bytes(job, plans.plan(job))


Flags = dict[str, object]  # by their names in the config


def _changes(job: Job) -> Iterator[Flags]:
    """Flags that take less memory: first those that change nothing that is learned."""
    config = job.config
    if config.activation_checkpointing == "none":
        yield {"activation_checkpointing": "cheap"}
    if config.activation_checkpointing != "layers":
        yield {"activation_checkpointing": "layers"}
    yield from ({"tokens_per_micro_batch": size} for size in (4096, 2048, 1024) if size < job.tokens)
    if job.cache_tokens > SMALL_CACHE:
        yield {"max_cache_tokens": SMALL_CACHE}
    if job.on_gpu and not config.offload_optimizer:
        yield {"offload_optimizer": True}
    if job.shards < job.ranks:
        yield {"shard": "all"}
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if config.optimizer == "adamw":
        yield {"optimizer": "adamw-8bit"}
    if not config.lora:
        yield {"lora": 16}


def _each_alone(job: Job) -> Iterator[tuple[Flags, Job]]:
    """The changes, and the job with each of them, where such a run is not refused and its host has the room."""
    for flags in _changes(job):
        config = replace(job.config, **flags)
        changed = replace(job, config=config, cache_tokens=min(job.cache_tokens, config.max_cache_tokens))
        if not _why_refused(changed) and plans.plan(changed).offloaded_bytes <= job.host_memory:
            yield flags, changed


def _together(job: Job) -> Iterator[tuple[Flags, Job]]:
    """The change that takes off most, with it that of the changes of what it made, and so on."""
    flags: Flags = {}
    while tried := min(_each_alone(job), key=lambda tried: _peak(tried[1]), default=None):
        flags, job = flags | tried[0], tried[1]
        yield flags, job


@dataclass(frozen=True)
class RunPlan:
    """Of a run that is about to begin: its job, the plan of it, the memory it begins with, and the FLOP/s that updates
    are taken to reach on each rank.
    """

    job: Job
    plan: Plan
    memory: Memory
    flops_per_s: float

    def held_against(self, history: list[dict], peak_bytes: int) -> dict[str, float]:
        """For the summary of a run, planned and measured: its peak, and where an update computed anything, the median
        of their seconds beside sampling and judging, planned for as many tokens as they had.
        """
        bytes_of = {"planned_peak_bytes": self.plan.peak_bytes, "peak_bytes": peak_bytes}
        updates = [metrics for metrics in history if metrics["computed_tokens"]]
        if not updates:
            return bytes_of
        planned = seconds(self.plan, self.flops_per_s) / (self.job.tokens * self.job.ranks)
        return bytes_of | {
            "planned_update_s": planned * median(metrics["computed_tokens"] for metrics in updates),
            "measured_update_s": median(metrics["update_s"] - metrics["sample_s"] for metrics in updates),
        }


def plan_run(config: TrainConfig, device: torch.device, *, say: Callable[[str], None]) -> RunPlan:
    """Plan this rank's part of a run, before it loads anything, and `say` the plan in a line.

    Raises OutOfMemory where the run cannot fit, CheckpointError where there is no such model, ConfigError where its
    optimizer is not installed, or takes no weights in shards.
    """
    ranks, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    model = shape_of(config.model)
    host_memory = memory_of_host().total
    job = job_of(model, config, on_gpu=device.type == "cuda", ranks=ranks, ranks_of_host=here, host_memory=host_memory)
    if config.optimizer == "adamw-8bit":
        adamw_8bit()
    rate = usage.measured_peak_flops(device, getattr(torch, config.dtype)) * share_of_peak(job)
    planned = RunPlan(job, plans.plan(job), memory_here(device), rate)
    say(line_of(job, planned.plan, rate))
    if config.memory_check:
        warning = require_fits(job, planned.plan, planned.memory)
        if warning:
            say(f"warning: {warning}")
    return planned


def share_of_peak(job: Job) -> float:
    """Of a machine's matrix rate, what updates reach: as measured on CPUs (benchmarks/results/plan.jsonl), assumed on
    GPUs.
    """
    return SHARES["cuda" if job.on_gpu else job.config.dtype]


def require_fits(job: Job, plan: Plan, memory: Memory) -> str | None:
    """Raises OutOfMemory where not even what the run holds whatever its data are is there. Returns a warning where the
    plan is above what is available now, else None: data may be shorter than planned for, a run over before it saves.
    """
    if plan.least_bytes > memory.total:
        raise OutOfMemory(
            f"this run cannot fit: weights and what they need alone are {gb(plan.least_bytes)}, of {gb(memory.total)} "
            f"of memory; {advice(job, memory.total)} (--no-memory-check tries all the same)"
        )
    if plan.offloaded_bytes > job.host_memory:
        raise OutOfMemory(
            f"this run cannot fit: --offload-optimizer takes {gb(plan.offloaded_bytes)} of the host's "
            f"{gb(job.host_memory)}; leave it out, or take --lora (--no-memory-check tries all the same)"
        )
    if needed_bytes(job, plan) > memory.available:
        return (
            f"the plan is {gb(needed_bytes(job, plan))} of memory, and {gb(memory.available)} are free; "
            f"{advice(job, memory.available)}"
        )
    if plan.host_bytes > job.host_memory:
        return f"the plan is {host_line(job, plan)}"
    return None


@contextmanager
def told_if_out_of_memory(planned: RunPlan) -> Iterator[None]:
    """Memory that runs out in the body is an OutOfMemory, one line with advice."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        asked = re.search(r"allocate (\d+(?:\.\d+)?)\.? (\w+)", str(error))
        more = f" ({asked[1]} {asked[2]} more were asked for)" if asked else ""
        peak = needed_bytes(planned.job, planned.plan)
        limit = min(planned.memory.available, int(0.8 * peak))  # what was planned is too much, or the plan too low
        raise OutOfMemory(f"out of memory{more}, planned were {gb(peak)}: {advice(planned.job, limit)}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """torch says so on GPUs by a type of its own, on CPUs by the words of a RuntimeError."""
    if isinstance(error, OutOfMemory):
        return False
    told = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return told or "DefaultCPUAllocator: can't allocate memory" in str(error)


def line_of(job: Job, plan: Plan, flops_per_s: float) -> str:
    """The plan in one line."""
    parts = sorted(plan.moments[plan.peak].items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {gb(size)}" for name, size in parts[:4] if size)
    each = " on each of its GPUs" if job.on_gpu else ""
    each = f" on each of {job.ranks} ranks" if job.ranks > 1 else each
    took = f"; about {seconds(plan, flops_per_s):.2g} s for {job.tokens:,} packed tokens"
    beside = f"; {host_line(job, plan)}" if plan.host_bytes else ""
    return f"plan: {gb(plan.peak_bytes)} of memory{each} at its peak ({shown}){beside}{took}"


def host_line(job: Job, plan: Plan) -> str:
    """What the plan keeps beside GPUs, in words."""
    shown = ", ".join(f"{name} {gb(size)}" for name, size in plan.host.items() if size)
    lacks = f", which is {gb(job.host_memory)}; --save-minutes 0 makes no copy to save"
    return f"{gb(plan.host_bytes)} of the host's memory ({shown}){lacks if plan.host_bytes > job.host_memory else ''}"


def outcome_line(held: dict[str, float]) -> str:
    """What `RunPlan.held_against` gives, in words."""
    line = f"planned and measured: {gb(held['planned_peak_bytes'])} and {gb(held['peak_bytes'])} of memory at its peak"
    if "planned_update_s" not in held:
        return line
    of_update = (f"{held[name]:.2g} s" for name in ("planned_update_s", "measured_update_s"))
    return f"{line}, {' and '.join(of_update)} an update beside sampling and judging"


def seconds(plan: Plan, flops_per_s: float) -> float:
    """Of forward and backward of the largest micro-batch, on one rank."""
    return plan.flops / flops_per_s


def gb(size: float) -> str:
    """Bytes in words, 10^9 of them a GB."""
    return f"{size / 1e9:.{0 if size >= 1e11 else 1 if size >= 1e10 else 2}f} GB"
