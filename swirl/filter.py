"""Keep the trajectories a judge calls sound: trajectories.jsonl -> kept.jsonl and dropped.jsonl with reasons.

  none      keep all                      process   every step GOOD
  outcome   the final answer is correct   both      process and outcome
A step without a verdict (the judge failed twice) is never taken for GOOD or BAD: its trajectory is dropped as
unjudged, counted apart, and judged again by the next run into fresh files.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec.structs import replace

from swirl import cli
from swirl.environment.client import Client
from swirl.environment.concurrency import as_done
from swirl.environment.judge import OutcomeToJudge, StepToJudge
from swirl.environment.policy import EndpointLimits
from swirl.errors import ConfigError, InputError
from swirl.open import answers_beside, open_judge
from swirl.progress import progress
from swirl.tasks import is_correct, tool_name
from swirl.trajectory import Trajectory, TrajectoryLog, iter_trajectories

Mode = Literal["none", "process", "outcome", "both"]


@dataclass(frozen=True)
class FilterConfig:
    data: Path = Path("trajectories.jsonl")
    """Trajectories to judge, JSONL."""
    kept: Path = Path("kept.jsonl")
    dropped: Path = Path("dropped.jsonl")
    """Dropped trajectories, each with the reason in `dropped`; both files are appended to and resumed."""
    mode: Mode = "process"
    judge: str = "rule"
    """`rule` (Almanac's own), the URL of a server whose model judges, or a checkpoint folder that does."""
    outcome_judge: str | None = None
    """Who says whether an answer is correct: a URL or a checkpoint folder; default: the data set's official rule."""
    in_flight: int = 256
    """Trajectories being judged at a time."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <kept>.answers.sqlite."""
    endpoint: EndpointLimits = EndpointLimits()


def step_to_judge(trajectory: Trajectory, k: int, action: str) -> StepToJudge:
    """`action`, recorded or drawn anew, at state k of the trajectory (from 0)."""
    return StepToJudge(
        question=trajectory.question,
        steps=trajectory.steps[:k],
        action=action,
        tool=tool_name(trajectory.question.task, trajectory.prompt),
    )


async def judge_steps(trajectory: Trajectory, judge) -> Trajectory:
    """The trajectory with a verdict on every step; verdicts it already carries are kept."""

    async def judged(k, step):
        if step.verdict is not None:
            return step
        judgement = await judge.judge(step_to_judge(trajectory, k, step.action))
        return replace(step, verdict=judgement.verdict, reason=judgement.reason, reward=judgement.reward)

    steps = await asyncio.gather(*(judged(k, step) for k, step in enumerate(trajectory.steps)))
    return replace(trajectory, steps=tuple(steps))


def why_dropped(trajectory: Trajectory, mode: Mode) -> str | None:
    """The reason, or None to keep it; `unjudged` comes before any other."""
    if mode in ("process", "both"):
        verdicts = [step.verdict for step in trajectory.steps]
        if None in verdicts:
            return f"unjudged: step {verdicts.index(None) + 1} has no verdict"
        if "BAD" in verdicts:
            bad = verdicts.index("BAD")
            return f"process: step {bad + 1} is BAD ({trajectory.steps[bad].reason or 'no reason given'})"
    if mode in ("outcome", "both") and trajectory.outcome is None:
        return "unjudged: the final answer has no golden one, or no verdict"
    if mode in ("outcome", "both") and not trajectory.outcome:
        return "outcome: the final answer is not correct"
    return None


async def with_outcome(trajectory: Trajectory, judge=None) -> Trajectory:
    """The final answer held against the golden one by the official rule, or by `judge`, if it is not scored yet."""
    if trajectory.outcome is not None or trajectory.question.answer is None:
        return trajectory
    if judge is None:
        return replace(trajectory, outcome=is_correct(trajectory.question, trajectory.prediction))
    judgement = await judge.judge(OutcomeToJudge(question=trajectory.question, prediction=trajectory.prediction))
    return replace(trajectory, outcome={"GOOD": True, "BAD": False, None: None}[judgement.verdict])


def judged_trajectories(
    trajectories: Iterable[Trajectory], *, judge, mode: Mode, in_flight: int, outcome_judge=None
) -> AsyncIterator[tuple[Trajectory, str | None]]:
    """(trajectory with verdicts, reason it is dropped or None) as they are done; the input is read lazily."""

    async def work(trajectory):
        if mode in ("process", "both"):
            trajectory = await judge_steps(trajectory, judge)
        if mode in ("outcome", "both"):
            trajectory = await with_outcome(trajectory, outcome_judge)
        return trajectory, why_dropped(trajectory, mode)

    return as_done((work(trajectory) for trajectory in trajectories), in_flight)


async def filter_in_memory(
    trajectories: list[Trajectory], *, judge, mode: Mode, advance: Callable[[], None]
) -> tuple[list[Trajectory], list[Trajectory]]:
    """(kept, dropped), each in the order given, every judged step carrying its verdict."""
    order = {trajectory.id: place for place, trajectory in enumerate(trajectories)}
    kept, dropped = [], []
    async for trajectory, reason in judged_trajectories(trajectories, judge=judge, mode=mode, in_flight=1024):
        (kept if reason is None else dropped).append(trajectory)
        advance()
    for part in (kept, dropped):
        part.sort(key=lambda trajectory: order[trajectory.id])
    return kept, dropped


async def _filter(config: FilterConfig) -> dict:
    if len({config.data.resolve(), config.kept.resolve(), config.dropped.resolve()}) < 3:
        raise ConfigError("--data, --kept and --dropped must be three different files")
    if not config.data.exists():
        raise InputError(config.data, "cannot be read (no such file)")
    async with Client(config.cache or answers_beside(config.kept)) as client:
        judge = open_judge(config.judge, client=client, limits=config.endpoint)
        outcome_judge = None
        if config.outcome_judge:
            outcome_judge = open_judge(config.outcome_judge, kind="outcome", client=client, limits=config.endpoint)
        counts, reasons = await _filter_file(config, judge, outcome_judge)
    if not sum(counts.values()):
        raise InputError(config.data, "expected at least one trajectory, the file is empty")
    return {"mode": config.mode, "judge": judge.name, **counts, "dropped_now": dict(reasons)}


async def _filter_file(config: FilterConfig, judge, outcome_judge) -> tuple[dict[str, int], Counter[str]]:
    """(how many are kept and dropped in all, why those of this call were dropped)."""
    reasons: Counter[str] = Counter()
    with (
        TrajectoryLog(config.kept) as kept,
        TrajectoryLog(config.dropped) as dropped,
        progress("filter", None) as advance,
    ):
        finished = kept.done | dropped.done
        unfinished = (t for t in iter_trajectories(config.data) if t.id not in finished)
        decisions = judged_trajectories(
            unfinished, judge=judge, mode=config.mode, in_flight=config.in_flight, outcome_judge=outcome_judge
        )
        async for trajectory, reason in decisions:
            if reason is None:
                kept.append(trajectory)
            else:
                dropped.append(replace(trajectory, dropped=reason))
                reasons[reason.partition(":")[0]] += 1
            advance()
        return {"kept": len(kept.done), "dropped": len(dropped.done)}, reasons


def main(config: FilterConfig) -> None:
    sys.stdout.write(msgspec.json.encode(asyncio.run(_filter(config))).decode() + "\n")


if __name__ == "__main__":
    cli.run(main, FilterConfig, __doc__)
