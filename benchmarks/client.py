"""How close does the client come to the ideal time, in how much memory, and does it ever pay twice?

    python -m benchmarks.client [--calls 10000] [--latency-ms 50] [--in-flight 256] [--faults 0.2] [--json]

Judge calls, whole: template, request, cache on disk, verdict; against a server in a process of its own. Two
runs, one without faults (the time) and one with (the verdicts, the masks, and the server's log). The ideal is
calls times latency over calls in flight: a client that costs nothing, connections that are there already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.fault_server import verdict_of
from swirl.endpoints.chat import ChatPolicy
from swirl.endpoints.client import Client
from swirl.endpoints.endpoint import Endpoint
from swirl.judging.judges import GenerativeJudge, Judgement, StepToJudge, step_text
from swirl.judging.prompts import SEARCH_PROCESS
from swirl.rollout.concurrency import as_done
from swirl.trajectories.record import Question, Step

STALL_READ_S = 2.0  # the client's read deadline; injected stalls last longer


def items(count: int):
    """Steps as a search judge gets them, 1 to 3 earlier steps of some 300 characters each."""
    for i in range(count):
        question = Question(
            id=str(i), task="bridge", question=f"Which river runs by the town where person {i} was born?"
        )
        steps = tuple(
            Step(
                action=f"Where was person {i} born? <search_query>person {i}, {k}</search_query>",
                observation=f"person {i}, {k} -> " + "They were born in a small town by a river. " * 5,
            )
            for k in range(1 + i % 3)
        )
        yield StepToJudge(
            question=question, steps=steps, step=Step(action=f"<answer>river {i}</answer>"), tools=("search",)
        )


def run(calls: int, latency_ms: float, in_flight: int, faults: float) -> dict:
    """One run against a fresh server and a fresh cache."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        options = [
            "--latency-ms",
            str(latency_ms),
            "--faults",
            str(faults),
            "--stall-s",
            str(4 * STALL_READ_S),
        ]
        server = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fault_server", *options, "--log", log],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            url = server.stdout.readline().strip()
            row = asyncio.run(_judge(url, Path(folder) / "answers.sqlite", calls, in_flight, faults))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=30)
        seen = json.loads(log.read_text())
    ideal_s = calls * latency_ms / 1000 / in_flight
    return {
        "calls": calls,
        "latency_ms": latency_ms,
        "in_flight": in_flight,
        "faults": faults,
        **row,
        "ideal_s": ideal_s,
        "times_ideal": row["wall_s"] / ideal_s,
        "server": seen,
    }


async def _judge(url: str, cache: Path, calls: int, in_flight: int, faults: float) -> dict:
    endpoint = Endpoint(f"{url}/v1", concurrency=in_flight, read_s=STALL_READ_S if faults else 60.0)
    async with Client(cache) as client:
        judge = GenerativeJudge(ChatPolicy(endpoint, "judge", client, details=False))
        started, cpu = time.perf_counter(), time.process_time()
        judgements = await judge_all(judge, items(calls), in_flight=2 * in_flight)
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        text = client.progress.text()
    verdicts = Counter(str(judgement.verdict) for judgement in judgements)
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "verdicts": dict(verdicts),
        "masked": verdicts["None"],
        "wrong": _count_wrong(judgements, calls),
        "progress": text,
    }


async def judge_all(judge, steps: Iterable[StepToJudge], *, in_flight: int) -> list[Judgement]:
    """A judgement for each step, in order."""

    async def judged(place: int, item: StepToJudge) -> tuple[int, Judgement]:
        return place, await judge.judge(item)

    made = dict([pair async for pair in as_done((judged(*pair) for pair in enumerate(steps)), in_flight)])
    return [made[place] for place in range(len(made))]


def _count_wrong(judgements: list[Judgement], calls: int) -> int:
    """Verdicts that are not those the server gave."""
    pairs = zip(judgements, items(calls), strict=True)
    return sum(j.verdict not in (None, verdict_of(step_text(SEARCH_PROCESS, item))) for j, item in pairs)


def broken_promises(row: dict) -> list[str]:
    """What must hold at any speed, and does not."""
    checks = {
        "every call ends in a verdict or a mask": sum(row["verdicts"].values()) == row["calls"],
        "no verdict is another's": row["wrong"] == 0,
        "no request is answered twice with success": row["server"]["answered_twice"] == 0,
        "the client stays below 300 MB": row["peak_rss_bytes"] < 300e6,
    }
    return [promise for promise, holds in checks.items() if not holds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--faults", type=float, default=0.2, help="share of requests that fail in the second run")
    parser.add_argument("--json", action="store_true", help="one row a run on stdout, nothing else")
    options = parser.parse_args()
    broken: list[str] = []
    for faults in (0.0, options.faults) if options.faults else (0.0,):
        row = run(options.calls, options.latency_ms, options.in_flight, faults)
        broken += broken_promises(row)
        if options.json:
            machine = {
                "machine": platform.machine(),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
            }
            print(json.dumps({"benchmark": "client", **machine, **row}))
            continue
        server = row["server"]
        print(
            f"{row['calls']} calls, {row['latency_ms']:g} ms, {row['in_flight']} in flight, {faults:.0%} "
            f"faults: {row['wall_s']:.2f} s, {row['times_ideal']:.3f} x ideal ({row['ideal_s']:.2f} s), "
            f"{row['cpu_s']:.2f} s of CPU, {row['peak_rss_bytes'] / 2**20:.0f} MiB\n"
            f"  verdicts {row['verdicts']}, {row['masked']} masked, {row['wrong']} wrong\n"
            f"  server: {server['requests']} requests, {server['successes']} successes, "
            f"{server['answered_twice']} answered twice, faults {server['faults']}, "
            f"mean latency {server['mean_latency_ms']:.2f} ms, at most {server['most_in_flight']} in flight"
        )
    for promise in broken:
        print(f"BROKEN: {promise}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
