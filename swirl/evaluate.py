"""How good is a policy: accuracy, F1 and the share of GOOD steps on whole trajectories, with bootstrap intervals.

Every question is answered once, greedily, with at most the paper's number of queries (5 with search, 10 with the
calculator). The official rule of each data set scores the answer, and beside it, with --answer-judge, a model that
compares it with the golden one, as in the paper. A question whose request got no answer is unanswered: it is counted
beside the scores, which are over the others, and never taken for a wrong answer.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from swirl import tasks
from swirl.app import command
from swirl.app.evaluation import answer, evaluation_steps
from swirl.app.progress import progress
from swirl.app.resolve import (
    answers_beside,
    open_judge,
    open_policy,
    open_task,
    tokens_in_an_action,
)
from swirl.app.scores import Score, score_trajectories
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.errors import ConfigError
from swirl.report import print_scores
from swirl.rollout.rollout import RolloutSpec, Unanswered
from swirl.rollout.task import Task
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Question, Trajectory


@dataclass(frozen=True)
class EvaluateConfig:
    policy: str = "almanac"
    """`almanac` (ships with swirl), a checkpoint folder, or a server's URL such as http://127.0.0.1:8000/v1#model."""
    tasks: tuple[str, ...] = tasks.FIRST_EDITION
    """Almanac families, or one data set (gsm8k, hotpotqa, musique, cofca, beerqa, own) with --questions."""
    questions: Path | None = None
    """The data set's file; Almanac needs none."""
    corpus: Path | None = None
    """Pages to search: JSONL of {title, text}, or a folder of its index; default: those of the questions' own file."""
    retriever: str = "bm25"
    """What searches them: `bm25`; `dense+http://host/v1#model`, by embeddings of that server, indexed once beside the
    file; or http://host:port/retrieve, a server of Search-R1's form with pages of its own."""
    top_k: int = 1
    """Pages returned for a query (the paper's 1)."""
    split: str = "test"
    """Almanac's split: train, validation or test."""
    limit: int | None = 200
    """Questions per task, from the first; None for all."""
    judge: str | None = "rule"
    """Who says which steps are GOOD: `rule` (Almanac's oracle, for no other task), a URL, a checkpoint folder, None."""
    judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {context} and {action}."""
    answer_judge: str | None = None
    """Who says, beside the official rule, whether answers are correct: a URL or a checkpoint folder."""
    answer_judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {answer} and {prediction}."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: int | None = None
    """Tokens in an action at most; default: 48, enough for `almanac`, or 512 for a model behind a URL."""
    in_flight: int = 1024
    """Trajectories in flight at a time."""
    out: Path | None = None
    """Where to write the trajectories, JSONL."""
    seed: int = 0
    """Of the draws, where the temperature is above 0."""
    device: str = "cpu"
    """Where a checkpoint runs: cpu or cuda."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <out>.answers.sqlite. Without
    --out none is kept. Give each checkpoint that is served under one name its own."""
    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        command.require_at_least(1, self, "top_k", "limit", "max_new_tokens", "in_flight")
        command.require_at_least(0, self, "temperature")


async def _open_tasks(config: EvaluateConfig, client: Client) -> list[tuple[Task, list[Question]]]:
    """Each task with its questions, by the flags that mean something to it.

    Raises ConfigError where there is nothing to ask, or to score against, and where a flag means nothing to any task.
    """
    defaults, opened = EvaluateConfig(), []
    of_tasks = ("questions", "corpus", "top_k", "split", "retriever")
    given = [flag for flag in of_tasks if getattr(config, flag) != getattr(defaults, flag)]
    tasks.require_use(given, config.tasks)
    for name in config.tasks:
        takes = tasks.flags_of(name) - {"split"}
        flags = {flag: getattr(config, flag) for flag in of_tasks if flag in takes}
        task = await open_task(name, **flags, client=client, limits=config.endpoint)
        questions = task.take(config.split, config.limit)
        if any(question.answer is None for question in questions):
            raise ConfigError(f"task '{name}' has questions without golden answers: nothing to score against")
        opened.append((task, questions))
    return opened


async def _evaluate(config: EvaluateConfig) -> list[tuple[Task, list[Trajectory | Unanswered]]]:
    """Each task, and what came of its questions."""
    if config.out:
        _make_room(config.out)
    cache = config.cache or (answers_beside(config.out) if config.out else None)
    made = []
    async with Client(cache) as client:
        opened = await _open_tasks(config, client)
        limits = config.endpoint
        policy, tokenizer = open_policy(config.policy, device=config.device, client=client, limits=limits)
        judge = answer_judge = None
        if config.judge:
            judge = open_judge(config.judge, prompt=config.judge_prompt, client=client, limits=limits)
        if config.answer_judge:
            template = config.answer_judge_prompt
            answer_judge = open_judge(
                config.answer_judge, kind="outcome", prompt=template, client=client, limits=limits
            )
        total = sum(len(questions) for _, questions in opened)
        with progress("evaluate", total, note=client.progress.note) as advance:
            for task, questions in opened:
                knows = not tasks.is_almanac_judge(config.judge or "") or task.name in tasks.ALMANAC_FAMILIES
                spec = RolloutSpec(
                    task=task,
                    policy=policy,
                    tokenizer=tokenizer,
                    max_steps=evaluation_steps(task),
                    max_new_tokens=tokens_in_an_action(config.max_new_tokens, config.policy),
                    temperature=config.temperature,
                    seed=config.seed,
                    in_flight=config.in_flight,
                )
                judges = {"judge": judge if knows else None, "outcome_judge": answer_judge}
                made.append((task, await answer(questions, spec, **judges, advance=advance)))
    if client.progress.cached:
        command.warn(
            f"{client.progress.cached} of {client.progress.done} answers were paid for before and come from {cache}: "
            "if another model answers at that address now, name another --cache"
        )
    for task, of_task in made:
        reasons = [t.reason for t in of_task if isinstance(t, Unanswered)]
        if reasons:
            command.warn(
                f"{task.name}: {len(reasons)} of {len(of_task)} questions unanswered, scores are over the others "
                f"({command.first_reasons(reasons)})"
            )
    return made


def _make_room(out: Path) -> None:
    """So that it shows before the work, and not after, whether the trajectories can be written there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ConfigError(f"--out {out}: is a folder, expected a file to write")


def main(config: EvaluateConfig) -> None:
    made = asyncio.run(_evaluate(config))
    try:
        if config.out:
            answered = (t for _, of_task in made for t in of_task if isinstance(t, Trajectory))
            write_trajectories(config.out, answered)
    finally:  # a disk that is full costs the trajectories, not the scores
        judged = config.answer_judge is not None
        _show([score_trajectories(task, of_task, answers_judged=judged) for task, of_task in made])


def _show(scores: list[Score]) -> None:
    if sys.stdout.isatty():
        print_scores(scores)
    else:
        for score in scores:
            sys.stdout.write(msgspec.json.encode(score).decode() + "\n")


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, EvaluateConfig, __doc__)


if __name__ == "__main__":
    run_command()
