"""How good is a policy: accuracy, F1 and the share of GOOD steps on whole trajectories, with bootstrap intervals.

Every question is answered once, greedily, with at most the paper's number of queries (5 with search, 10 with the
calculator); with --samples N it is answered N times, as the paper's Table 3 does. The official rule of each data set
scores the answer, and beside it, with --outcome-judge, a model that compares it with the golden one, as in the paper.
A question whose request got no answer is unanswered: it is counted beside the scores, which are over the others, and
never taken for a wrong answer.
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
from swirl.app.flags import PolicyFlags
from swirl.app.progress import progress
from swirl.app.resolve import answers_beside, open_judge, require_judge_knows
from swirl.app.resolve_tasks import TaskFlags, open_tasks
from swirl.app.scores import Score, score_trajectories
from swirl.app.tables import print_scores
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.errors import ConfigError
from swirl.rollout.rollout import Unanswered
from swirl.rollout.task import Task
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Question, Trajectory


@dataclass(frozen=True, kw_only=True)
class JudgeFlags:
    """Who says what is good."""

    judge: str = "auto"
    """Who says which steps are GOOD: `rule`, `lenient` or `noisy:SHARE` (Almanac's own), a URL, a checkpoint folder,
    module:object, file.py:object, or none; auto: `rule` on Almanac, which knows no other task, and else none."""
    judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {context} and {action}."""
    outcome_judge: str | None = None
    """Who says, beside the official rule, whether answers are correct: a URL or a checkpoint folder."""
    outcome_judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {answer} and {prediction}."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """How often each question is answered, and what is kept."""

    out: Path | None = None
    """Where to write the trajectories, JSONL."""
    samples: int = 1
    """Trajectories per question; several are drawn, not greedy: give a --temperature (Table 3 of the paper: 5)."""
    tools: bool = True
    """With --no-tools the model answers directly (Figure 6 of the paper)."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <out>.answers.sqlite. Without
    --out none is kept. Give each checkpoint that is served under one name its own."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(OutputFlags, TaskFlags, PolicyFlags, JudgeFlags):
    """All flags of `evaluate`, in the groups that it inherits, some with another default."""

    task: tuple[str, ...] = tasks.FIRST_EDITION
    num_questions: int | None = 200
    temperature: float = 0.0
    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        command.require_at_least(1, self, "samples")
        command.require_no_folder(self, "out", "cache")
        self.check_task()
        self.check_policy()
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(f"--samples {self.samples}: all the same at --temperature 0, expected more than 0")


async def _evaluate(config: EvaluateConfig) -> list[tuple[Task, list[Trajectory | Unanswered]]]:
    """Each task, and what came of its questions."""
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)  # so that it shows before the work, not after
    cache = config.cache or (answers_beside(config.out) if config.out else None)
    made = []
    async with Client(cache) as client:
        opened = [
            _with_questions(config, task) for task in await open_tasks(config, client=client, limits=config.endpoint)
        ]
        judges = [_judges(config, task, client) for task, _ in opened]
        policy, tokenizer = config.open_policy(client, config.endpoint)
        total = sum(len(questions) for _, questions in opened) * config.samples
        with progress("evaluate", total, note=client.progress.note) as advance:
            for (task, questions), of_task in zip(opened, judges, strict=True):
                spec = config.spec(task, policy, tokenizer, max_steps=evaluation_steps(task))
                answers = await answer(questions, spec, samples=config.samples, **of_task, advance=advance)
                made.append((task, answers))
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


def _with_questions(config: EvaluateConfig, task: Task) -> tuple[Task, list[Question]]:
    """The task, with or without its tools, and what it is asked. Raises ConfigError where there is nothing to score
    against.
    """
    questions = task.take(config.split or "test", config.num_questions)
    if any(question.answer is None for question in questions):
        raise ConfigError(f"task '{task.name}' has questions without golden answers: nothing to score against")
    return task if config.tools else task.without_tools(), questions


def _judges(config: EvaluateConfig, task: Task, client: Client) -> dict:
    """The judges of a task's steps and answers. Raises ConfigError where one knows no such task."""
    how = {"client": client, "limits": config.endpoint, "device": config.device, "dtype": config.dtype}
    judge, outcome_judge = config.judge, None
    if judge == "auto":
        judge = "rule" if config.tools and task.name in tasks.ALMANAC_FAMILIES else "none"
    if judge == "none":
        judge = None
    else:
        require_judge_knows(judge, task.name)
        judge = open_judge(judge, prompt=config.judge_prompt, **how)
    if config.outcome_judge is not None:
        named = {"flag": "--outcome-judge", "kind": "outcome", "prompt": config.outcome_judge_prompt}
        outcome_judge = open_judge(config.outcome_judge, **named, **how)
    return {"judge": judge, "outcome_judge": outcome_judge}


def main(config: EvaluateConfig) -> None:
    made = asyncio.run(_evaluate(config))
    try:
        if config.out:
            answered = (t for _, of_task in made for t in of_task if isinstance(t, Trajectory))
            write_trajectories(config.out, answered)
    finally:  # a disk that is full costs the trajectories, not the scores
        judged = config.outcome_judge is not None
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
