"""What a run costs beside its updates: the start on a million trajectories, and saving.

    python -m benchmarks.run_costs start [--trajectories 1000000] [--out FILE.jsonl]
    python -m benchmarks.run_costs saving [--pairs 5] [--out FILE.jsonl]

`start` writes so many trajectories of Almanac into four files under --folder, trains one update on them and one on 200
of them, and gives the seconds until the first update begins, and the largest memory of the process. `saving` trains the
default job shortened (100 questions, 12 updates) in turn without a checkpoint and with one after every update: a save
takes their difference, divided by 12, and its share is that of the 5 minutes between two saves by default. CPU seconds
are those of all threads; they bear a busy machine better than seconds do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.harness import append, machine
from swirl.app.resolve import ALMANAC_BASE
from swirl.config import TrainConfig
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.prompts import question_prompt
from swirl.rollout.rollout import with_ids
from swirl.storage.digest import seal, unseal
from swirl.tasks import almanac
from swirl.tools.search import search_tool
from swirl.trajectories.record import Step, Trajectory, encode_trajectory

NUM_FILES = 4
NUM_UPDATES = 12
RECORDED = ("--mode", "recorded", "--updates", "1", "--trajectories-per-update", "8", "--save-minutes", "0")
DEFAULT_JOB = ("--num-questions", "100", "--updates", str(NUM_UPDATES), "--save-minutes", "0")


def write_data(folder: Path, num: int) -> list[Path]:
    """So many demonstrated trajectories with ids and rewards: those of 500 questions again and again, under new ids."""
    tokenizer, rng = Tokenizer.from_pretrained(ALMANAC_BASE), np.random.default_rng(0)
    lines = []
    for question in almanac.questions("bridge", "train", 500):
        script = almanac.demonstrate(question, rng, slips=None)
        steps = tuple(Step(action=action, observation=seen, reward=1.0) for action, seen in script)
        prompt = question_prompt(question.question, [search_tool()], 5)
        made = Trajectory(id="#", question=question, prompt=prompt, steps=steps, stop="answer")
        lines.append(encode_trajectory(with_ids(made, tokenizer)))
    paths = [folder / f"part-{k}.jsonl" for k in range(NUM_FILES)]
    for k, path in enumerate(paths):
        with path.open("wb", 1 << 20) as file:
            for i in range(k, num, NUM_FILES):
                file.write(seal(lines[i % len(lines)].replace(b'"#"', b'"t-%d"' % i, 1)))
    return paths


def run(folder: Path, *flags: str) -> dict:
    """Seconds and CPU seconds of one training run, and its metrics."""
    words = [sys.executable, "-m", "swirl.train", "--device", "cpu", "--evaluate-on", *flags, "--out", str(folder)]
    began = time.time()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: {said.strip().splitlines()[-1]}")
    log = folder / "metrics.jsonl"
    metrics = [json.loads(unseal(line)) for line in log.read_bytes().splitlines()]
    first_line_at = log.stat().st_mtime if len(metrics) == 1 else None
    return {
        "s": time.time() - began,
        "cpu_s": used.ru_utime + used.ru_stime,
        "start_s": first_line_at and first_line_at - metrics[0]["update_s"] - began,
        "peak_bytes": used.ru_maxrss * 1024,
    }


def start(given: argparse.Namespace, folder: Path) -> list[dict]:
    paths = write_data(folder, given.trajectories)
    few = write_data(folder_of(folder / "few"), 200)
    rows = []
    for num, files in ((200, few), (given.trajectories, paths)):
        made = run(folder / f"run-{num}", *RECORDED, "--data", *map(str, files))
        rows.append({"trajectories": num, "data_bytes": sum(file.stat().st_size for file in files), **made})
    for row in rows:
        print(
            f"{row['trajectories']:>9,} trajectories, {row['data_bytes'] / 1e6:,.0f} MB: first update begins after "
            f"{row['start_s']:.1f} s; {row['cpu_s']:.1f} CPU s in all; {row['peak_bytes'] / 1e6:.0f} MB"
        )
    return rows


def folder_of(path: Path) -> Path:
    path.mkdir()
    return path


def saving(given: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    for pair in range(given.pairs):
        without = run(folder / f"without-{pair}", *DEFAULT_JOB)
        saved = run(folder / f"saved-{pair}", *DEFAULT_JOB, "--save-every", "1")
        rows.append({name: (saved[name] - without[name]) / NUM_UPDATES for name in ("s", "cpu_s")})
        print(f"pair {pair + 1}: {rows[-1]['s']:+.3f} s a save, {rows[-1]['cpu_s']:+.3f} CPU s", flush=True)
    middle = {name: median(row[name] for row in rows) for name in rows[0]}
    shares = {name: value / (60 * TrainConfig().save_minutes) for name, value in middle.items()}
    print(
        f"a save every {TrainConfig().save_minutes:g} minutes: {shares['s']:.2%} of the time, {shares['cpu_s']:.2%} CPU"
    )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_costs", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("start", "saving"))
    parser.add_argument("--trajectories", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where files are made and removed; 1.8 GB a million trajectories")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = {"start": start, "saving": saving}[given.what](given, Path(folder))
    of_machine = machine(torch.device("cpu"))
    append(given.out, [{"benchmark": f"run_costs {given.what}", **row, **of_machine} for row in rows])


if __name__ == "__main__":
    main()
