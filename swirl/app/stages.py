"""What `train` does beside learning, by the policy in this process: evaluate, generate, filter, play.

All of it in memory, sharded over ranks; every function returns the same on every rank.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from swirl import tasks
from swirl.app import command, resolve
from swirl.app.evaluation import answer, evaluation_steps, generation_steps
from swirl.app.loader import is_reference
from swirl.app.progress import progress
from swirl.app.resolve_tasks import open_task
from swirl.app.run_folder import RunFolder
from swirl.app.run_records import DROPPED, GENERATED, KEPT
from swirl.app.scores import Score, score_trajectories
from swirl.config import TrainConfig
from swirl.endpoints.client import Client
from swirl.errors import InputError, NothingToLearn
from swirl.judging.filtering import Judges, filter_in_memory
from swirl.learning import distributed, sharding
from swirl.model.gemma import Gemma
from swirl.rollout.rollout import RolloutSpec, Unanswered, collect, draw_seed
from swirl.rollout.task import Task
from swirl.sampling.local_policy import LocalPolicy
from swirl.storage.digest import file_digest
from swirl.trajectories.log import read_trajectories, write_trajectories
from swirl.trajectories.record import Question, Trajectory


@dataclass(frozen=True)
class Setup:
    """The model that is trained, the policy that samples from it, and the tasks that both are for, by name."""

    config: TrainConfig
    model: Gemma
    policy: LocalPolicy
    tokenizer: object
    tasks: dict[str, Task]

    def sampling(self) -> AbstractContextManager:
        """In the body the policy has the model's weights as they are, gathered where they are sharded; all ranks meet
        here.
        """
        engine = self.policy.engine
        return sharding.gathered(self.model, engine.model, changed=lambda: engine.forget())

    def rollouts(self, name: str, *, max_steps: int, temperature: float, seed: int) -> RolloutSpec:
        """How the policy plays the task of that name."""
        return RolloutSpec(
            task=self.tasks[name],
            policy=self.policy,
            tokenizer=self.tokenizer,
            max_steps=max_steps,
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            malformed=self.config.malformed,
            stop_at_tag=self.config.stop_at_tag,
            seed=seed,
            in_flight=self.config.in_flight,
        )


async def open_tasks(config: TrainConfig, client: Client) -> dict[str, Task]:
    """The tasks that are trained and evaluated on, by name, with what the flags say of them.

    Raises ConfigError, InputError, EndpointError.
    """
    names = [*(config.task if not config.data or config.evaluate_every else ()), *config.evaluate_on]
    splits = {"train": config.questions, "validation": config.evaluate_questions, "test": config.evaluate_questions}
    files = {split: file for split, file in splits.items() if file is not None}
    opened = {}
    for name in dict.fromkeys(names):
        takes = frozenset() if is_reference(name) else tasks.flags_of(name)
        opened[name] = await open_task(
            name,
            questions=files if "questions" in takes else None,
            corpus=config.corpus if "corpus" in takes else None,
            retriever=config.retriever if "retriever" in takes else "bm25",
            top_k=config.top_k if "top_k" in takes else 1,
            without_easy=config.without_easy and "without_easy" in takes,
            tool=config.tool,
            client=client,
            limits=config.endpoint,
        )
    return opened


def open_judge(config: TrainConfig, kind: Literal["process", "reward"], client: Client):
    """Who says which steps are GOOD, or who rewards actions; None where the config names nobody.

    Raises ConfigError, CheckpointError, InputError.
    """
    spec, prompt = (config.judge, config.judge_prompt) if kind == "process" else (config.reward, config.reward_prompt)
    if spec in ("none", "recorded", "outcome"):
        return None
    return resolve.open_judge(
        spec,
        kind=kind,
        prompt=prompt,
        votes=config.votes,
        client=client,
        limits=config.endpoint,
        device=config.device,
        dtype=config.dtype,
    )


async def evaluate(
    setup: Setup, names: Sequence[str], split: str, description: str
) -> tuple[list[Score], list[Trajectory]]:
    """(scores, answers): greedy answers to each task's questions of that split, with verdicts where Almanac's rule
    knows them.
    """
    if not names:
        return [], []
    asked = {name: setup.tasks[name].take(split, setup.config.evaluate_num_questions) for name in names}
    total = sum(len(distributed.my_share(questions)) for questions in asked.values())
    scores, answers = [], []
    with setup.sampling(), progress(description, total, show=distributed.is_main()) as advance:
        for name, questions in asked.items():
            task = setup.tasks[name]
            spec = setup.rollouts(name, max_steps=evaluation_steps(task), temperature=0.0, seed=setup.config.seed)
            judge = resolve.open_judge("rule") if name in tasks.ALMANAC_FAMILIES else None
            mine = await answer(distributed.my_share(questions), spec, judge=judge, advance=advance)
            made = _gathered(mine)
            scores.append(score_trajectories(task, made))
            answers += [one for one in made if isinstance(one, Trajectory)]
    return scores, answers


async def generate(setup: Setup) -> list[Trajectory]:
    """Stage 1: the policy's own trajectories on every task to train on."""
    config, made = setup.config, []
    for name in config.task:
        task = setup.tasks[name]
        spec = setup.rollouts(
            name, max_steps=generation_steps(task), temperature=config.generate_temperature, seed=config.seed
        )
        questions = task.take("train", config.num_questions)
        asked = distributed.my_share([(question, sample) for question in questions for sample in range(config.samples)])
        with setup.sampling(), progress(f"generate {name}", len(asked), show=distributed.is_main()) as advance:
            mine = await collect(asked, spec, advance=advance)
        made += _gathered(mine)
    unanswered = [one.reason for one in made if isinstance(one, Unanswered)]
    if unanswered and distributed.is_main():
        command.warn(f"{len(unanswered)} trajectories unanswered ({command.first_reasons(unanswered)})")
    return [one for one in made if isinstance(one, Trajectory)]


async def generate_and_filter(setup: Setup, judge, run: RunFolder) -> tuple[list[Trajectory], str | None]:
    """Stage 1 and the filter: the policy's own trajectories that pass it by the verdicts of `judge`, and on the main
    rank the digest of the file that holds them. All are written down, the kept, and the dropped with the reason.

    Raises NothingToLearn where none passes; a smoke run, whose model may be random, then goes on with all of them.
    """
    made, mode = await generate(setup), setup.config.filter
    mine = distributed.my_share(made)
    with progress("filter", len(mine), show=distributed.is_main()) as advance:
        passed, failed = await filter_in_memory(mine, Judges(judge, tasks.is_correct), mode=mode, advance=advance)
    judged = {trajectory.id: trajectory for trajectory in (*passed, *failed)}
    everywhere = distributed.gather_shares([judged[one.id] for one in mine], Trajectory)
    kept = [one for one in everywhere if one.dropped is None]
    dropped = [one for one in everywhere if one.dropped is not None]
    if not kept and setup.config.smoke:
        kept = made
        if distributed.is_main():
            print(f"the {mode} filter passes none; --smoke goes on with all", file=sys.stderr)
    if distributed.is_main():
        write_trajectories(run.path / GENERATED, made)
        write_trajectories(run.path / KEPT, kept)
        write_trajectories(run.path / DROPPED, dropped)
        print(f"kept {len(kept)} of {len(made)} trajectories ({mode} filter)", file=sys.stderr)
    if not kept:
        raise NothingToLearn(f"--filter {mode} kept none of {len(made)} trajectories: nothing to train on")
    return kept, file_digest(run.path / KEPT) if distributed.is_main() else None


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


def questions_to_play(setup: Setup) -> list[tuple[str, Question]]:
    """Every question to train on, with the name of its task."""
    config = setup.config
    return [
        (name, question) for name in config.task for question in setup.tasks[name].take("train", config.num_questions)
    ]


async def play(
    setup: Setup, questions: Sequence[tuple[str, Question]], update: int
) -> list[list[Trajectory | Unanswered]]:
    """G whole trajectories of each question by the current policy, other draws in every update."""
    config, G = setup.config, setup.config.samples_per_state
    # A question that stands twice in the update has other samples each time.
    asked = [(name, question, place * G + g) for place, (name, question) in enumerate(questions) for g in range(G)]
    mine = distributed.my_share(asked)

    async def play_task(name: str) -> list[Trajectory | Unanswered]:
        spec = setup.rollouts(
            name,
            max_steps=evaluation_steps(setup.tasks[name]),
            temperature=config.temperature,
            seed=draw_seed(config.seed, "update", update),
        )
        return await collect([(question, sample) for of, question, sample in mine if of == name], spec)

    names = list(dict.fromkeys(name for name, _, _ in mine))
    with setup.sampling():
        by_task = dict(zip(names, map(iter, await asyncio.gather(*map(play_task, names))), strict=True))
    made = _gathered([next(by_task[name]) for name, _, _ in mine])
    return [made[i : i + G] for i in range(0, len(made), G)]


def _gathered(mine: list[Trajectory | Unanswered]) -> list[Trajectory | Unanswered]:
    """All ranks' shares, in order; each item travels as a pair, so that it says of what kind it is."""
    pairs = [(None, item) if isinstance(item, Unanswered) else (item, None) for item in mine]
    return [
        one or other for one, other in distributed.gather_shares(pairs, tuple[Trajectory | None, Unanswered | None])
    ]
