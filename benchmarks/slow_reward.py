"""What does a slow reward model cost an update, beside an instant one?

    python -m benchmarks.slow_reward [--latency-ms 300] [--concurrency 64 512] [--rounds 2] [--tiny] [--out F]

`swirl.train` on sampled actions of the base that ships with swirl, each action scored by a server on loopback, in a
process of its own, that answers after so many milliseconds, many requests at once. A row for each size of update,
`--endpoint.concurrency`, `--staleness` and latency: the median seconds of an update over all rounds, the first two of a
run left out, and how many times as long it takes as with an instant reward model. Slow and instant take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def run(folder: Path, url: str, *, staleness: int, concurrency: int, trajectories: int, updates: int, tiny: bool):
    """The metrics of one run's updates, the first two left out."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "swirl.train", "--data", str(folder / "data.jsonl"), "--evaluate-on"]
    command += ["--reward", f"{url}/v1#scores", "--votes", "1", "--staleness", str(staleness), "--device", "cpu"]
    command += ["--endpoint.concurrency", str(concurrency), "--trajectories-per-update", str(trajectories)]
    command += ["--updates", str(updates), "--out", str(out), *(["--smoke"] if tiny else [])]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"swirl.train failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]


def figures(lines: list[dict]) -> dict:
    """What updates took, of their metrics."""
    took = sorted(line["update_s"] for line in lines)
    return {
        "median_s": statistics.median(took),
        "p20_s": took[len(took) // 5],
        "p80_s": took[-1 - len(took) // 5],
        "sample_s": statistics.median(line["sample_s"] for line in lines),
        "actions": statistics.median(line["actions"] for line in lines),
        "masked": sum(line["masked"] for line in lines),
        "reward": statistics.mean(line["reward"] for line in lines),
        "clipped": statistics.mean(line.get("clipped", 0.0) for line in lines),
    }


def measure(folder: Path, latency_ms: float, **how) -> list[dict]:
    """A run beside a server of that latency, fresh each time, since answers are kept in the run's folder."""
    options = ["--latency-ms", str(latency_ms)]
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.fault_server", *options], stdout=subprocess.PIPE, text=True
    )
    try:
        return run(folder, server.stdout.readline().strip(), **how)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=30)


def rows_of(given: argparse.Namespace):
    """A row for each setting, slow beside instant."""
    import torch

    from benchmarks.harness import machine

    facts = machine(torch.device("cpu"))
    size = {"updates": 4 if given.tiny else given.updates, "tiny": given.tiny}
    concurrency, rounds = (given.concurrency[:1], 1) if given.tiny else (given.concurrency, given.rounds)
    settings = itertools.product(given.trajectories, concurrency, given.staleness)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder / "data.jsonl", 8 if given.tiny else 100)
        for trajectories, concurrency, staleness in settings:
            how = {"trajectories": trajectories, "concurrency": concurrency, "staleness": staleness}
            lines = {0.0: [], given.latency_ms: []}
            for _ in range(rounds):
                for latency_ms, measured in lines.items():
                    measured += measure(folder, latency_ms, **how, **size)
            instant = figures(lines[0.0])["median_s"]
            for latency_ms, measured in lines.items():
                row = {**facts, "benchmark": "slow_reward", "latency_ms": latency_ms, **how, **figures(measured)}
                row |= {"times_instant": row["median_s"] / instant, "rounds": rounds, **size}
                yield row | {"load": os.getloadavg()[0]}


def make_data(file: Path, questions: int) -> None:
    """Trajectories to train on: the base's own, unfiltered, so that every update has as many states as they come."""
    command = [sys.executable, "-m", "swirl.generate", "--task", "bridge", "--num-questions", str(questions)]
    subprocess.run([*command, "--samples", "2", "--out", str(file)], check=True, capture_output=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency-ms", type=float, default=300.0)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--trajectories", type=int, nargs="+", default=[24], help="of an update: some 10 actions each")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--json", action="store_true", help="one JSON row a line on stdout, no table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    given = parser.parse_args(arguments)
    from benchmarks.harness import append

    for row in rows_of(given):
        append(given.out, [row])
        if given.json:
            print(json.dumps(row), flush=True)
        else:
            who = f"{row['actions']:.0f} actions, staleness {row['staleness']}, {row['concurrency']} at a time"
            took = f"{row['median_s']:.2f} s, {row['times_instant']:.2f} times an instant one's"
            print(f"{who}, {row['latency_ms']:.0f} ms: {took}", flush=True)


if __name__ == "__main__":
    main()
