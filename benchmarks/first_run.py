"""What `make train` comes to, beside imitation of the same trajectories: greedy accuracy of every family.

  python -m benchmarks.first_run [--seed 0] [--out benchmarks/results/first_run.jsonl]

Step reward is the default job. It leaves the trajectories that its base policy generated, and those of them that its
filter kept; imitation of either is `train --mode imitation --data` on that file, with the job's own updates and seed.
Rows are appended as runs end; `--smoke` shrinks all three runs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.harness import append, machine
from swirl.config import TrainConfig
from swirl.tasks import FIRST_EDITION
from swirl.train import train

IMITATED = {"imitation of the kept trajectories": "kept.jsonl", "imitation of all trajectories": "trajectories.jsonl"}


def runs(folder: Path, seed: int, smoke: bool) -> Iterator[tuple[str, TrainConfig, dict[str, float]]]:
    """Method, config and accuracy by family, as runs end. The base is what the first run evaluates before it trains."""
    settings = {"device": "cpu", "seed": seed, "smoke": smoke, "evaluate_on": FIRST_EDITION}
    job = TrainConfig(out=folder / "run", **settings)
    summary = train(job)
    yield "base", job, summary["accuracy_before"]
    yield "step reward on sampled actions", job, summary["accuracy_after"]
    for method, name in IMITATED.items():
        config = TrainConfig(out=folder / method, mode="imitation", data=job.out / name, **settings)
        yield method, config, train(config)["accuracy_after"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the same runs, shrunk")
    parser.add_argument("--out", type=Path, help="append the rows to this file (.jsonl)")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        for method, config, accuracy in runs(Path(folder), given.seed, given.smoke):
            row = {"benchmark": "first_run", "method": method, "seed": given.seed, "tiny": given.smoke}
            row |= {"updates": 0 if method == "base" else config.updates, "questions": config.num_questions}
            row |= {"test_questions": config.evaluate_num_questions, "accuracy": accuracy}
            append(given.out, [row | machine(torch.device("cpu"))])


if __name__ == "__main__":
    main()
