"""How good is a policy: accuracy, F1 and the share of GOOD steps on whole trajectories, with bootstrap intervals.

Every question is answered once, greedily, with at most the paper's number of queries (5 with search, 10 with the
calculator); the official rule of each data set scores the answer.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from swirl import cli, tasks
from swirl.environment.client import Client
from swirl.environment.policy import EndpointLimits
from swirl.environment.rollout import RolloutLimits, rollouts
from swirl.errors import ConfigError
from swirl.filter import judge_steps
from swirl.open import answers_beside, open_judge, open_policy
from swirl.progress import progress
from swirl.trajectory import Question, Trajectory, write_trajectories


@dataclass(frozen=True)
class EvaluateConfig:
    policy: str = "almanac"
    """`almanac` (ships with swirl), a checkpoint folder, or a server's URL."""
    tasks: tuple[str, ...] = tasks.ALMANAC_FAMILIES
    """Almanac families, or one data set by name with --questions."""
    questions: Path | None = None
    corpus: Path | None = None
    top_k: int = 1
    split: str = "test"
    limit: int | None = 200
    """Questions per task."""
    judge: str | None = "rule"
    """Who says which steps are GOOD: `rule`, a URL, or None for accuracy alone."""
    temperature: float = 0.0
    max_new_tokens: int = 48
    in_flight: int = 1024
    out: Path | None = None
    """Where to keep the trajectories, JSONL."""
    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <out>.answers.sqlite. Without
    --out none is kept, for the model behind an address may have changed since."""
    endpoint: EndpointLimits = EndpointLimits()


class Score(msgspec.Struct, frozen=True):
    """Scores of one task. Arrays are per question, in question order; `interval` is the 95% bootstrap of the mean."""

    task: str
    accuracy: float
    interval: tuple[float, float]
    f1: float
    good_steps: float | None
    unjudged_steps: int
    questions: int
    accuracy_by_hops: dict[str, float]
    correct: tuple[bool, ...]


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean of `values` (N,), N >= 1; pairs are kept by passing differences."""
    values = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)


def good_step_share(trajectories: Sequence[Trajectory]) -> tuple[float | None, int]:
    """(share of GOOD among judged steps, number unjudged); the share is averaged within, then across trajectories.

    Source: Table 3 of arXiv:2504.04736.
    """
    shares, unjudged = [], 0
    for trajectory in trajectories:
        verdicts = [step.verdict for step in trajectory.steps]
        unjudged += verdicts.count(None)
        judged = [verdict == "GOOD" for verdict in verdicts if verdict is not None]
        if judged:
            shares.append(sum(judged) / len(judged))
    return (float(np.mean(shares)) if shares else None), unjudged


def score_trajectories(task: str, trajectories: Sequence[Trajectory]) -> Score:
    """Scores of one trajectory a question, every question of it present."""
    correct = tuple(tasks.is_correct(t.question, t.prediction) for t in trajectories)
    f1 = [0.0 if t.prediction is None else tasks.score(t.question, t.prediction)["f1"] for t in trajectories]
    by_hops: dict[str, list[bool]] = defaultdict(list)
    for trajectory, right in zip(trajectories, correct, strict=True):
        by_hops[str(trajectory.question.hops)].append(right)
    good, unjudged = good_step_share(trajectories)
    return Score(
        task=task,
        accuracy=float(np.mean(correct)),
        interval=bootstrap_interval(correct),
        f1=float(np.mean(f1)),
        good_steps=good,
        unjudged_steps=unjudged,
        questions=len(correct),
        accuracy_by_hops={hops: float(np.mean(right)) for hops, right in sorted(by_hops.items())},
        correct=correct,
    )


async def answer(
    questions: Sequence[Question],
    *,
    task: tasks.Task,
    policy,
    coder,
    judge,
    temperature: float,
    max_new_tokens: int,
    in_flight: int,
    seed: int,
    advance,
) -> list[Trajectory]:
    """One judged trajectory a question, in question order. `judge` None leaves steps without verdicts."""
    limits = RolloutLimits(
        max_queries=task.max_queries,
        max_steps=task.max_queries + 1,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    asked = [(question, 0) for question in questions]
    made = {}
    playing = rollouts(
        asked,
        policy=policy,
        tool=task.open_tool(),
        limits=limits,
        coder=coder,
        seed=seed,
        in_flight=in_flight,
    )
    async for trajectory in playing:
        made[trajectory.question.id] = await judge_steps(trajectory, judge) if judge else trajectory
        advance()
    return [made[question.id] for question in questions]


async def _evaluate(config: EvaluateConfig) -> list[Score]:
    opened = [
        tasks.open_task(name, questions=config.questions, corpus=config.corpus, top_k=config.top_k)
        for name in config.tasks
    ]
    asked = {task.name: task.questions(config.split, config.limit) for task in opened}
    for name, questions in asked.items():
        if not questions:
            raise ConfigError(f"task '{name}' has no questions to ask")
        if any(question.answer is None for question in questions):
            raise ConfigError(f"task '{name}' has questions without golden answers: nothing to score against")
    scores, kept = [], []
    cache = config.cache or (answers_beside(config.out) if config.out else None)
    async with Client(cache) as client:
        policy, coder = open_policy(config.policy, device=config.device, client=client, limits=config.endpoint)
        judge = open_judge(config.judge, client=client, limits=config.endpoint) if config.judge else None
        with progress("evaluate", sum(map(len, asked.values()))) as advance:
            for task in opened:
                made = await answer(
                    asked[task.name],
                    task=task,
                    policy=policy,
                    coder=coder,
                    judge=judge,
                    temperature=config.temperature,
                    max_new_tokens=config.max_new_tokens,
                    in_flight=config.in_flight,
                    seed=config.seed,
                    advance=advance,
                )
                scores.append(score_trajectories(task.name, made))
                kept += made
    if config.out:
        write_trajectories(config.out, kept)
    return scores


def main(config: EvaluateConfig) -> None:
    from swirl.report import print_scores

    scores = asyncio.run(_evaluate(config))
    if sys.stdout.isatty():
        print_scores(scores)
    else:
        for score in scores:
            sys.stdout.write(msgspec.json.encode(score).decode() + "\n")


if __name__ == "__main__":
    cli.run(main, EvaluateConfig, __doc__)
