"""Does a run take the memory that its plan says? Real runs of `train`, their planned and their measured peak.

    python -m benchmarks.plan [--only NAME ...] [--out benchmarks/results/plan.jsonl]

Each case is a process of two updates, of a random model in the shape of a Gemma, on demonstrated trajectories of
Almanac: sizes from 1M to 200M weights, both dtypes, adapters, activation checkpointing, actions recorded and drawn, a
reference policy, checkpoints while it trains. `planned` is the line at its start, `measured` the most that the process
held (RSS), both from its summary.json; `utilization` is what updates reach of the machine's matrix rate.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import append, machine
from benchmarks.run_costs import write_data
from swirl.app.resolve import ALMANAC_BASE
from swirl.model.config import GEMMA3, GemmaConfig
from swirl.model.gemma import Gemma
from swirl.model.tokenizer import Tokenizer
from swirl.storage.digest import unseal


def _shape(third: bool, vocabulary: int, d: int, F: int, layers: int, heads: int, kv_heads: int, head_dim: int):
    sizes = dict(hidden_size=d, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=heads,
                 num_key_value_heads=kv_heads, vocab_size=vocabulary, head_dim=head_dim, sliding_window=512,
                 query_pre_attn_scalar=head_dim)  # fmt: skip
    return GemmaConfig(**(GEMMA3 if third else {}) | sizes)


SHAPES = {
    "1M": _shape(False, 1024, 128, 256, 6, 4, 2, 32),  # that of the base which ships with swirl
    "13M": _shape(False, 8192, 384, 1536, 6, 4, 2, 64),
    "35M": _shape(True, 32768, 512, 2048, 6, 4, 1, 128),
    "65M": _shape(False, 32768, 768, 3072, 5, 4, 2, 128),
    "200M": _shape(True, 65536, 1024, 4096, 9, 8, 4, 128),
}
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["swirl.train", "swirl.app.stages"])
WORDS = "def score(question, steps, step):\n    return float(len(step.action) % 2)\n"  # a reward that draws differ in


@dataclass(frozen=True)
class Case:
    shape: str
    flags: str
    tokens: int = 1024
    trajectories: int = 10


CASES = {
    "recorded": Case("1M", "", 4096, 40),
    "13M": Case("13M", ""),
    "layers": Case("13M", "--activation-checkpointing layers"),
    "cheap": Case("13M", "--activation-checkpointing cheap"),
    "bfloat16": Case("13M", "--dtype bfloat16"),
    "reference": Case("13M", "--kl-coefficient 0.1"),
    "drawn": Case("13M", "--mode sampled --reward REWARD --samples-per-state 2 --kl-coefficient 0.1", 512, 2),
    "saving": Case("35M", "--save-every 1 --activation-checkpointing layers", 512, 6),
    "8 bits": Case("35M", "--optimizer adamw-8bit", 512, 6),
    "65M": Case("65M", "", 256, 4),
    "adapters": Case("65M", "--lora 16", 512, 6),
    "adapters, reference": Case("35M", "--lora 8 --kl-coefficient 0.1 --activation-checkpointing layers", 512, 6),
    "adapters, bfloat16": Case("200M", "--lora 16 --dtype bfloat16 --activation-checkpointing cheap", 256, 3),
    "evaluated": Case("1M", "--evaluate-on bridge --evaluate-num-questions 20", 1024, 12),
}


def train(words: list[str], errors: str) -> None:
    """The body of a process: the command, as it is typed."""
    sys.argv, sys.stdout = ["train", *words], open(os.devnull, "w")
    sys.stderr = open(errors, "w", buffering=1)
    from swirl.train import run_command

    run_command()


def run(words: list[str], folder: Path) -> None:
    """One run, forked from a process that has imported it all, which is most of a start. Raises SystemExit."""
    process = FORKS.Process(target=train, args=(words, str(folder / "errors.txt")))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"train {' '.join(words)}: {(folder / 'errors.txt').read_text().strip().splitlines()[-1]}")


def measure(name: str, folder: Path) -> dict:
    """A row: one run of a case."""
    case = CASES[name]
    model = SHAPES[case.shape]
    base = folder / case.shape
    if not base.exists():
        with torch.no_grad():
            made = Gemma(model).init_weights(0)
            made.save_pretrained(base, Tokenizer.from_pretrained(ALMANAC_BASE))
            del made
    data = sorted(folder.glob("part-*.jsonl"))
    flags = ["--updates", "2", "--tokens-per-micro-batch", case.tokens, "--trajectories-per-update", case.trajectories]
    flags += ["--save-minutes", "0", "--model", base, "--out", folder / "run", "--data", *data]
    if "--mode" not in case.flags:
        flags += ["--mode", "recorded"]
    if "--evaluate-on" not in case.flags:
        flags += ["--evaluate-on"]
    flags += case.flags.replace("REWARD", f"{folder / 'words.py'}:score").split()
    run(["--device", "cpu", *map(str, flags)], folder)
    summary = json.loads(unseal((folder / "run" / "summary.json").read_bytes()))
    updates = [json.loads(unseal(line)) for line in (folder / "run" / "metrics.jsonl").read_bytes().splitlines()]
    return {
        "benchmark": "plan",
        "case": name,
        "shape": case.shape,
        "weights": model.num_weights,
        "flags": case.flags,
        "tokens": case.tokens,
        "planned_bytes": summary["planned_peak_bytes"],
        "measured_bytes": summary["peak_bytes"],
        "ratio": round(summary["planned_peak_bytes"] / summary["peak_bytes"], 3),
        "utilization": round(statistics.median(one["utilization"] for one in updates), 3),
        "wall_s": round(summary["wall_s"], 1),
        **machine(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, 400)
        (folder / "words.py").write_text(WORDS)
        for case in given.only:
            row = measure(case, folder)
            append(given.out, [row])
            print(
                f"{case:<22} {row['shape']:>5}  planned {row['planned_bytes'] / 1e9:5.2f}  "
                f"measured {row['measured_bytes'] / 1e9:5.2f} GB  {row['ratio']:.2f}  "
                f"utilization {row['utilization']:.2f}  {row['wall_s']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
