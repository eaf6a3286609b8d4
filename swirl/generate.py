"""Stage 1: questions -> trajectories.jsonl. A policy and a tool answer each question several times, step by step.

The file grows line by line and survives being killed; the same command again goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from swirl import cli
from swirl.environment.client import Client
from swirl.environment.policy import EndpointLimits
from swirl.environment.rollout import RolloutLimits, rollouts, trajectory_id
from swirl.errors import ConfigError
from swirl.open import answers_beside, open_policy
from swirl.progress import progress
from swirl.tasks import Task, open_task
from swirl.trajectory import Question, Trajectory, TrajectoryLog


@dataclass(frozen=True)
class GenerateConfig:
    out: Path = Path("trajectories.jsonl")
    """The JSONL file to append to."""
    task: str = "bridge"
    """An Almanac family (bridge, deep, counterfactual, mixed, arithmetic), or a data set: gsm8k, hotpotqa, musique,
    cofca, beerqa, own."""
    questions: Path | None = None
    """The data set's file; Almanac needs none."""
    corpus: Path | None = None
    """Pages to search: JSONL of {title, text}, or a folder of its index; default: those of the questions' own file."""
    top_k: int = 1
    """Pages returned for a query (the paper's 1)."""
    split: str = "train"
    """Almanac's split: train, validation or test."""
    limit: int | None = 400
    """Questions to take, from the first."""
    samples: int = 5
    """Trajectories per question (the paper's 5)."""
    policy: str = "almanac"
    """`almanac` (ships with swirl), a checkpoint folder, or a server's URL such as http://127.0.0.1:8000/v1#model."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. Ours, not the paper's."""
    max_steps: int | None = None
    """Steps in a trajectory at most; default: the paper's 5 with search, 10 with the calculator."""
    max_new_tokens: int = 48
    """Tokens in an action at most; raise it for models that think aloud."""
    in_flight: int = 1024
    """Trajectories in flight at a time."""
    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <out>.answers.sqlite."""
    endpoint: EndpointLimits = EndpointLimits()


def limits_for(task: Task, *, max_steps: int | None, max_new_tokens: int, temperature: float) -> RolloutLimits:
    """Limits of generation: as many steps as the paper allows queries, the last of which may be the answer."""
    return RolloutLimits(
        max_queries=task.max_queries,
        max_steps=max_steps or task.max_queries,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


async def collect(
    asked: list[tuple[Question, int]],
    *,
    task: Task,
    policy,
    coder,
    limits: RolloutLimits,
    seed: int,
    in_flight: int,
    advance,
) -> list[Trajectory]:
    """All trajectories of (question, sample) pairs, in the order asked, in memory."""
    tool = task.open_tool()
    order = {trajectory_id(question, sample): place for place, (question, sample) in enumerate(asked)}
    made: list[Trajectory] = []
    playing = rollouts(asked, policy=policy, tool=tool, limits=limits, coder=coder, seed=seed, in_flight=in_flight)
    async for trajectory in playing:
        made.append(trajectory)
        advance()
    return sorted(made, key=lambda trajectory: order[trajectory.id])


_MAY_CHANGE = ("out", "limit", "in_flight", "device", "cache", "endpoint")  # no line depends on these


def _refuse_other_settings(config: GenerateConfig) -> None:
    """A file is resumed only with the settings that began it; they lie beside it."""
    settings = {k: str(v) for k, v in asdict(config).items() if k not in _MAY_CHANGE}
    beside = config.out.with_name(config.out.name + ".settings.json")
    if config.out.exists() and config.out.stat().st_size and beside.exists():
        for key, value in msgspec.json.decode(beside.read_bytes()).items():
            if settings.get(key) != value:
                raise ConfigError(
                    f"{config.out} was begun with --{key.replace('_', '-')} {value}, not {settings.get(key)}: "
                    "take another --out, or the same settings"
                )
    beside.parent.mkdir(parents=True, exist_ok=True)
    aside = beside.with_name(beside.name + ".partial")
    aside.write_bytes(msgspec.json.encode(settings))
    aside.replace(beside)


async def _generate(config: GenerateConfig) -> dict:
    task = open_task(config.task, questions=config.questions, corpus=config.corpus, top_k=config.top_k)
    questions = task.questions(config.split, config.limit)
    if not questions:
        raise ConfigError(f"task '{config.task}' has no questions to ask")
    limits = limits_for(
        task, max_steps=config.max_steps, max_new_tokens=config.max_new_tokens, temperature=config.temperature
    )
    stops: dict[str, int] = {}
    async with Client(config.cache or answers_beside(config.out)) as client:
        policy, coder = open_policy(config.policy, device=config.device, client=client, limits=config.endpoint)
        _refuse_other_settings(config)
        with TrajectoryLog(config.out) as log, progress("generate", len(questions) * config.samples) as advance:
            asked = [(q, s) for q in questions for s in range(config.samples) if trajectory_id(q, s) not in log.done]
            advance(len(questions) * config.samples - len(asked))
            playing = rollouts(
                asked,
                policy=policy,
                tool=task.open_tool(),
                limits=limits,
                coder=coder,
                seed=config.seed,
                in_flight=config.in_flight,
            )
            async for trajectory in playing:
                log.append(trajectory)
                stops[trajectory.stop] = stops.get(trajectory.stop, 0) + 1
                advance()
            total = len(log.done)
    return {"out": str(config.out), "trajectories": total, "new": len(asked), "stops": stops}


def main(config: GenerateConfig) -> None:
    result = asyncio.run(_generate(config))
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


if __name__ == "__main__":
    cli.run(main, GenerateConfig, __doc__)
