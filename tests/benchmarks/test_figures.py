"""Figures in the prose of the pages are those of the rows in benchmarks/results. Tables are in test_benchmarks.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import paper_evidence, tables
from benchmarks.harness import RESULTS, read
from benchmarks.paper_evidence import IMITATION, STEP, difference, side

ROOT = Path(__file__).parents[2]


def rows(name: str, **what) -> list[dict]:
    found = tables.newest(name, read(RESULTS / f"{name}.jsonl"))
    return [row for row in found if all(row.get(key) == value for key, value in what.items())]


def experiments() -> Iterator[str]:
    done = paper_evidence.read(RESULTS / "paper.jsonl")

    def against(theirs):
        found = difference(done, STEP, theirs, "bridge-2")
        return [f"{value:.1f}".replace("-", "−") for value in (found.mean, found.low, found.high)]

    mean, low, high = against(IMITATION)
    yield f"bridge-2: +{mean} points, 95% interval {low} to {high};"
    mean, low, high = against(side(method="imitation", updates=200))
    yield f"against 200 updates of imitation +{mean}, {low} to {high}, not decided"
    mean, low, high = against(side(method="outcome_rl", filter="none"))
    yield f"({mean}; {low} to {high})"
    accuracy = {row["method"]: row["accuracy"]["bridge"] for row in rows("first_run")}
    methods = ("step reward on sampled actions", "imitation of the kept trajectories")
    step, imitated = (f"{100 * accuracy[method]:.1f}%" for method in methods)
    yield f"imitation is as good ({imitated} on bridge, step reward {step}; one seed)"


def packed_updates() -> Iterator[str]:
    chain, comb = (rows("train_step", workload=name)[-1] for name in ("chain", "comb"))
    yield f"{chain['measured_ratio']:.1f} times as fast as one pass a sub-trajectory for 8 recorded steps"
    yield f"and {comb['measured_ratio']:.1f} times with 4 actions drawn at each"
    assert 0.9 < chain["merged_s"] / chain["packed_s"] < 1.1 and round(comb["merged_s"] / comb["packed_s"]) == 10
    yield "is as fast for the first and ten times slower for the second"


def updates() -> Iterator[str]:
    comb = rows("train_step", workload="comb")[-1]
    assert round(comb["merged_s"] / comb["packed_s"]) == 10
    yield "ten times slower where draws do"


def draws() -> Iterator[str]:
    base, larger = (rows("sampling", shape=shape, provider="transformers", axis=None)[-1] for shape in ("base", "80m"))
    yield (
        f"{base['swirl_is_faster']:.0f} times as fast as transformers' `generate` with the shipped model's shape, "
        f"{larger['swirl_is_faster']:.0f} times with 80M parameters"
    )


def slow_rewards() -> Iterator[str]:
    at_once, ahead = (
        rows("slow_reward", trajectories=24, latency_ms=300, concurrency=512, staleness=staleness)[-1]["times_instant"]
        for staleness in (0, 1)
    )
    yield f"a call then costs an update {ahead:.2f} times the time of an instant one"
    yield f"({at_once:.2f} times with `--staleness 0`"
    larger, large = (
        rows("slow_reward", trajectories=trajectories, latency_ms=300, staleness=0)[-1] for trajectories in (96, 48)
    )
    yield (
        f"{larger['times_instant']:.2f} times with {larger['actions']:,.0f} actions, "
        f"{large['times_instant']:.2f} with {large['actions']:.0f}, at `--staleness 0`"
    )


def sampler_gaps() -> Iterator[str]:
    def largest(dtype):
        return max(row["largest_sampler_gap"] for row in read(RESULTS / "precision.jsonl")
                   if row.get("job") == "default" and row["dtype"] == dtype)  # fmt: skip

    yield f"| float32 | 1e-5 | 1e-4 | 1.2e-6 | {1e5 * largest('float32'):.1f}e-5 |"
    yield f"| bfloat16 | 0.01 | 0.2 | 1.7e-3 to 2.7e-3 | {largest('bfloat16'):.2f} |"


def memory() -> Iterator[str]:
    (row,) = [row for row in read(RESULTS / "memory.jsonl") if row["layers"] == 26]
    peak, before = (f"{row[name] / 1e9:.2f} GB" for name in ("peak_bytes", "before_bytes"))
    yield f"{row['action_tokens']:,} action tokens, on a CPU: {peak} of the process at its peak, {before} of them"
    yield f"It took {round(row['cpu_s'], -1):,.0f} s of CPU"


def folders() -> Iterator[str]:
    (row,) = rows("folder", model="gemma-2-9b", layers=42)
    assert row["equal"] and row["save_bytes"] == row["load_bytes"]
    yield f"{row['file_bytes'] / 1e9:.1f} GB in shards, takes {row['load_ratio']:.3f} times its bytes"


@pytest.mark.parametrize(
    "page, phrases",
    [
        ("README.md", experiments),
        ("README.md", packed_updates),
        ("benchmarks/README.md", updates),
        ("benchmarks/README.md", draws),
        ("docs/objective.md", slow_rewards),
        ("docs/objective.md", sampler_gaps),
        ("docs/memory.md", memory),
        ("docs/models.md", folders),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_prose_says_what_the_rows_say(page, phrases):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    for phrase in phrases():
        assert phrase in text
