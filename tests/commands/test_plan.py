"""`plan`, what it says at the start of a run, and memory that is not there or runs out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from swirl.app import planning
from swirl.app.planning import Memory, RunPlan, advice, job_of, needed_bytes, require_fits, told_if_out_of_memory
from swirl.config import TrainConfig, settled, sized
from swirl.errors import ConfigError, OutOfMemory
from swirl.learning.plan import plan
from swirl.model.config import PRESETS
from swirl.plan import PlanConfig
from swirl.train import train
from tests.commands.test_train import small, told  # noqa: F401
from tests.process import run_module, run_ranks


def run(*flags, cwd):
    done = run_module("swirl.plan", *flags, cwd=cwd, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_plan_says_whether_it_fits_and_what_would_make_it(tmp_path):
    flags = ("--model", "gemma-2-9b", "--gpus", "1", "--memory-gb", "80", "--mode", "recorded", "--no-evaluate")
    first, *table, besides, time, last = run(*flags, cwd=tmp_path)
    assert first == "gemma-2-9b, 9.24B weights, bfloat16, on 1 GPU: micro-batches of 4,096 tokens"
    assert table[0].split() == ["GB", "passes", "step"] and table[-1].startswith("sum")
    assert time == "the time of an update is not known: there is no GPU here whose rate could be measured"
    assert besides == "besides: 129 GB of the host's memory (checkpoint 129 GB)"
    assert ["weights", "18.48", "18.48"] in [line.split() for line in table]
    said = re.fullmatch(r"does not fit: \d+ GB of 80.0 GB; (--lora 16) makes it fit, in (.*)", last)
    *_, last = run(*flags, *said[1].split(), cwd=tmp_path)
    assert last == f"fits: {said[2]} of 80.0 GB"
    # eight cards hold it in shards, and without a size of theirs the smallest that would do is named
    *_, last = run("--model", "gemma-2-9b", "--gpus", "8", cwd=tmp_path)
    assert re.fullmatch(r"fits a card of 80 GB: .* GB", last)


def test_a_plan_of_a_folder_or_of_none(tiny_folder, tmp_path):
    lines = run("--model", tiny_folder, "--tokens", "256", "--gpus", "0", cwd=tmp_path)
    assert lines[0].endswith("float32, on a CPU: micro-batches of 256 tokens")
    assert lines[-2].startswith("an update of 256 packed tokens: about ") and lines[-1].startswith("fits: ")
    done = run_module("swirl.plan", "--model", "gemma-9", cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "gemma-9: no such folder: expected `almanac`" in done.stderr
    assert run_module("swirl.plan", "--tokens", "0", cwd=tmp_path, timeout=60).returncode == 2
    for size in (0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=f"--memory-gb {size}: expected more than 0, and finite"):
            PlanConfig(memory_gb=size)


def planned(name, ranks=1, **flags) -> RunPlan:
    model = PRESETS[name]
    asked = TrainConfig(**{"mode": "recorded", "reward": "outcome", "data": ("a",), "evaluate_on": ()} | flags)
    job = job_of(model, sized(settled(asked, {"bridge"}, "cuda"), model.num_weights), on_gpu=True, ranks=ranks)
    return RunPlan(job, plan(job), Memory(80 * 10**9, 80 * 10**9), 1e14)


def test_flags_are_tried_in_order_and_together_where_none_is_enough():
    one = planned("gemma-2-2b", tokens_per_micro_batch=32_768)
    peak = needed_bytes(one.job, one.plan)
    assert advice(one.job, peak - 10**9).startswith("--activation-checkpointing cheap makes it fit, in ")
    assert advice(one.job, 75 * 10**9).startswith("--activation-checkpointing layers makes it fit, in ")
    nine = planned("gemma-2-9b").job
    assert re.match(r"--lora 16 --activation-checkpointing layers makes it fit, in [\d.]+ GB", advice(nine, 24 * 10**9))
    assert advice(planned("gemma-2-27b").job, 24 * 10**9).startswith("no flag makes it fit: with all of them it takes")


def test_flags_are_offered_where_those_before_them_leave_them_something_to_do():
    """`auto` shards all weights, but leaves them whole beside adapters."""
    sharded = planned("gemma-2-27b", ranks=8)
    said = advice(sharded.job, 24 * 10**9)
    assert re.match(r"--activation-checkpointing layers --lora 16 --shard all makes it fit, in [\d.]+ GB", said)


def test_an_optimizer_that_takes_no_shards_is_neither_planned_nor_offered(tmp_path):
    for flag, expected in (
        (("--offload-optimizer",), "moves whole weights alone"),
        (("--optimizer", "adamw-8bit"), "steps on whole weights alone"),
    ):
        asked = ("--model", "gemma-2-9b", "--gpus", "8", *flag)
        done = run_module("swirl.plan", *asked, cwd=tmp_path, timeout=60)
        assert done.returncode == 2 and f"{' '.join(flag)}: {expected}" in done.stderr
        *_, last = run(*asked, "--lora", "16", "--shard", "all", cwd=tmp_path)  # adapters are whole
        assert last.startswith("fits a card of")
    for limit in range(10, 140, 10):
        words = advice(planned("gemma-2-27b", ranks=8).job, limit * 10**9)
        assert "--lora" in words or ("offload" not in words and "8bit" not in words)
    # the same in `train`, before it evaluates, generates and filters
    flags = ("--smoke", "--device", "cpu", "--shard", "all", "--optimizer", "adamw-8bit", "--out", "never")
    for done in run_ranks(2, "swirl.train", *flags, cwd=tmp_path, timeout=60):
        assert done.returncode == 2 and done.stderr.count("steps on whole weights alone") == 1
    assert not (tmp_path / "never").exists()


def test_the_host_must_hold_what_is_offloaded():
    nine = planned("gemma-2-9b", save_minutes=0).job
    said = r"--offload-optimizer makes it fit, in [\d.]+ GB, and 148 GB of its host's"
    assert re.fullmatch(said, advice(nine, 141 * 10**9))
    assert advice(replace(nine, host_memory=140e9), 141 * 10**9).startswith("--lora 16 makes it fit, in ")
    offloads, card = planned("gemma-2-9b", offload_optimizer=True), Memory(10**12, 10**12)
    with pytest.raises(OutOfMemory, match="--offload-optimizer takes 148 GB of the host's 140 GB; leave it out, or"):
        require_fits(replace(offloads.job, host_memory=140e9), offloads.plan, card)
    warning = require_fits(replace(offloads.job, host_memory=200e9), offloads.plan, card)
    assert warning.startswith(
        "the plan is 277 GB of the host's memory (optimizer 111 GB, gradients 37.0 GB, checkpoint"
    )
    assert warning.endswith("129 GB), which is 200 GB; --save-minutes 0 makes no copy to save")
    assert require_fits(offloads.job, offloads.plan, card) is None
    # a host without the room for the copy alone stands in the way of no other flag
    saves = replace(planned("gemma-2-9b", lora=16).job, host_memory=1e6)
    assert advice(saves, 50 * 10**9).startswith("--activation-checkpointing cheap makes it fit")


def test_a_run_that_cannot_fit_is_refused_before_it_loads(small, monkeypatch, capsys):  # noqa: F811
    config = small(told(4), updates=1, model="almanac")
    monkeypatch.setattr(planning, "memory_here", lambda device: Memory(10**8, 10**8))
    with pytest.raises(
        OutOfMemory, match=r"cannot fit: weights and what they need alone are .* of 0.10 GB of memory; "
    ):
        train(config)
    assert not config.out.exists()
    train(small(updates=1, model="almanac", data=told(4), memory_check=False))
    # what may fit is never refused
    monkeypatch.setattr(planning, "memory_here", lambda device: Memory(10**12, 10**8))
    train(small(updates=1, model="almanac", data=told(4)))
    assert "warning: the plan is " in capsys.readouterr().err


def test_memory_that_runs_out_is_one_line_with_advice():
    one = planned("gemma-2-2b")
    with pytest.raises(
        OutOfMemory, match=r"out of memory \(\d+ bytes more were asked for\), planned were .*: --"
    ) as told:
        with told_if_out_of_memory(one):
            torch.empty(1 << 50)
    assert "\n" not in str(told.value)
    with pytest.raises(OutOfMemory, match=r"^out of memory \(256 PiB more were asked for\), planned were"):
        with told_if_out_of_memory(one):
            np.empty(1 << 55)
    with pytest.raises(RuntimeError, match="shape"):
        with told_if_out_of_memory(one):
            torch.ones(2) @ torch.ones(3, 3)


def test_a_run_takes_what_its_plan_says(small):  # noqa: F811
    """Within 15%, in a process of its own; benchmarks/plan.py has larger ones."""
    config = small(told(24), model="almanac")
    flags = ("--model", "almanac", "--data", config.data[0], "--mode", "recorded", "--updates", 2, "--evaluate-on",
             "--tokens-per-micro-batch", 1024, "--trajectories-per-update", 12, "--save-minutes", 0)  # fmt: skip
    done = run_module("swirl.train", "--device", "cpu", *flags, "--out", "one", cwd=config.out.parent, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    said = re.search(
        r"^plan: ([\d.]+) GB of memory at its peak \(process .*\); about .* s for 1,024", done.stderr, re.M
    )
    summary = json.loads((config.out.parent / "one" / "summary.json").read_text())
    assert float(said[1]) == pytest.approx(summary["planned_peak_bytes"] / 1e9, abs=0.006)
    assert summary["planned_peak_bytes"] == pytest.approx(summary["peak_bytes"], rel=0.15)
    took = r"planned and measured: .* GB and .* GB of memory at its peak, (.*) s and (.*) s an update beside sampling"
    said = re.search(took, done.stderr)
    assert (said[1], said[2]) == (f"{summary['planned_update_s']:.2g}", f"{summary['measured_update_s']:.2g}")


def test_planned_seconds_are_for_the_tokens_that_updates_had():
    one = replace(planned("gemma-2-2b", ranks=2), flops_per_s=1e14)
    updates = [{"computed_tokens": n, "update_s": 5.0 + n, "sample_s": 4.0} for n in (0, 8192, 16_384, 16_384)]
    held = one.held_against(updates, 10**9)
    assert held["planned_update_s"] == pytest.approx(one.plan.flops / 1e14)  # two ranks, 8,192 tokens each
    assert held["measured_update_s"] == 16_385 and held["peak_bytes"] == 10**9
    assert "planned_update_s" not in one.held_against(updates[:1], 10**9)
