"""Stage 1 and evaluation within `train`: by the policy in this process, sharded over ranks, in memory."""

from __future__ import annotations

import sys

from swirl import tasks
from swirl.app import resolve
from swirl.app.evaluation import answer, evaluation_steps, generation_steps
from swirl.app.progress import progress
from swirl.app.run_folder import RunFolder
from swirl.app.scores import Score, score_trajectories
from swirl.config import TrainConfig
from swirl.errors import ConfigError, InputError
from swirl.judging.filtering import Judges, filter_in_memory
from swirl.learning import distributed
from swirl.rollout.rollout import RolloutSpec, Unanswered, collect
from swirl.rollout.task import Task
from swirl.sampling.local_policy import LocalPolicy
from swirl.storage.digest import file_digest
from swirl.trajectories.log import read_trajectories, write_trajectories
from swirl.trajectories.record import Trajectory

KEPT = "kept.jsonl"


async def evaluate(
    config: TrainConfig, policy: LocalPolicy, tokenizer, names: tuple[str, ...], split: str, description: str
) -> list[Score]:
    """Scores of greedy answers to each task's questions of that split. Same on every rank."""
    opened = [tasks.open_task(name) for name in names]
    asked = [task.take(split, config.evaluate_num_questions) for task in opened]
    total = sum(len(distributed.my_share(questions)) for questions in asked)
    scores = []
    if not names:
        return scores
    with progress(description, total, show=distributed.is_main()) as advance:
        for task, questions in zip(opened, asked, strict=True):
            spec = _spec(config, policy, tokenizer, task, max_steps=evaluation_steps(task), temperature=0.0)
            mine = await answer(
                distributed.my_share(questions), spec, judge=resolve.open_judge("rule"), advance=advance
            )
            scores.append(score_trajectories(task, _gathered(mine)))
    return scores


def _spec(
    config: TrainConfig, policy: LocalPolicy, tokenizer, task: Task, *, max_steps: int, temperature: float
) -> RolloutSpec:
    return RolloutSpec(
        task=task,
        policy=policy,
        tokenizer=tokenizer,
        max_steps=max_steps,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        seed=config.seed,
    )


async def generate(config: TrainConfig, policy: LocalPolicy, tokenizer) -> list[Trajectory]:
    """The policy's own trajectories on every task to train on. Same on every rank."""
    made = []
    for name in config.task:
        task = tasks.open_task(name)
        questions = task.take("train", config.num_questions)
        asked = distributed.my_share([(question, s) for question in questions for s in range(config.samples)])
        temperature = config.generate_temperature
        spec = _spec(config, policy, tokenizer, task, max_steps=generation_steps(task), temperature=temperature)
        with progress(f"generate {name}", len(asked), show=distributed.is_main()) as advance:
            mine = await collect(asked, spec, advance=advance)
        made += _gathered(mine)
    return made


async def generate_and_filter(config: TrainConfig, policy: LocalPolicy, tokenizer, run: RunFolder) -> list[Trajectory]:
    """Stage 1: the policy's own trajectories that pass `config.filter`; all and the kept are also written down.

    Raises ConfigError where none passes.
    """
    made = await generate(config, policy, tokenizer)
    with progress("filter", len(made), show=distributed.is_main()) as advance:
        judges = Judges(resolve.open_judge("rule"), tasks.is_correct)
        kept, _ = await filter_in_memory(made, judges, mode=config.filter, advance=advance)
    if distributed.is_main():
        write_trajectories(run.path / "trajectories.jsonl", made)
        write_trajectories(run.path / KEPT, kept)
        print(f"kept {len(kept)} of {len(made)} trajectories ({config.filter} filter)", file=sys.stderr)
    if not kept:
        raise ConfigError(f"--filter {config.filter} kept none of {len(made)} trajectories: nothing to train on")
    return kept


def kept_before(run: RunFolder, digest: str) -> list[Trajectory]:
    """The kept trajectories of a run that goes on, read again. Raises InputError where they are not those it had."""
    kept = None
    if distributed.is_main():
        path = run.resumed.folder.parent / KEPT
        if not path.exists() or file_digest(path) != digest:
            raise InputError(path, "is not as it was when the checkpoint was made: the run cannot go on from it")
        kept = read_trajectories(path)
        if path.parent != run.path:
            write_trajectories(run.path / KEPT, kept)
    return distributed.from_main(kept, list[Trajectory])


def _gathered(mine: list[Trajectory | Unanswered]) -> list[Trajectory | Unanswered]:
    """All ranks' shares, in order; each item travels as a pair, so that it says of what kind it is."""
    pairs = [(None, item) if isinstance(item, Unanswered) else (item, None) for item in mine]
    return [
        one or other for one, other in distributed.gather_shares(pairs, tuple[Trajectory | None, Unanswered | None])
    ]
