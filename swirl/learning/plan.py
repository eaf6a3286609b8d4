"""The memory and the time of a training run, by arithmetic from shapes, before anything is loaded.

A run has its moments, and in each something else lies in memory; the largest sum is the peak. All is in bytes of one
rank: what weights need (docs/models.md), what a pass keeps (swirl.model.activations), the sampler's keys and values,
and the process itself. Time is FLOPs over a rate. benchmarks/plan.py holds it against measured runs.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from swirl.learning.usage import MANY_WEIGHTS, MAPPED_BYTES, flops_of, head_flops, layer_flops, num_adapter_weights
from swirl.model import activations
from swirl.model.activations import Computation
from swirl.model.config import GemmaConfig

if TYPE_CHECKING:
    from swirl.config import TrainConfig

LARGE = 1_000_000_000  # of learning/sharding.py, which loads more than a plan needs
TREE_TOKENS = 800  # depth of a tree that time is planned for: a prompt of 150 and 8 steps of 80
ACTION_SHARE = {"recorded": 0.3, "sampled": 0.5}  # of packed tokens, those of actions: a chain's, a comb's
PREFILL_TOKENS, SEQUENCES = 1024, 512  # of swirl/sampling/engine.py
HEAP_BLOCK_BYTES = 32 << 20  # glibc's M_MMAP_THRESHOLD, where it ends up
HEAP_FRAGMENTS, UNFRAGMENTED_BYTES = 0.4, 64 << 20  # as measured: of what goes beyond so much
LOGITS = 4  # tensors of a row a sequence that a draw has at a time

Parts = dict[str, int]


@dataclass(frozen=True)
class Job:
    """What is planned.

    config: settled and sized, no `auto` left but that of `shard`. on_gpu: on GPUs, else on CPUs. ranks: processes of
    the job, ranks_of_host of them on one machine. process_bytes: what each holds beside tensors. cache_tokens: those
    whose keys and values the sampler keeps, 0 where nothing is sampled. host_memory: bytes of the machine that GPUs are
    in, infinity where it is not known.
    """

    model: GemmaConfig
    config: TrainConfig
    on_gpu: bool = False
    ranks: int = 1
    ranks_of_host: int = 1
    process_bytes: int = 0
    cache_tokens: int = 0
    host_memory: float = math.inf

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.config.dtype).itemsize

    @property
    def computation(self) -> Computation:
        config = self.config
        return Computation(self.itemsize, self.on_gpu, config.activation_checkpointing, config.lora, self.maps_blocks)

    @property
    def tokens(self) -> int:
        """Packed tokens of the largest micro-batch."""
        return self.config.tokens_per_micro_batch

    @property
    def action_tokens(self) -> int:
        return int(ACTION_SHARE["sampled" if self.config.mode == "sampled" else "recorded"] * self.tokens)

    @property
    def shard(self) -> str:
        """none, node or all, as sharding.py decides it."""
        if self.ranks == 1:
            return "none"
        if self.config.shard != "auto":
            return self.config.shard
        return "node" if self.model.num_weights >= LARGE and not self.config.lora else "none"

    @property
    def shards(self) -> int:
        """Ranks that hold a part each of the weights; 1: each holds them all."""
        return {"none": 1, "node": min(self.ranks, self.ranks_of_host), "all": self.ranks}[self.shard]

    @property
    def trains_shards(self) -> bool:
        """Whether the weights that are trained lie in shards; adapters are whole on each rank."""
        return self.shard != "none" and not self.config.lora

    @property
    def maps_blocks(self) -> bool:
        """Whether memory that is freed goes back to the system (`usage.unmap_what_is_freed`)."""
        return not self.on_gpu and (self.shards > 1 or self.model.num_weights >= MANY_WEIGHTS)

    @property
    def trained(self) -> int:
        """Weights that are."""
        return num_adapter_weights(self.model, self.config.lora) or self.model.num_weights

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state is on the host, and the GPU holds none of it."""
        return self.on_gpu and self.config.offload_optimizer

    @property
    def trained_here(self) -> int:
        """Of them, those whose gradients and moments this rank holds: a shard's, but all of adapters."""
        return self.trained if self.config.lora else self.trained // self.shards


@dataclass(frozen=True)
class Plan:
    """moments: by name, what lies in memory, by name, in bytes of one rank. flops: of the largest micro-batch, with all
    that is computed again, and for other policies. host: what lies in the memory of a machine beside its GPUs, by name,
    in bytes of all its ranks.
    """

    moments: dict[str, Parts]
    flops: float
    host: Parts

    @property
    def peak(self) -> str:
        """The name of the moment with the largest sum."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak_bytes(self) -> int:
        return sum(self.moments[self.peak].values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def offloaded_bytes(self) -> int:
        """What the host holds whether the run saves or not."""
        return self.host_bytes - self.host.get("checkpoint", 0)

    @property
    def least_bytes(self) -> int:
        """What the run holds whatever its data are: no activations, no keys and values."""
        step = self.moments["step"]
        return sum(step[name] for name in ("process", "weights", "gradients", "optimizer", "reference"))


def plan(job: Job) -> Plan:
    """The plan of a job."""
    always, gradients = _always(job), {"gradients": 4 * job.trained_here}
    moments = {"sampling": always | _sampling(job)} if job.cache_tokens else {}
    moments |= {"passes": always | gradients | _passes(job), "step": always | gradients | _step(job)}
    if job.config.evaluate_on and not job.on_gpu:
        # The model as it was is loaded once more, the optimizer is gone. A GPU without the room goes on without it.
        again = {"the base again": job.model.num_weights * job.itemsize} | _gathered_whole(job)
        moments["comparing"] = always | {"optimizer": 0, "checkpoint": 0} | again
    return Plan(moments, _flops(job), _host(job))


def _flops(job: Job) -> float:
    """Of the largest micro-batch: its update's, layers that are computed again, and the passes of other policies. A KL
    computes the head of both anew. The log-probs' own head, computed again as ever, is in the rate that is reached.
    """
    config, position_ids = job.config, torch.arange(job.tokens) % TREE_TOKENS
    layers = sum(layer_flops(job.model, position_ids, lora_rank=config.lora))
    head = head_flops(job.model, job.action_tokens)
    again = layers if config.activation_checkpointing == "layers" else 0
    reference = layers + head + (2 if config.lora else 3) * head if config.kl_coefficient else 0
    proximal = layers + head if config.proximal_every else 0
    return flops_of(job.model, position_ids, job.action_tokens, lora_rank=config.lora) + again + reference + proximal


def _always(job: Job) -> Parts:
    """What lies in memory from the first update to the last."""
    config, b, n, adapters = job.config, job.itemsize, job.shards, bool(job.config.lora)
    weights = job.model.num_weights
    reference = weights * b // n if config.kl_coefficient and not adapters else 0
    proximal = weights * b // n if config.proximal_every else 0
    if adapters and proximal:  # whole frozen weights are the policy's own
        proximal = 4 * job.trained + (proximal if n > 1 else 0)
    return {
        "process": job.process_bytes,
        "weights": weights * b // n + 4 * job.trained if adapters else weights * (b if n == 1 else 4) // n,
        "optimizer": 0 if job.offloads else _state(job),
        "reference": reference + proximal,
        "keys and values": _keys_and_values(job),
        "checkpoint": 0 if job.on_gpu else _saved(job),
    }


def _state(job: Job) -> int:
    """Of the optimizer: moments, and copies of weights narrower or elsewhere. Shards are float32 themselves."""
    copied = job.offloads or (job.itemsize < 4 and not job.config.lora and job.shards == 1)
    return job.trained_here * (2 if job.config.optimizer == "adamw-8bit" else 8) + (4 * job.trained if copied else 0)


def _saved(job: Job) -> int:
    """The copy that a checkpoint is written from while training goes on; of trained weights in shards there is none."""
    config = job.config
    if not (config.save_every or config.save_minutes) or job.trains_shards:
        return 0
    return (4 * job.trained if config.lora else job.model.num_weights * job.itemsize) + _state(job)


def _host(job: Job) -> Parts:
    """Each rank keeps its optimizer's state, and gradients for a step; the main one alone makes the copy."""
    if not job.on_gpu:
        return {}
    state, gradients = (_state(job), 4 * job.trained_here) if job.offloads else (0, 0)
    kept = {"optimizer": state * job.ranks_of_host, "gradients": gradients * job.ranks_of_host}
    return kept | {"checkpoint": _saved(job)}


def _keys_and_values(job: Job) -> int:
    """The sampler's cache; and where C++ samples from adapters, the weights that it merged them into."""
    model = job.model
    of_token = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * job.itemsize
    merged = 0
    if job.cache_tokens and job.config.lora and not job.on_gpu and job.itemsize == 4:
        merged = 4 * (model.num_weights - model.vocab_size * model.hidden_size)
    return job.cache_tokens * of_token + merged


def _gathered_whole(job: Job) -> Parts:
    """Weights in shards are gathered to sample from them."""
    return {"gathered": job.model.num_weights * job.itemsize if job.shards > 1 else 0}


def _sampling(job: Job) -> Parts:
    prefill = activations.pass_without_gradient(job.model, job.computation, PREFILL_TOKENS)
    by_layers = not job.on_gpu and job.itemsize == 2 and job.config.lora  # elsewhere the head and the draw are one op
    logits = LOGITS * 4 * SEQUENCES * job.model.vocab_size if by_layers else 0
    return {"workspace": prefill + logits} | _gathered_whole(job)


def _passes(job: Job) -> Parts:
    """Forward and backward of the largest micro-batch, when that takes most: at the head, in the last layer, where the
    reference passes, or at the embedding, whose gradient comes last.
    """
    model, how = job.model, job.computation
    kl = job.config.kl_coefficient > 0
    blocks = activations.kept_by_pass(model, how, job.tokens, job.action_tokens)
    kept = sum(blocks)
    blocks += activations.kl_chunks(model, job.action_tokens) if kl else []
    embedding = 0 if how.lora else model.vocab_size * model.hidden_size * how.itemsize
    widened = 2 * embedding if how.itemsize < 4 else 0  # rounded gradients, to be summed
    takes = [
        (kept, activations.head_backward(model, how, job.action_tokens, kl=kl)),
        (kept, embedding + activations.layer_backward(model, how, job.tokens)),
        (0, 2 * embedding + widened),
    ]
    if job.config.proximal_every or kl:
        takes.append((kept, activations.pass_without_gradient(model, how, job.tokens)))
    activation_bytes, workspace = max(takes, key=sum)
    fragments = _fragments(job, blocks, workspace)
    parts = {"activations": activation_bytes, "workspace": workspace, "fragments": fragments}
    return parts | _gathered_parts(job)


def _gathered_parts(job: Job) -> Parts:
    """Of weights in shards a pass holds the embedding all the time, and up to three layers; of one that is trained the
    backward pass holds the gradient too, which ranks sum in float32.
    """
    if job.shards == 1:
        return {"gathered": 0}
    embedding = job.model.vocab_size * job.model.hidden_size
    layer = (job.model.num_weights - embedding) // job.model.num_hidden_layers
    return {"gathered": embedding * job.itemsize + layer * (3 * job.itemsize + (0 if job.config.lora else 4))}


def _fragments(job: Job, blocks: list[int], workspace: int) -> int:
    """Freed memory that glibc's heap, where blocks below a limit lie, cannot use; on a GPU it is not to be had.

    At least what op after op takes and frees, since an aligned block does not fit where one of its size lay; of that
    glibc gives back what goes beyond UNFRAGMENTED_BYTES.
    """
    if job.on_gpu:
        return 0
    limit = MAPPED_BYTES if job.maps_blocks else HEAP_BLOCK_BYTES
    limit = int(os.environ.get("MALLOC_MMAP_THRESHOLD_", limit))
    beyond = sum(block for block in blocks if block < limit) - UNFRAGMENTED_BYTES
    return max(0 if job.maps_blocks else min(workspace, UNFRAGMENTED_BYTES), int(HEAP_FRAGMENTS * beyond))


def _step(job: Job) -> Parts:
    """Ranks that train whole weights sum their gradients in one buffer, beside those that it is made of. On CPUs steps
    with 8-bit moments hold five float32 tensors of a weight's size, and the heap a trim's worth of free memory.
    """
    summed = 4 * job.trained if job.ranks > 1 and job.trained_here == job.trained else 0
    if job.on_gpu:
        return {"workspace": summed}
    embedding = 0 if job.config.lora else job.model.vocab_size * job.model.hidden_size
    stepped = 5 * 4 * embedding if job.config.optimizer == "adamw-8bit" else 0
    return {"workspace": max(summed, stepped), "fragments": UNFRAGMENTED_BYTES}
