"""Stage 1 and evaluation within `train`: by the policy in this process, sharded over ranks, in memory."""

from __future__ import annotations

import sys

from swirl import tasks
from swirl.app import resolve
from swirl.app.progress import progress
from swirl.app.run_folder import RunFolder
from swirl.app.scores import Score, score_trajectories
from swirl.config import TrainConfig
from swirl.errors import ConfigError
from swirl.evaluate import answer
from swirl.filter import filter_in_memory
from swirl.generate import collect, limits_for
from swirl.learning import distributed
from swirl.sampling.local_policy import LocalPolicy
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Trajectory

IN_FLIGHT = 1024


async def evaluate(
    config: TrainConfig, policy: LocalPolicy, tokenizer, names: tuple[str, ...], split: str, description: str
) -> list[Score]:
    """Scores of greedy answers to each task's questions of that split. Same on every rank."""
    opened = [tasks.open_task(name) for name in names]
    asked = [task.questions(split, config.evaluate_num_questions) for task in opened]
    total = sum(len(distributed.my_share(questions)) for questions in asked)
    scores = []
    if not names:
        return scores
    with progress(description, total, show=distributed.is_main()) as advance:
        for task, questions in zip(opened, asked, strict=True):
            mine = await answer(
                distributed.my_share(questions),
                task=task,
                policy=policy,
                coder=tokenizer,
                judge=resolve.open_judge("rule"),
                temperature=0.0,
                max_new_tokens=config.max_new_tokens,
                in_flight=IN_FLIGHT,
                seed=config.seed,
                advance=advance,
            )
            scores.append(score_trajectories(task.name, distributed.gather_shares(mine)))
    return scores


async def generate(config: TrainConfig, policy: LocalPolicy, tokenizer) -> list[Trajectory]:
    """The policy's own trajectories on every task to train on. Same on every rank."""
    made = []
    for name in config.task:
        task = tasks.open_task(name)
        questions = task.questions("train", config.num_questions)
        asked = distributed.my_share([(question, s) for question in questions for s in range(config.samples)])
        limits = limits_for(
            task, max_steps=None, max_new_tokens=config.max_new_tokens, temperature=config.generate_temperature
        )
        with progress(f"generate {name}", len(asked), show=distributed.is_main()) as advance:
            mine = await collect(
                asked,
                task=task,
                policy=policy,
                coder=tokenizer,
                limits=limits,
                seed=config.seed,
                in_flight=IN_FLIGHT,
                advance=advance,
            )
        made += distributed.gather_shares(mine)
    return made


async def generate_and_filter(config: TrainConfig, policy: LocalPolicy, tokenizer, run: RunFolder) -> list[Trajectory]:
    """Stage 1: the policy's own trajectories that pass `config.filter`; all and the kept are also written down.

    Raises ConfigError where none passes.
    """
    made = await generate(config, policy, tokenizer)
    with progress("filter", len(made), show=distributed.is_main()) as advance:
        kept, _ = await filter_in_memory(made, judge=resolve.open_judge("rule"), mode=config.filter, advance=advance)
    if distributed.is_main():
        write_trajectories(run.path / "trajectories.jsonl", made)
        write_trajectories(run.path / "kept.jsonl", kept)
        print(f"kept {len(kept)} of {len(made)} trajectories ({config.filter} filter)", file=sys.stderr)
    if not kept:
        raise ConfigError(f"--filter {config.filter} kept none of {len(made)} trajectories: nothing to train on")
    return kept
