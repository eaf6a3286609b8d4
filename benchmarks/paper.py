"""The paper's experiments on Almanac's second edition, graded by a judge that neither filtered nor rewarded.

  python -m benchmarks.paper                    every run that has no row yet, the headline first; rows are appended to
                                                benchmarks/results/paper.jsonl as runs end, so it may be stopped
  python -m benchmarks.paper headline filters   the runs of these blocks
  python -m benchmarks.paper --list             the blocks, and how many of their runs are done
  python -m benchmarks.paper cells              which cells of sound x right each base fills, and what each filter keeps
  python -m benchmarks.paper --write            docs/evidence.md, from the rows
  python -m benchmarks.paper --smoke --out F    all kinds of runs, each far smaller

Bases and pools of trajectories are made once, into --cache. Two at a time: --shard 0/2 and --shard 1/2, once both share
their bases (cells makes them).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from msgspec.structs import replace

from benchmarks import almanac_base, harness, paper_blocks, paper_evidence
from benchmarks.harness import grid, read
from benchmarks.paper_blocks import BASES, BLOCKS, CALCULATE, SEARCH, Base, Run
from swirl import generate, tasks, train
from swirl.app import resolve
from swirl.app.evaluation import answer, evaluation_steps
from swirl.app.scores import good_step_share
from swirl.config import TrainConfig
from swirl.judging.filtering import step_to_judge, why_dropped
from swirl.learning import usage
from swirl.rollout.rollout import RolloutSpec
from swirl.tasks import almanac
from swirl.trajectories.log import read_trajectories, write_trajectories
from swirl.trajectories.record import Trajectory

ROWS = harness.RESULTS / "paper.jsonl"
EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence.md"
NO_BASE = "Not run: no base of the second edition is made yet, so that none is known to fill the four cells."
SAMPLES = 5
MODES = {
    "sampled": {"mode": "sampled"},
    "recorded": {"mode": "recorded", "reward": "recorded", "baseline": "mean"},
    "imitation": {"mode": "imitation"},
    "outcome_rl": {"mode": "outcome-rl", "trajectories_per_update": 96},  # as many actions drawn as in `sampled`
}
FILTERS = ("none", "process", "outcome", "both")
JUDGES = ("rule", "lenient", "noisy:0.2")


class Workshop:
    """What runs share, each thing made when it is first asked for: bases, and their trajectories."""

    def __init__(self, cache: Path, *, smoke: bool, num_test: int):
        self.cache, self.smoke, self.num_test = cache, smoke, num_test

    def base(self, base: Base) -> str:
        """The folder of a base policy, `almanac` for the one that ships. A smoke run knows no other."""
        if base.edition == "first" or self.smoke:
            return "almanac"
        folder, skilled = self.cache / "bases" / base.name, self.cache / "bases" / "skilled"
        if not folder.exists():
            if base.hidden_size == 128 and not skilled.exists():
                almanac_base.main(with_skills(skilled))
            almanac_base.main(with_habits(base, str(skilled), folder))
        return str(folder)

    def pool(self, base: Base, family: str, num_questions: int) -> list[Trajectory]:
        """The base's trajectories of the first training questions, five each."""
        file = self.cache / "pools" / base.name / f"{family}.jsonl"
        asked = {question.id for question in almanac.questions(family, "train", num_questions)}

        def made() -> list[Trajectory]:
            return [t for t in read_trajectories(file) if t.question.id in asked] if file.exists() else []

        if len(made()) < SAMPLES * num_questions:
            file.parent.mkdir(parents=True, exist_ok=True)
            with quietly():
                generate.main(
                    generate.GenerateConfig(
                        out=file,
                        samples=SAMPLES,
                        task=(family,),
                        num_questions=num_questions,
                        policy=self.base(base),
                    )
                )
        return sorted(made(), key=lambda t: t.id)

    def data(self, run: Run) -> list[Trajectory]:
        """What the run trains on: of the pools of its families, what its filter keeps by its judge."""
        kept = []
        for family in (*run.trained_on, *run.mixed_in):
            made = judged(self.pool(run.base, family, run.num_questions), run.judge)
            kept += [t for t in made if why_dropped(t, run.filter) is None]
        if run.num_trajectories is not None and run.num_trajectories < len(kept):
            kept = random.Random(f"{run.base.name}/{run.seed}").sample(kept, run.num_trajectories)
        return kept


def with_habits(base: Base, start: str, folder: Path) -> almanac_base.ImitateConfig:
    """How a base of the second edition is made: from a policy that has the skills, or from scratch at another size."""
    if base.hidden_size != 128:
        size = {"hidden_size": base.hidden_size, "intermediate_size": 2 * base.hidden_size}
        return almanac_base.ImitateConfig(out=folder, seed=base.seed, edition="second", **size)
    return almanac_base.ImitateConfig(
        out=folder, seed=base.seed, edition="second", start=start, updates=300, learning_rate=5e-4,
        faultless_share=0.0, demonstrations_per_update=12,
    )  # fmt: skip


def with_skills(folder: Path) -> almanac_base.ImitateConfig:
    """From the base that ships, which has the skills and other habits: those are unlearned, all seeds alike."""
    return almanac_base.ImitateConfig(
        out=folder, edition="second", start="almanac", updates=250, learning_rate=6e-4,
        faultless_share=1.0, demonstrations_per_update=10,
    )  # fmt: skip


def judged(trajectories: Iterable[Trajectory], judge_name: str) -> list[Trajectory]:
    """With the judge's verdict on every step, and whether the final answer is the golden one."""
    judge = almanac.open_judge(judge_name)
    made = []
    for trajectory in trajectories:
        verdicts = [judge.judge_now(step_to_judge(trajectory, k, step)) for k, step in enumerate(trajectory.steps)]
        steps = (
            replace(s, verdict=v.verdict, reason=v.reason) for s, v in zip(trajectory.steps, verdicts, strict=True)
        )
        made.append(replace(trajectory, steps=tuple(steps), outcome=is_right(trajectory)))
    return made


def is_right(trajectory: Trajectory) -> bool:
    prediction = trajectory.prediction
    return prediction is not None and almanac.score(trajectory.question, prediction)["em"] == 1.0


def slips(trajectory: Trajectory) -> set[str]:
    """Of `paper_evidence.SLIPS`: the habits that show in a trajectory, whatever its tool."""
    calls = [step.call for step in trajectory.steps if step.call is not None and step.call.tool != "answer"]
    hops = trajectory.question.hops
    return {
        name
        for name, shows in (
            ("refused", trajectory.stop == "invalid_action"),
            ("repeat", len(set(calls)) < len(calls)),
            ("too few", trajectory.stop == "answer" and len(set(calls)) < hops),
            ("too many", len(set(calls)) > hops),
        )
        if shows
    }


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What commands print is for their users."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def trained(run: Run, workshop: Workshop, folder: Path) -> dict:
    """Train into `folder`; returns what to keep of how it went."""
    mode, kept = MODES[run.method], []
    if run.method == "outcome_rl":  # plays its own trajectories
        mode = mode | {"task": run.trained_on, "num_questions": run.num_questions}
    else:
        kept = workshop.data(run)
        write_trajectories(folder / "data.jsonl", kept)
        mode = mode | {"data": folder / "data.jsonl"}
    if run.method == "sampled":
        mode = mode | {"reward": run.judge}
    started = time.perf_counter()
    with quietly():
        train.train(
            TrainConfig(
                out=folder / "run",
                model=workshop.base(run.base),
                updates=run.updates,
                seed=run.seed,
                kl_coefficient=run.kl,
                evaluate_on=(),
                **mode,
            )  # fmt: skip
        )
    metrics = read(folder / "run" / "metrics.jsonl")
    draws = run.method in ("sampled", "outcome_rl")
    return {
        "kept": len(kept),
        "train_s": round(time.perf_counter() - started, 1),
        "sampled_tokens": int(sum(row["action_tokens"] for row in metrics)) if draws else 0,
    }


def evaluated(run: Run, checkpoint: str, workshop: Workshop) -> dict[str, dict]:
    """Greedy answers to the test questions of every family, judged by the oracle."""
    scores = {}
    policy, tokenizer = resolve.open_policy(checkpoint)
    for family in run.evaluated_on:
        task = tasks.open_task(family)
        spec = RolloutSpec(
            task=task if run.tools else task.without_tools(),
            policy=policy,
            tokenizer=tokenizer,
            max_steps=evaluation_steps(task),
            temperature=0.0,
        )
        made = asyncio.run(answer(task.take("test", workshop.num_test), spec, judge=almanac.RuleJudge()))
        right = [is_right(t) for t in made]
        found = Counter(slip for t in made for slip in slips(t))
        scores[family] = {
            "accuracy": sum(right) / len(right),
            "good_steps": good_step_share(made)[0],
            "slips": {slip: found[slip] / len(made) for slip in paper_evidence.SLIPS},
            "right": "".join("01"[one] for one in right),
        }
    return scores


def measure(run: Run, workshop: Workshop) -> dict:
    """The row of a run."""
    folder = workshop.cache / "runs" / blake2b(run.key.encode(), digest_size=6).hexdigest()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    how = {} if run.method == "base" else trained(run, workshop, folder)
    checkpoint = workshop.base(run.base) if run.method == "base" else str(folder / "run" / "checkpoint")
    row = {"key": run.key, "run": asdict(run), **how, "families": evaluated(run, checkpoint, workshop)}
    shutil.rmtree(folder)
    return row | {"commit": usage.commit(), "cpus": os.cpu_count()}


def cells(workshop: Workshop, bases: Iterable[Base] = BASES, num_questions: int = 400) -> str:
    """Two tables: where each base's training trajectories fall, and how many each filter keeps by each judge."""
    where, kept = [], []
    for base in bases:
        for family in (SEARCH, CALCULATE):
            pool = workshop.pool(base, family, num_questions)
            of_judge = {name: judged(pool, name) for name in JUDGES}
            count = Counter((_is_sound(t), t.outcome) for t in of_judge["rule"])
            shares = (count[sound, right] / len(pool) for sound in (True, False) for right in (True, False))
            where.append([base.name, family, len(pool), *(f"{share:.1%}" for share in shares)])
            for name, made in of_judge.items():
                counts = (sum(why_dropped(t, mode) is None for t in made) for mode in FILTERS)
                kept.append([base.name, family, name, *counts])
    headers = ["base", "family", "trajectories", "sound, right", "sound, wrong", "unsound, right", "unsound, wrong"]
    return f"{grid(headers, where)}\n\nKept by each filter:\n\n{grid(['base', 'family', 'judge', *FILTERS], kept)}"


def _is_sound(trajectory: Trajectory) -> bool:
    return all(step.verdict == "GOOD" for step in trajectory.steps)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help=f"cells, {', '.join(BLOCKS)}; default: all")
    parser.add_argument("--out", type=Path, default=ROWS, help="the rows")
    parser.add_argument("--cache", type=Path, default=Path("run-paper"), help="folder of bases, pools and runs")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="I/N: every Nth run, from the Ith")
    parser.add_argument("--list", action="store_true", help="blocks and how much of them is done; runs nothing")
    parser.add_argument("--write", action="store_true", help="docs/evidence.md from the rows; runs nothing")
    parser.add_argument("--smoke", action="store_true", help="all kinds of runs, each far smaller, on the shipped base")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.blocks if name not in ("cells", *BLOCKS)]
    if unknown:
        parser.error(f"no block '{unknown[0]}': expected of cells, {', '.join(BLOCKS)}")
    if given.smoke and given.out == ROWS:
        parser.error("--smoke: name another --out, its rows are none")
    workshop = Workshop(given.cache, smoke=given.smoke, num_test=10 if given.smoke else 200)
    done = paper_evidence.read(given.out)
    cells_file = given.out.with_name("paper_cells.md")
    if given.list:
        print(paper_evidence.status(done))
    elif given.write:
        EVIDENCE.write_text(paper_evidence.document(done, cells_file.read_text() if cells_file.exists() else NO_BASE))
    else:
        if "cells" in given.blocks or not given.blocks:
            table = cells(workshop, BASES[:1], 6) if given.smoke else cells(workshop)
            cells_file.write_text(table)
            print(table)
        names = [name for name in given.blocks if name != "cells"] or ([] if given.blocks else list(BLOCKS))
        runs = {run.key: run for name in names for run in BLOCKS[name]()}.values()
        runs = [run for run in runs if run.method in ("base", *MODES)]
        runs = paper_blocks.smoke(runs) if given.smoke else runs
        first, every = given.shard
        _run_all([run for run in runs[first::every] if run.key not in done], workshop, given.out)


def _shard(text: str) -> tuple[int, int]:
    first, _, every = text.partition("/")
    if not (first.isdecimal() and every.isdecimal() and int(first) < int(every)):
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N, such as 0/2")
    return int(first), int(every)


def _run_all(runs: list[Run], workshop: Workshop, out: Path) -> None:
    for number, run in enumerate(runs, 1):
        started = time.perf_counter()
        row = measure(run, workshop)
        harness.append(out, [row])
        accuracy = "  ".join(f"{family} {score['accuracy']:.1%}" for family, score in row["families"].items())
        print(f"{number}/{len(runs)}  {time.perf_counter() - started:.0f} s  {run.key}:  {accuracy}", file=sys.stderr)


if __name__ == "__main__":
    main()
