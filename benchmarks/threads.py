"""How should a thread that waits for the others wait? Sampling and an update, quiet and beside a busy process.

    python -m benchmarks.threads [--threads 2] [--rounds 5] [--repeats 3] [--waiting swirl] [--tiny] [--json] [--out F]

Ways to wait: swirl's own (GOMP_SPINCOUNT=500, set by the package where the user has set nothing), libgomp's (300,000),
sleeping at once (OMP_WAIT_POLICY=PASSIVE) and spinning without end (ACTIVE). Each by hand, swirl's also under make and
as a rank of torchrun; each on the machine as it is, and beside one process that never rests. Seconds of the comb of
benchmarks.sampling, drawn by the base that ships with swirl, and of the forward and backward pass of an update of four
combs: a process's medians, and of those the median and the range over rounds. A round runs each case once, since a
machine's speed drifts by more than what is looked for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAITING = {
    "swirl": {},
    "libgomp": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
}
LAUNCHERS = ("by hand", "make", "torchrun")
CASES = [(waiting, "by hand") for waiting in WAITING] + [("swirl", launcher) for launcher in LAUNCHERS[1:]]


def work(given: argparse.Namespace) -> None:
    """In this process: a JSON object of seconds, into the file that SWIRL_THREADS_OUT names."""
    import swirl  # noqa: F401, I001  (before torch, as in every command: libgomp reads the environment when it is loaded)
    import torch

    from benchmarks.sampling import COMB, TINY, comb_states
    from benchmarks.train_step import UpdateConfig, workload
    from swirl.app.resolve import load_model
    from swirl.learning import gradient
    from swirl.learning.batches import num_tokens
    from swirl.learning.objective import Objective
    from swirl.sampling.engine import Engine

    torch.set_num_threads(given.threads)
    model, _ = load_model("almanac")
    comb = TINY if given.tiny else COMB
    new, states = comb["new"], comb_states(comb["trunk"], comb["states"], comb["draws"], model.config.vocab_size)
    actions = workload("comb", 1 if given.tiny else 4, model.config.vocab_size)
    config = UpdateConfig()
    objective = Objective(config, model)

    def update():
        gradient.accumulate(model, objective, actions, num_tokens(actions), config)

    def sample():
        Engine(model).sample(states, seeds=range(len(states)), max_new_tokens=new, stop_ids=())

    found = {}
    for name, run in (("sample_s", sample), ("update_s", update)):
        run()
        times = []
        for _ in range(given.repeats):
            model.zero_grad(set_to_none=True)
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        found[name] = statistics.median(times)
    Path(os.environ["SWIRL_THREADS_OUT"]).write_text(json.dumps(found))


def measure(given: argparse.Namespace, waiting: str, launcher: str, folder: Path) -> dict:
    """One process, started that way, waiting that way."""
    unset = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    out = folder / "found.json"
    environment |= {"PYTHONPATH": str(ROOT), "SWIRL_THREADS_OUT": str(out), "OMP_NUM_THREADS": str(given.threads)}
    words = ["benchmarks.threads", "--worker", "--threads", str(given.threads), "--repeats", str(given.repeats)]
    words += ["--tiny"] if given.tiny else []
    command = [sys.executable, "-m", *words]
    if launcher == "make":
        makefile = folder / "Makefile"
        makefile.write_text(f"include {ROOT / 'Makefile'}\nmeasured:\n\t{' '.join(command)}\n")
        command = ["make", "--silent", "-f", str(makefile), "measured"]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment | WAITING[waiting], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{launcher}, {waiting}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(out.read_text())


def _busy_process() -> subprocess.Popen:
    """In a session of its own, as another user's is: Linux shares the CPU out by sessions first (autogroups), and
    torchrun's ranks have their own too.
    """
    return subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)


def rows_of(given: argparse.Namespace):
    """A row for each case, without and with company; the cases in turn, so that a drift meets all."""
    import torch

    from benchmarks.harness import machine

    facts, cases = machine(torch.device("cpu")), [case for case in CASES if case[0] in given.waiting]
    with tempfile.TemporaryDirectory() as folder:
        for busy in (False, True):
            company = _busy_process() if busy else None
            try:
                rounds = [[measure(given, *case, Path(folder)) for case in cases] for _ in range(given.rounds)]
            finally:
                if company is not None:
                    company.kill()
                    company.wait()
            for (waiting, launcher), found in zip(cases, zip(*rounds)):
                named = {"benchmark": "threads", "waiting": waiting, "launcher": launcher, "busy": busy}
                how = {"threads": given.threads, "tiny": given.tiny, "load": os.getloadavg()[0]}
                yield facts | named | how | {"rounds": given.rounds} | summed_up(found)


def summed_up(found: Sequence[dict]) -> dict:
    """The median of each figure over rounds, and its least and its most."""
    row = {}
    for name in found[0]:
        values = [one[name] for one in found]
        row |= {name: statistics.median(values), f"{name}_range": [min(values), max(values)]}
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5, help="processes a case")
    parser.add_argument("--repeats", type=int, default=3, help="of each process")
    parser.add_argument("--waiting", choices=WAITING, nargs="+", default=list(WAITING), help="ways to wait")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--json", action="store_true", help="one JSON row a line on stdout, no table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        return work(given)
    from benchmarks.harness import append

    for row in rows_of(given):
        append(given.out, [row])
        who = f"{row['waiting']:8} {row['launcher']:9} {'beside a busy process' if row['busy'] else 'quiet':22}"
        said = f"{who} sampling {row['sample_s']:6.2f} s, update {row['update_s']:6.2f} s"
        print(json.dumps(row) if given.json else said, flush=True)


if __name__ == "__main__":
    main()
