"""Does training in bfloat16 end where float32 does? Runs of both from the model that ships, with several seeds.

  python -m benchmarks.precision --updates 200 --seeds 3 [--job imitation] [--out rows.jsonl]
  python -m benchmarks.precision --rows rows.jsonl         the verdict on rows that are there

The default job draws its actions, and a seed is of all draws: accuracy of each family after training, and the mean
reward of the last 20 updates. Imitation is of Almanac's demonstrator, and a seed orders its data. Held-out: natural
log-prob of the demonstrator's action tokens on questions that were not trained on, under the saved weights, in float32
for both. The verdict on a figure: whether bfloat16's mean lies between the least and the largest of float32's seeds;
and beside it Welch's t, the difference of the means over its standard error: beyond 2 or so it is more than chance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import append, machine
from swirl.app import resolve
from swirl.config import TrainConfig
from swirl.model.gemma import Gemma
from swirl.rollout.prompts import question_prompt
from swirl.rollout.rollout import with_ids
from swirl.tasks import almanac
from swirl.tools.search import search_tool
from swirl.train import train
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Step, Trajectory
from swirl.tree.pack import pack_micro_batches


def demonstrated(split: str, num: int) -> list[Trajectory]:
    """Clean answers of the demonstrator to bridge questions, with the prompt that the model knows."""
    rng, made = np.random.default_rng(0), []
    for question in almanac.questions("bridge", split, num):
        steps = almanac.demonstrate(question, rng, slips=None)
        made.append(
            Trajectory(
                id=f"{split}-{question.id}",
                question=question,
                prompt=question_prompt(question.question, [search_tool()], 5),
                steps=tuple(Step(action=action, observation=observation, reward=1.0) for action, observation in steps),
                stop="answer",
                prediction=question.answer,
            )
        )
    return made


@torch.no_grad()
def held_out(folder: Path, trajectories: list[Trajectory]) -> float:
    """Mean natural log-prob of an action token, in float32."""
    model = Gemma.from_pretrained(folder)
    pairs = [(t.state_ids(k), t.steps[k].action_ids) for t in trajectories for k in range(len(t.steps))]
    log_probs = [model.token_log_probs(batch) for batch, _ in pack_micro_batches(pairs, 4096)]
    return torch.cat(log_probs).mean().item()


def last_updates(metrics: list[dict], name: str) -> float:
    """Mean over the last 20 updates."""
    return float(np.mean([update[name] for update in metrics[-20:]]))


def figures_of_default(summary: dict, metrics: list[dict]) -> dict:
    accuracy = {f"accuracy_{family}": value for family, value in summary["accuracy_after"].items()}
    gaps = [update["sampler_gap_max"] for update in metrics if "sampler_gap_max" in update]  # where any was computed
    return accuracy | {"last_20_rewards": last_updates(metrics, "reward"), "largest_sampler_gap": max(gaps)}


def is_figure(name: str) -> bool:
    return name.startswith("accuracy_") or name in ("held_out_log_prob", "last_20_rewards", "last_20_losses")


def welch_t(before: Sequence[float], after: Sequence[float]) -> float:
    """Difference of the means over its standard error; NaN of fewer than two values a side, or where none differ."""
    if min(len(before), len(after)) < 2:
        return float("nan")
    variance = sum(np.var(values, ddof=1) / len(values) for values in (before, after))
    return float((np.mean(after) - np.mean(before)) / np.sqrt(variance)) if variance else float("nan")


def verdicts(rows: Iterable[dict]) -> list[str]:
    """A line for each job, number of updates and figure. Rows from before there were two jobs are imitation's."""
    runs: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        for name in filter(is_figure, row):
            kind = row.get("job", "imitation"), row["updates"], name
            runs.setdefault(kind, {}).setdefault(row["dtype"], []).append(row[name])
    lines = []
    for (job, updates, name), of in sorted(runs.items()):
        if of.keys() < {"float32", "bfloat16"}:
            continue
        low, high, mean = min(of["float32"]), max(of["float32"]), float(np.mean(of["bfloat16"]))
        said = "within" if low <= mean <= high else f"{max(low - mean, mean - high):.4f} outside"
        means = f"float32 {np.mean(of['float32']):.4f} ({low:.4f} to {high:.4f}), bfloat16 {mean:.4f}"
        lines.append(
            f"{job}, {updates} updates, {name}: {means}: {said}, t {welch_t(of['float32'], of['bfloat16']):+.1f}"
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("default", "imitation"), default="default")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--trajectories-per-update", type=int, default=4, help="of imitation")
    parser.add_argument("--seeds", type=int, default=3, help="how many, of each dtype")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--questions", type=int, help="to train on; default: the job's 600, or 300 of imitation")
    parser.add_argument("--evaluate-questions", type=int, default=200, help="of a family, in the default job")
    parser.add_argument("--out", type=Path, help="append the rows to this file (.jsonl)")
    parser.add_argument("--rows", type=Path, help="run nothing: the verdict on the rows of this file")
    given = parser.parse_args(arguments)
    if given.rows:
        print(*verdicts(map(json.loads, given.rows.read_text().splitlines())), sep="\n")
        return
    tokenizer = resolve.load_model("almanac")[1]
    others = [with_ids(trajectory, tokenizer) for trajectory in demonstrated("validation", 40)]
    questions = given.questions or {"default": 600, "imitation": 300}[given.job]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        settings = {"updates": given.updates, "device": "cpu", "save_minutes": 0}
        if given.job == "default":
            settings |= {"num_questions": questions, "evaluate_num_questions": given.evaluate_questions}
        else:
            write_trajectories(folder / "data.jsonl", demonstrated("train", questions))
            settings |= {"mode": "imitation", "data": folder / "data.jsonl", "evaluate_on": ()}
            settings |= {"trajectories_per_update": given.trajectories_per_update}
        seeds = range(given.first_seed, given.first_seed + given.seeds)
        for dtype, seed in ((dtype, seed) for seed in seeds for dtype in ("float32", "bfloat16")):
            out = folder / f"{dtype}-{seed}"
            summary = train(TrainConfig(dtype=dtype, seed=seed, out=out, **settings))
            metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            row = {"benchmark": "precision", "job": given.job, "dtype": dtype, "seed": seed, "updates": given.updates}
            row |= {"questions": questions, "held_out_log_prob": held_out(out / "checkpoint", others)}
            if given.job == "default":
                row |= figures_of_default(summary, metrics)
            else:
                row["last_20_losses"] = last_updates(metrics, "loss")
            row |= {"wall_s": summary["wall_s"], **machine(torch.device("cpu"))}
            append(given.out, [row])
            rows.append(row)
            print(json.dumps(row), flush=True)
    print(*verdicts(rows), sep="\n")


if __name__ == "__main__":
    main()
