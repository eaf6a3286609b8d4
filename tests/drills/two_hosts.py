"""Two hosts on loopback, each a torchrun agent of one worker: does a run survive that one is cut off in mid-update?

    python -m tests.drills two_hosts

Host 0 keeps the c10d rendezvous. Host 1, agent and worker, is killed at a random moment after some updates. The other
worker ends by itself, its agent waits; host 1 comes back by the same command, and both go on from the last checkpoint.
The run must end in the weights and metrics of the undisturbed one, to the bit.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from swirl.config import TrainConfig
from tests.drills.resume_drill import (
    config_in,
    ended,
    make_inputs,
    num_lines,
    result,
    row,
    started,
    tiny_model,
    trajectories_of,
)
from tests.drills.table import Row

LONGEST_S = 240.0
ROOT = Path(__file__).parents[2]


def agent(host: int, port: int, config: TrainConfig) -> subprocess.Popen:
    """torchrun on a host, in a process group of its own with its worker."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "drill"]
    words += ["--rdzv-conf", f"is_host={1 - host}", "--max-restarts", "5", "-m", "swirl.train"]
    flags = {"data": config.data[0], "model": config.model, "out": config.out, "mode": config.mode}
    flags |= {
        "reward": config.reward,
        "updates": config.updates,
        "trajectories-per-update": config.trajectories_per_update,
        "device": "cpu",
    }
    flags |= {"save-every": config.save_every, "rank-timeout-s": config.rank_timeout_s, "resume": "auto"}
    words += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    # With a store shared over rounds torchrun (2.13) never tells a host that comes back where the store is.
    unshared = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = os.environ | unshared | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    said = open(config.out.parent / f"host-{host}.txt", "ab")
    with said:
        return subprocess.Popen(
            [*words, "--evaluate-on"], stdout=said, stderr=said, env=environment, start_new_session=True
        )


def cut_off(host: subprocess.Popen) -> None:
    """torchrun puts its worker into a session of its own, so both are killed by number."""
    children = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()
    for process in (host.pid, *map(int, children)):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    host.wait()


def drill_cut(folder: Path, config: TrainConfig, rng: random.Random, wanted: tuple) -> tuple[list[str], str]:
    """What did not hold, and what became of it in words."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    metrics, end = config.out / "metrics.jsonl", time.monotonic() + LONGEST_S
    hosts = [agent(host, port, config) for host in (0, 1)]
    try:
        at_least = rng.randrange(3, config.updates // 2)
        while num_lines(metrics) < at_least and time.monotonic() < end and all(host.poll() is None for host in hosts):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        cut_off(hosts[1])
        done, cut_at = num_lines(metrics), time.monotonic()
        if not at_least <= done < config.updates:
            return [f"cut off after {done} updates"], ""
        time.sleep(rng.random() * 5)
        hosts[1] = agent(1, port, config)
        codes = []
        for host in hosts:
            with suppress(subprocess.TimeoutExpired):
                host.wait(max(1.0, end - time.monotonic()))
            codes.append(host.returncode)
        note = f"cut off after update {done} of {config.updates}, ended {time.monotonic() - cut_at:.0f} s later"
        if codes != [0, 0]:
            said = (config.out.parent / "host-0.txt").read_text(errors="replace").strip().splitlines()
            return [f"exit codes {codes}: {said[-1] if said else ''}"], note
        return ([] if result(config.out) == wanted else ["weights or metrics differ"]), note
    finally:
        for host in hosts:
            if host.poll() is None:
                cut_off(host)


def drill(seed: int, cuts: int = 2) -> Iterator[Row]:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, tiny_model(folder / "made"), trajectories_of(12))
        config = config_in(folder, 40, rank_timeout_s=60.0)
        if any(ended(started(replace(config, out=folder / "undisturbed"), 2))):
            yield row("one of two hosts is cut off", 0, ["the undisturbed run failed"])
            return
        wanted = result(folder / "undisturbed")
        failures, notes = [], []
        for cut in range(cuts):
            failed, note = drill_cut(folder, replace(config, out=folder / f"cut-{cut}"), rng, wanted)
            failures, notes = failures + failed, [*notes, note]
        yield row("one of two hosts is cut off", cuts, failures, "; ".join(notes))
