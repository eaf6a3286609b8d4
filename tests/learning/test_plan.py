"""The plan's arithmetic, worked by hand on a small shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.harness import RESULTS, read
from swirl.config import TrainConfig, settled, sized
from swirl.learning.plan import Job, plan
from swirl.learning.usage import flops_of, head_flops, layer_flops, num_adapter_weights, update_flops
from swirl.model.config import PRESETS, GemmaConfig
from swirl.tree.pack import pack

# d 64, F 128, 2 layers of 4 heads and 2 key heads of 32, 1,000 words: an embedding of 64,000 weights, and in a layer
# 64 * 32 * (4 + 2) * 2 of attention, 3 * 64 * 128 of MLP, 4 * 64 of norms: 49,408; the last norm 64
SHAPE = GemmaConfig(1000, 64, 128, 2, 4, 2, head_dim=32, query_pre_attn_scalar=32, sliding_window=16)
WEIGHTS = 64_000 + 2 * 49_408 + 64


def job(shape=SHAPE, on_gpu=True, ranks=1, cache_tokens=0, **flags) -> Job:
    asked = {"mode": "recorded", "reward": "outcome", "data": ("a",), "evaluate_on": (), "save_minutes": 0} | flags
    config = settled(TrainConfig(**asked), {"bridge"}, "cuda" if on_gpu else "cpu")
    return Job(shape, sized(config, shape.num_weights), on_gpu, ranks, ranks, cache_tokens=cache_tokens)


def parts(moment="step", **flags):
    return {name: size for name, size in plan(job(**flags)).moments[moment].items() if size}


def test_bytes_of_weights_and_what_they_need():
    assert SHAPE.num_weights == WEIGHTS
    narrow = {"weights": 2 * WEIGHTS, "gradients": 4 * WEIGHTS, "optimizer": 12 * WEIGHTS}
    assert parts() == narrow
    assert parts(dtype="float32") == narrow | {"weights": 4 * WEIGHTS, "optimizer": 8 * WEIGHTS}
    assert parts(optimizer="adamw-8bit") == narrow | {"optimizer": 6 * WEIGHTS}
    assert parts(offload_optimizer=True) == {name: size for name, size in narrow.items() if name != "optimizer"}
    assert parts(kl_coefficient=0.1) == narrow | {"reference": 2 * WEIGHTS}
    assert parts(ranks=4) == narrow | {"workspace": 4 * WEIGHTS}  # whole gradients are summed beside themselves
    assert parts(ranks=4, shard="all") == {name: 4 * WEIGHTS // 4 for name in ("weights", "gradients")} | {
        "optimizer": 8 * WEIGHTS // 4
    }
    assert parts(save_every=1, on_gpu=False)["checkpoint"] == 12 * WEIGHTS  # weights and moments, copied
    # a cache of 10 tokens: 2 layers, keys and values of 2 heads of 32
    assert parts(cache_tokens=10) == narrow | {"keys and values": 10 * 2 * 2 * 2 * 32 * 2}


def test_bytes_of_the_host_beside_gpus():
    def host(**flags):
        return {name: size for name, size in plan(job(**flags)).host.items() if size}

    assert host() == {} == host(save_every=1, on_gpu=False)
    assert host(save_every=1) == {"checkpoint": 14 * WEIGHTS}  # weights, float32 copies, moments
    assert host(offload_optimizer=True) == {"optimizer": 12 * WEIGHTS, "gradients": 4 * WEIGHTS}
    assert host(offload_optimizer=True, dtype="float32", optimizer="adamw-8bit")["optimizer"] == 6 * WEIGHTS
    # each of four ranks keeps its own, one of them saves
    adapters = num_adapter_weights(SHAPE, 3)
    state = {"optimizer": 4 * 12 * adapters, "gradients": 4 * 4 * adapters, "checkpoint": 16 * adapters}
    assert host(offload_optimizer=True, lora=3, ranks=4, shard="all", save_every=1) == state
    assert host(ranks=4, shard="all", save_every=1) == {}


def test_adapters_need_next_to_nothing():
    # in and out of q 64 + 128, k and v 64 + 64 each, o 128 + 64, gate and up 64 + 128 each, down 128 + 64
    assert num_adapter_weights(SHAPE, 3) == 3 * 2 * (192 + 2 * 128 + 192 + 2 * 192 + 192)
    adapters = num_adapter_weights(SHAPE, 3)
    wanted = {"weights": 2 * WEIGHTS + 4 * adapters, "gradients": 4 * adapters, "optimizer": 8 * adapters}
    assert parts(lora=3) == wanted == parts(lora=3, kl_coefficient=0.1)  # the reference is the model itself


def test_beside_adapters_the_frozen_weights_are_shared_out():
    adapters = num_adapter_weights(SHAPE, 3)
    held = {"weights": 2 * WEIGHTS // 4 + 4 * adapters, "gradients": 4 * adapters, "optimizer": 8 * adapters}
    assert parts(lora=3, ranks=4, shard="all") == held | {"workspace": 4 * adapters}  # their gradients' sum over ranks
    assert parts(lora=3, ranks=4, shard="all", proximal_every=1)["reference"] == 2 * WEIGHTS // 4 + 4 * adapters
    assert parts(lora=3, ranks=4, shard="all", optimizer="adamw-8bit")["optimizer"] == 2 * adapters


def test_passes_hold_activations_and_the_head_s_workspace():
    few, many = (plan(job(tokens_per_micro_batch=size)).moments["passes"] for size in (1000, 2000))
    assert many["activations"] == pytest.approx(2 * few["activations"], rel=1e-3)
    order = [
        plan(job(tokens_per_micro_batch=4096, activation_checkpointing=mode)).peak_bytes
        for mode in ("none", "cheap", "layers")
    ]
    assert order == sorted(order, reverse=True)
    comparing = plan(job(evaluate_on=("bridge",), on_gpu=False)).moments["comparing"]
    assert comparing["the base again"] == comparing["weights"] == 4 * WEIGHTS


def test_a_2b_with_adapters_took_what_is_planned_for_it(monkeypatch):
    """A first update of benchmarks/memory.py, which has no moments yet; its process is what it held beside weights."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)  # with make's, what is freed stays
    (row,) = [row for row in read(RESULTS / "memory.jsonl") if row["layers"] == 26]
    two_b = job(PRESETS[row["model"]], on_gpu=False, dtype=row["dtype"], lora=row["lora"],
                activation_checkpointing=row["activation_checkpointing"],
                tokens_per_micro_batch=row["tokens"])  # fmt: skip
    held = plan(two_b).moments["passes"] | {"optimizer": 0}
    planned = row["before_bytes"] + sum(held.values()) - held["weights"]
    assert planned == pytest.approx(row["peak_bytes"], rel=0.05)


def test_large_models_are_sharded_by_themselves():
    two_b = PRESETS["gemma-2-2b"]
    assert [job(shape, ranks=8).shards for shape in (SHAPE, two_b)] == [1, 8]
    assert replace(job(two_b, ranks=16), ranks_of_host=8).shards == 8
    assert job(two_b, ranks=8, lora=16).shards == 1
    held = parts(shape=two_b, ranks=8, moment="passes")
    assert held["optimizer"] == two_b.num_weights and held["gathered"] > 2 * two_b.vocab_size * two_b.hidden_size


def test_flops_of_positions_are_those_of_the_batch():
    batch = pack([([1, 2, 3], [4, 5]), ([1, 2], [6])])
    assert flops_of(SHAPE, batch.position_ids, batch.num_action_tokens) == update_flops(SHAPE, batch)
    assert plan(job(tokens_per_micro_batch=100)).flops > 6 * 100 * 2 * 49_152


def test_what_is_computed_again_takes_time_too():
    def flops(**flags):
        return plan(job(tokens_per_micro_batch=800, **flags)).flops

    layers, head = sum(layer_flops(SHAPE, torch.arange(800))), head_flops(SHAPE, 240)
    assert flops(activation_checkpointing="layers") == flops() + layers
    assert flops(activation_checkpointing="cheap") == flops()
    assert flops(kl_coefficient=0.1) == flops() + layers + 4 * head  # the reference's pass, both heads, and a gradient
    assert flops(proximal_every=1) == flops() + layers + head
