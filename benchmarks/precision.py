"""Does training in bfloat16 end where float32 does? Imitation of Almanac's demonstrator from the model that ships.

  python -m benchmarks.precision --updates 200 --seeds 3

A seed orders the data. Held-out: natural log-prob of an action token of questions that were not trained on, under the
saved weights, computed in float32 for both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--trajectories-per-update", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=300, help="to train on; 40 others are held out")
    parser.add_argument("--out", type=Path, help="append the rows to this file (.jsonl)")
    given = parser.parse_args(arguments)
    tokenizer = resolve.load_model("almanac")[1]
    others = [with_ids(trajectory, tokenizer) for trajectory in demonstrated("validation", 40)]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_trajectories(folder / "data.jsonl", demonstrated("train", given.questions))
        runs = [(dtype, seed) for dtype in ("float32", "bfloat16") for seed in range(given.seeds)]
        for dtype, seed in runs:
            out = folder / f"{dtype}-{seed}"
            config = TrainConfig(
                mode="imitation", data=folder / "data.jsonl", evaluate_on=(), updates=given.updates, dtype=dtype,
                seed=seed, trajectories_per_update=given.trajectories_per_update, out=out, device="cpu", save_minutes=0,
            )  # fmt: skip
            summary = train(config)
            losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            row = {"benchmark": "precision", "dtype": dtype, "seed": seed, "updates": given.updates}
            row |= {"held_out_log_prob": held_out(out / "checkpoint", others), "last_20_losses": np.mean(losses[-20:])}
            row |= {"wall_s": summary["wall_s"], **machine(torch.device("cpu"))}
            append(given.out, [row])
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
