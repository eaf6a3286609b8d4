"""The benchmark commands run, at sizes that only show that, and their rows say what they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import attention, decode, linear_log_prob, pointwise, workloads
from benchmarks.__main__ import benchmarks
from swirl.kernels.tree_attention import tree_mask

COMMANDS = {"attention": attention, "decode": decode, "linear_log_prob": linear_log_prob, "pointwise": pointwise}


@pytest.mark.parametrize("name", COMMANDS)
def test_rows(name, tmp_path, capsys):
    COMMANDS[name].main(["--tiny", "--device", "cpu", "--json", "--out", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(kept) == len(rows) > 2
    for row in rows:
        assert row["benchmark"] == name and row["tiny"] and row["torch"] == torch.__version__ and row["hardware"]
        assert "median_ms" in row or row["note"]
    ours = [row for row in rows if row["provider"] == "swirl"]
    assert ours and all(0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in ours)


def test_crossover(capsys):
    attention.main(["--tiny", "--device", "cpu", "--json", "--crossover"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["workload"] for row in rows] == [f"{f}, trunk {n}" for n in (0, 16) for f in ("tree", "separate")]


def test_the_list_names_every_command(capsys):
    run = subprocess.run([sys.executable, "-m", "benchmarks"], capture_output=True, text=True, check=True)
    assert all(f"benchmarks.{name}" in run.stdout for name in COMMANDS)
    assert all(line for line in benchmarks().values())


@pytest.mark.parametrize(
    "workload",
    [
        workloads.from_data("chain", "gsm8k", 500),
        workloads.from_data("comb", "musique", 500),
        workloads.from_data("tree", "hotpotqa", 900),
        workloads.agent(2000),
        workloads.causal(100),
        workloads.trees_of_256(512),
        workloads.density_039(600),
    ],
    ids=lambda workload: workload.name,
)
def test_live_pairs_are_the_masks(workload):
    mask = tree_mask(workload.subtree_end, workload.position_ids)
    assert workloads.live_pairs(workload.position_ids) == int(mask.sum())
    windowed = tree_mask(workload.subtree_end, workload.position_ids, 50)
    assert workloads.live_pairs(workload.position_ids, 50) == int(windowed.sum())


def test_density_is_what_it_says():
    workload = workloads.density_039(2048)
    assert abs(workloads.live_pairs(workload.position_ids) / (workload.num_tokens**2 / 2) - 0.39) < 0.005


def test_the_gpu_script_goes_as_far_as_a_cpu_can(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", "--dry-run", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for name in COMMANDS:
        assert (tmp_path / f"{name}.jsonl").read_text().count("\n") > 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_what_it_lacks():
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert run.returncode == 1 and "CUDA" in run.stderr
