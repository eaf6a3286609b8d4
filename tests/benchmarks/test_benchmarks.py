"""The benchmark commands run, at sizes that only show that, and their rows say what they must."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import (
    attention,
    attention_peers,
    client,
    decode,
    first_run,
    harness,
    head_draw,
    linear_log_prob,
    packing,
    plot,
    pointwise,
    sampling,
    slow_reward,
    tables,
    threads,
    train_step,
    tune,
    workloads,
)
from benchmarks.__main__ import benchmarks
from swirl.config import TrainConfig, sized
from swirl.kernels.tree_attention import tree_mask
from swirl.model.config import PRESETS
from tests.process import run_module

COMMANDS = {
    "attention": attention,
    "decode": decode,
    "head_draw": head_draw,
    "linear_log_prob": linear_log_prob,
    "pointwise": pointwise,
}


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
    assert tables.newest(name, rows) == []  # tiny rows say nothing
    table = tables.TABLES[name](tables.newest(name, [row | {"tiny": False} for row in rows]))
    assert "swirl" in table and "reference" in table


def test_crossover(capsys):
    attention.main(["--tiny", "--device", "cpu", "--json", "--crossover"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    points = [(b, n, f) for b in (2, 4) for n in (0, 16) for f in ("tree", "separate")]
    assert [(row["branches"], row["trunk"], row["form"]) for row in rows] == points
    ratios = [row["token_ratio"] for row in rows if row["form"] == "separate"]
    assert ratios == [1, round(160 / 144, 3), 1, round(320 / 272, 3)]
    assert all(row["time_ratio"] > 0 for row in rows if row["form"] == "separate")
    rows = [row | {"tiny": False} for row in rows]
    picture = ElementTree.fromstring(plot.svg(rows))
    assert sum(element.tag.endswith("polyline") for element in picture) == 4
    lines = [line.split(" | ") for line in tables.crossover(rows).splitlines() if "branches |" in line]
    assert [line[0] for line in lines] == ["| 2 branches", "| 4 branches"] and lines[1][2].endswith("(1.18) |")


def test_no_rows_no_picture(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no rows"):
        plot.svg([])
    monkeypatch.setattr(sys, "argv", ["plot", "--rows", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "x.svg")])
    with pytest.raises(SystemExit, match="none.jsonl: no rows"):
        plot.main()
    assert not (tmp_path / "x.svg").exists()


def test_the_committed_picture_is_that_of_the_rows():
    assert (
        plot.svg(harness.read(harness.RESULTS / "crossover.jsonl")) == (harness.RESULTS / "crossover.svg").read_text()
    )


@pytest.mark.parametrize("readme", tables.READMES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_tables_in_the_readmes_are_those_of_the_rows(readme):
    text = readme.read_text()
    assert tables.filled(text, tables.tables()) == text
    marks = [len(re.findall(mark, text, re.MULTILINE)) for mark in ("^<!-- table: ", "^<!-- end -->$")]
    assert marks == [len(tables.MARKED.findall(text))] * 2


def test_marked_tables_are_filled_and_nothing_else_is_touched():
    text = "before\n<!-- table: packing -->\nold\n<!-- end -->\nbetween\n<!-- table: client -->\n<!-- end -->\nafter\n"
    new = tables.filled(text, {"packing": "| a |", "client": "| b |"})
    assert new == text.replace("old", "| a |").replace("client -->\n", "client -->\n| b |\n")
    assert tables.filled(new, {"packing": "| a |", "client": "| b |"}) == new
    unmeasured = tables.filled(text, {"packing": "| a |"})
    assert (
        "client -->\nNot measured: `python -m benchmarks.client --out benchmarks/results/client.jsonl`.\n" in unmeasured
    )
    with pytest.raises(ValueError, match="no table clients; there are attention, "):
        tables.filled(text.replace("table: client", "table: clients"), {})


def test_a_later_row_replaces_an_earlier_one(tmp_path):
    rows = [{"workload": w, "hardware": h, "packed_tokens": n} for n, (w, h) in enumerate(["ab", "cb", "ab", "aa"])]
    assert [row["packed_tokens"] for row in tables.newest("packing", rows)] == [2, 1, 3]
    harness.append(tmp_path / "packing.jsonl", rows[:2])
    harness.append(tmp_path / "packing.jsonl", rows[2:])
    tables.prune(tmp_path)
    assert harness.read(tmp_path / "packing.jsonl") == [rows[2], rows[1], rows[3]]


def test_tables_of_the_benchmarks_that_time_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "STEPS", 3)
    for module, arguments in ((packing, ["--tokens", "3000"]), (train_step, ["--trees", "1", "--repeats", "1"])):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [name, "--json", "--out", str(tmp_path / f"{name}.jsonl"), *arguments])
        module.main()
    harness.append(tmp_path / "client.jsonl", [client.run(calls=8, latency_ms=1, in_flight=4, faults=0.0)])
    made = tables.tables(tmp_path)
    assert {"train_step", "packing", "client"} <= set(made)
    chain, comb = (line.split(" | ") for line in made["train_step"].splitlines()[4:])
    assert "whole update (of the matrix rate)" in made["train_step"].splitlines()[2]
    assert chain[:3] == ["| chain", "750 → 330", "330"] and comb[:3] == ["| comb", "3,000 → 550", "3,000"]
    shapes = [line.split(" | ")[0] for line in made["packing"].splitlines()[4:]]
    assert shapes == [f"| {name}" for name in packing.SHAPES]
    assert "| 8 of 1 ms, 4 in flight | 0% |" in made["client"]


def test_an_update_is_timed_whole_and_leaves_the_weights_alone():
    model = train_step.opened("almanac", None, torch.bfloat16, "cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    optimizer = train_step.make_optimizer(model, learning_rate=0.0)
    side = train_step.Swirl(model, train_step.UpdateConfig(), optimizer)
    actions = train_step.workload("comb", 1, model.config.vocab_size, steps=2)
    passes_s, update_s, found = train_step.measure(side, actions)
    assert 0 < passes_s < update_s and found["computed_tokens"] == 390 and found["grad_norm"] > 0
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_updates_of_other_models_and_machines_have_tables_of_their_own():
    rows = [row for row in harness.read(harness.RESULTS / "train_step.jsonl") if row["model"] == "almanac"]
    other = {"model": "gemma-2-2b", "hardware": "H200", "packed_update_s": 0.5, "update_utilization": 0.25}
    _, here, there = tables.train_step([*rows, *(row | other for row in rows)]).split("\n\n| ")
    assert "whole update" not in here and there.count("| 500 ms (25%) |") == len(rows)


def test_rows_of_the_first_run_are_of_three_runs(tmp_path, monkeypatch):
    asked = []

    def trained(config):
        asked.append(config)
        before, after = ({family: accuracy for family in config.evaluate_on} for accuracy in (0.25, len(asked) / 4))
        return {"accuracy_before": before, "accuracy_after": after}

    monkeypatch.setattr(first_run, "train", trained)
    first_run.main(["--out", str(tmp_path / "first_run.jsonl")])
    assert [(config.mode, *(path.name for path in config.data)) for config in asked] == [
        ("auto",), ("imitation", "kept.jsonl"), ("imitation", "trajectories.jsonl")
    ]  # fmt: skip
    assert {path.parent for config in asked for path in config.data} == {asked[0].out}
    lines = tables.tables(tmp_path)["first_run"].splitlines()[2:]
    assert lines[0] == "|  | bridge | deep | counterfactual | mixed | arithmetic |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| base", "25.0%"],
        ["| step reward on sampled actions", "25.0%"],
        ["| imitation of the kept trajectories", "50.0%"],
        ["| imitation of all trajectories", "75.0%"],
    ]


@pytest.mark.slow  # three runs of train, and their five families
def test_the_first_run_shrunk(tmp_path):
    first_run.main(["--smoke", "--out", str(tmp_path / "first_run.jsonl")])
    rows = harness.read(tmp_path / "first_run.jsonl")
    assert [row["updates"] > 0 for row in rows] == [False, True, True, True]
    assert all(row["tiny"] and len(row["accuracy"]) == 5 for row in rows)


def test_a_run_cut_short_leaves_the_rows_it_has(tmp_path):
    how = harness.settings("", ["--tiny", "--device", "cpu", "--json", "--out", str(tmp_path / "rows.jsonl")])
    report = harness.Report("some", how)
    report.add("swirl", lambda: None)["extra"] = 1
    report.add("peer", lambda: 1 / 0)
    assert [json.loads(line)["extra"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [1]
    report.finish()
    _, peer = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert peer["note"].startswith("ZeroDivisionError") and "median_ms" not in peer
    with pytest.raises(ZeroDivisionError):
        report.add("swirl", lambda: 1 / 0)


def test_the_list_names_every_command(capsys):
    run = subprocess.run([sys.executable, "-m", "benchmarks"], capture_output=True, text=True, check=True)
    assert all(f"benchmarks.{name}" in run.stdout for name in COMMANDS)
    assert all(line for line in benchmarks().values())


def test_what_claims_to_be_the_same_operator_is():
    how = harness.settings("", ["--tiny", "--device", "cpu"])
    report = harness.Report("attention", how)
    shapes = [(workloads.from_data("tree", "musique", 700), 2, 1, 32, 90), (workloads.agent(900), 2, 1, 32, None)]
    attention._measure_all(report, shapes, ceiling=1e9)
    reference = [row["difference"] for row in report.rows if row["provider"] == "reference"]
    assert len(reference) == 4 and max(reference) < 1e-5


def test_cheap_ways_of_all_workloads_come_before_dear_ones():
    how = harness.settings("", ["--tiny", "--device", "cpu"])
    report = harness.Report("attention", how)
    attention._measure_all(report, attention._workloads(how), ceiling=1e9)
    cases = list(attention._workloads(how))
    names = [row["workload"] for row in report.rows if row["provider"] == "swirl"]
    assert list(dict.fromkeys(names)) == [workload.name for workload, *_ in cases]
    turn = {p.name: p.turn for w, heads, _, D, window in cases for p in attention.providers(w, heads, D, window, how)}
    turns = [turn[row["provider"]] for row in report.rows]
    assert turns == sorted(turns) and set(turns) == {0, 1, 2, 3}


@pytest.mark.parametrize("name", COMMANDS)
def test_compiling_calls_swirls_kernels_and_leaves_no_rows(name, tmp_path, monkeypatch):
    called, out = [], tmp_path / "rows.jsonl"
    add = harness.Report.add

    def counted(report, provider, run, **facts):
        return add(report, provider, run and (lambda: called.append(provider) or run()), **facts)

    monkeypatch.setattr(harness.Report, "add", counted)
    COMMANDS[name].main(["--tiny", "--device", "cpu", "--compile", "--out", str(out)])
    assert set(called) == {"swirl"} and not out.exists()


@pytest.mark.parametrize("T", [1, 300, 640])
@pytest.mark.parametrize("window", [None, 40])
def test_blocks_of_flash_attn_4_are_the_mask(T, window):
    workload = workloads.fork(T // 2, 3, max(1, T // 8), 2)
    mask = (workload.subtree_end, workload.position_ids)
    visible = tree_mask(*mask, window)
    for of_queries in (True, False):
        partial, columns, full, full_columns = (
            x[0, 0] for x in attention_peers.sparse_blocks(mask, window, 128, 64, of_queries)
        )
        assert all(x.dtype == torch.int32 for x in (partial, columns, full, full_columns))
        seen, unmasked = torch.zeros_like(visible), torch.zeros_like(visible)
        for row in range(len(partial)):
            for counts, lists in ((partial, columns), (full, full_columns)):
                for column in lists[row, : counts[row]].tolist():
                    q, k = (row, column) if of_queries else (column, row)
                    block = slice(128 * q, 128 * q + 128), slice(64 * k, 64 * k + 64)
                    assert not seen[block].any()
                    seen[block] = True
                    unmasked[block] |= counts is full
        assert bool((visible <= seen).all()) and bool((unmasked <= visible).all())


def pairs_of(kind, dataset):
    return workloads._pairs(kind, json.loads(workloads.STATISTICS.read_text())[dataset], np.random.default_rng(3))


def test_merged_rows_are_trajectories_and_the_samples_not_gone_on_from():
    chain = pairs_of("chain", "musique")
    assert workloads._workload("", chain).merged == (sum(map(len, chain[-1])),)
    comb = pairs_of("comb", "musique")
    trunk = [sum(map(len, comb[-workloads.SAMPLES]))]  # the recorded action of the last state ends the trajectory
    samples = [len(state) + len(action) for i, (state, action) in enumerate(comb) if i % workloads.SAMPLES]
    assert sorted(workloads._workload("", comb).merged) == sorted(trunk + samples)
    tree = workloads._workload("", pairs_of("tree", "hotpotqa"))
    assert len(tree.merged) == len(tree.separate) * 3 // 4 + workloads.TRAJECTORIES


@pytest.mark.parametrize("num_tokens", [151, 200, 777, 4096])
@pytest.mark.parametrize("kind", ["chain", "comb", "tree"])
def test_a_forest_from_data_has_the_tokens_asked_for(kind, num_tokens):
    for seed in range(5):
        workload = workloads.from_data(kind, "gsm8k", num_tokens, seed)
        assert workload.num_tokens == num_tokens <= sum(workload.merged) <= sum(workload.separate)


def test_a_forest_too_small_for_an_action_is_refused():
    with pytest.raises(ValueError, match="150 tokens hold no action"):
        workloads.from_data("comb", "musique", 150)


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


@pytest.mark.slow
def test_the_gpu_script_goes_as_far_as_a_cpu_can(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = ["bash", "benchmarks/gpu.sh", "--dry-run", "tests", "kernels", "update", "tune"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for name in (*COMMANDS, "crossover"):
        assert len(harness.read(tmp_path / f"{name}.jsonl")) > 2
    tuned = harness.read(tmp_path / "tune.jsonl")
    slots = {"tree_attention": tune.ATTENTION_SLOTS, "linear_log_prob": tune.HEAD_SLOTS}
    expected = [(op, slot.name) for op in slots for slot in slots[op]]
    assert [(row["op"], row["slot"]) for row in tuned if row["shipped"]] == expected
    assert all("median_ms" in row for row in tuned if row["shipped"])


# What a machine lent for an hour has beside torch and triton may be little: these are not needed there.
LACKING = "msgspec tyro bm25s rich aiohttp tokenizers huggingface_hub transformers usearch pyarrow vllm"
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r.split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


# The help of each benchmark, in one process.
EACH_HELP = """
import contextlib, io, runpy, sys

for name in sys.argv[1:]:
    said, sys.argv = io.StringIO(), [name, "--help"]
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    assert "usage" in said.getvalue(), name
"""


@pytest.mark.parametrize("part", ["tests", "kernels --help"])
def test_a_bare_machine_has_enough(part, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT % LACKING)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}."}
    if part == "tests":
        files = ["tests/kernels/test_gpu.py", "tests/kernels/test_gpu_backends.py"]
        command = ["-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files]
    else:
        command = ["-c", EACH_HELP, *COMMANDS, "tune"]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.parametrize(("part", "files"), [("update", ["train_step", "memory"]), ("sampling", ["sampling"])])
def test_a_bare_machine_updates_and_samples(part, files, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT % LACKING)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHON": sys.executable, "OUT": str(tmp_path)}
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--dry-run", part], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for name in files:
        rows = harness.read(tmp_path / f"{name}.jsonl")
        assert rows and all("note" not in row or row["provider"] == "transformers" for row in rows), rows


def test_an_update_without_swirls_config_is_that_of_its_defaults():
    config = sized(TrainConfig(mode="recorded"), 0)
    assert asdict(train_step.UpdateConfig()).items() <= vars(config).items()


def test_the_cpu_script_calls_commands_that_there_are():
    run = subprocess.run(
        ["bash", "benchmarks/cpu.sh"], capture_output=True, text=True, check=True, env=os.environ | {"PYTHON": "echo"}
    )
    called = [line.split()[1].removeprefix("benchmarks.") for line in run.stdout.splitlines()]
    assert set(called) <= set(benchmarks()) and called[-2:] == ["plot", "tables"]
    for name in re.findall(r"results/(\w+)\.jsonl", run.stdout):
        assert name in tables.TABLES


@dataclass(frozen=True)
class Blocks:
    size: int
    num_warps: int


def search(op, shipped, tmp_path, seconds=60.0):
    """What `tune` finds for an op(config) -> result with one slot: rows, and the table afterwards."""
    table = {"key": (Blocks(*shipped), "another slot's")}

    def run():
        return (op(table["key"][0]),)

    slot = tune.Slot("only", 0, False, ((1, 2, 3), (4, 8)), (), or_none=True)
    report = harness.Report("tune", harness.settings("", ["--device", "cpu", "--seconds", "0", "--json"]))
    tune.tune(tune.Case("op", table, "key", (slot,), run, run), report, seconds)
    return report.rows, table


def test_tune_tries_the_nearest_first_and_leaves_the_table_alone(tmp_path):
    rows, table = search(lambda config: torch.ones(3), (2, 4), tmp_path)
    assert [row["provider"] for row in rows] == ["2 4", "none", "1 4", "2 8", "3 4", "1 8", "3 8"]
    assert [row["shipped"] for row in rows] == [True] + [False] * 6
    assert table == {"key": (Blocks(2, 4), "another slot's")}


def test_tune_skips_and_says_what_fails_or_gives_another_result(tmp_path, capsys):
    def op(config):
        if config is None or config.size == 3:
            raise RuntimeError("out of shared memory\nmore")
        return torch.full((3,), float("nan") if config.num_warps == 8 else config.size * 1.0)

    rows, table = search(op, (2, 4), tmp_path)
    notes = {row["provider"]: row["note"] for row in rows}
    assert notes["2 4"] is None and "median_ms" in rows[0]
    assert notes["none"] == notes["3 4"] == notes["3 8"] == "RuntimeError: out of shared memory"
    assert notes["1 4"] == notes["2 8"] == "another result"
    assert table == {"key": (Blocks(2, 4), "another slot's")}
    assert "nothing better (7 tried, 6 of them skipped, 0 not reached)" in capsys.readouterr().err


def test_tune_finds_the_better_one_and_stops_in_time(tmp_path, capsys):
    def op(config):
        if config == Blocks(2, 4):
            time.sleep(0.03)
        return torch.ones(3)

    search(op, (2, 4), tmp_path, seconds=0.0)
    assert "better None" in (said := capsys.readouterr().err) and "(2 tried, 0 of them skipped, 5 not reached)" in said


def test_tune_needs_kernels_that_run(tmp_path):
    run = run_module("benchmarks.tune", "--tiny", "--device", "cpu", cwd=tmp_path, without=["TRITON_INTERPRET"])
    assert run.returncode == 1 and run.stderr.startswith("tune: needs a CUDA GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_script_says_what_it_lacks():
    run = subprocess.run(
        ["bash", "benchmarks/gpu.sh"], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert run.returncode == 1 and "CUDA" in run.stderr


def test_sampling_of_256_sequences_has_its_floor_and_needs_a_gpu(capsys):
    config, comb = sampling.config_of("gemma-2-2b"), sampling.MANY
    assert config == PRESETS["gemma-2-2b"] and comb["states"] * comb["draws"] == 256
    floor = sampling.floor_bytes(config, 2, **comb)  # bfloat16: 104 KiB of keys and values a token
    assert floor == comb["new"] * (2 * config.num_weights + 104 * 1024 * (1024 + 256 * comb["new"] / 2))
    found = sampling.combs(argparse.Namespace(shapes=list(sampling.SHAPES), tiny=False, growth=True))
    assert found[:3] == [("base", sampling.COMB), ("80m", sampling.COMB), ("gemma-2-2b", comb)]
    assert {shape for shape, _ in found[3:]} == {"base", "80m"} and all("axis" in grown for _, grown in found[3:])
    with pytest.raises(SystemExit):
        sampling.main(["--shapes", "gemma-2-2b", "--tiny"])
    assert "--shapes gemma-2-2b: expected --device cuda, not 'cpu'" in capsys.readouterr().err


def test_sampling_ends_where_swirl_fails_and_goes_on_where_a_peer_does():
    how = argparse.Namespace(threads=1, device="nowhere", seconds=0.0, repeats=1)
    with pytest.raises(SystemExit, match="base failed\\n(.|\n)*device"):
        sampling.measure(how, "swirl", "base", sampling.TINY)
    peer = sampling.measure(how, "uncaptured", "base", sampling.TINY)
    assert peer["note"].startswith("RuntimeError: Expected one of cpu") and "median_s" not in peer


def test_the_table_of_sampling_is_by_hardware_and_says_whose_the_growth_is():
    rows = harness.read(harness.RESULTS / "sampling.jsonl")
    gpu = rows[0] | {"hardware": "NVIDIA H200", "shape": "gemma-2-2b", "dtype": "bfloat16", "commit": "abc"}
    _, grid, growth, source, last = tables.sampling([*rows, gpu]).split("\n\n")
    assert "Gemma-2 2b" not in grid and growth.startswith("Growth: the base that ships at commit ")
    assert source.startswith("NVIDIA H200, ") and "bfloat16" in source and source.endswith("commit abc")
    assert last.count("| Gemma-2 2b | swirl |") == 1 and last.count("\n") == 2


@pytest.mark.slow
def test_sampling(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    sampling.main(["--tiny", "--shapes", "base", "--threads", "1", "--seconds", "0", "--json", "--out", str(out)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["provider"], row.get("axis")) for row in rows] == [
        ("swirl", None), ("transformers", None), ("swirl", "draws"), ("swirl", "draws"),
    ]  # fmt: skip
    assert all(row["tokens_per_s"] > 0 and row["tiny"] and row["hardware"] for row in rows), rows
    assert all(row["share_of_floor"] > 0 and row["dtype"] == "float32" for row in rows), rows
    assert tables.newest("sampling", rows) == []  # tiny rows say nothing
    rows = [row | {"tiny": False} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    picture = ElementTree.parse(sampling.draw_picture(tmp_path / "rows.jsonl")).getroot()
    table = tables.sampling(tables.newest("sampling", rows))
    assert table.count("| the base that ships |") == 2 and "| transformers |" in table
    assert sum(element.tag.endswith("polyline") for element in picture.iter()) == 1


@pytest.mark.slow
def test_threads(tmp_path, capsys):
    out = tmp_path / "threads.jsonl"
    threads.main(["--tiny", "--threads", "1", "--rounds", "1", "--repeats", "1", "--json", "--out", str(out)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    cases = [(row["waiting"], row["launcher"], row["busy"]) for row in rows]
    assert cases == [(*case, busy) for busy in (False, True) for case in threads.CASES]
    assert all(row["sample_s"] > 0 and row["update_s"] > 0 for row in rows)
    assert tables.threads(rows).count(" / ") == 2 * len(threads.CASES) + 1


@pytest.mark.slow
def test_slow_reward(tmp_path, capsys):
    out = tmp_path / "slow_reward.jsonl"
    slow_reward.main(["--tiny", "--latency-ms", "5", "--json", "--out", str(out)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["staleness"], row["latency_ms"]) for row in rows] == [(0, 0), (0, 5), (1, 0), (1, 5)]
    assert all(row["median_s"] > 0 and row["masked"] == 0 and row["actions"] > 0 for row in rows), rows
    assert tables.slow_reward(rows).count(" s |") == 4
