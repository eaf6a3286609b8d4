"""Keep the trajectories a judge calls sound: trajectories.jsonl -> kept.jsonl and dropped.jsonl with reasons.

  none      keep all                      process   every step GOOD
  outcome   the final answer is correct   both      process and outcome

A step without a verdict is never taken for GOOD or BAD. Where the judge's server gave no answer its trajectory is
dropped as unanswered, and the next run of the same command asks again; where the judge answered twice without a verdict
it is dropped as unjudged, and stays so, for what was answered is not asked, or paid for, twice. Both are counted apart.
With --reward-judge a model also grades every step of what is kept, for training on recorded actions; a step without a
grade is a step without a verdict.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from msgspec.structs import replace

from swirl.app import command
from swirl.app.progress import progress
from swirl.app.resolve import answers_beside, is_url, model_folder, open_judge
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, InputError
from swirl.judging.judges import NO_ANSWER, Kind, OutcomeToJudge, StepToJudge
from swirl.rollout.concurrency import as_done
from swirl.storage.digest import checkpoint_digest
from swirl.tasks import is_correct
from swirl.trajectories.log import TrajectoryLog, iter_trajectories
from swirl.trajectories.record import Step, Trajectory

Mode = Literal["none", "process", "outcome", "both"]
# As the encoder writes it; within a text its quotes would be escaped.
_WITHOUT_VERDICT = (b'"dropped":"unjudged', b'"dropped":"unanswered')


@dataclass(frozen=True)
class FilterConfig:
    data: Path = Path("trajectories.jsonl")
    """Trajectories to judge, JSONL."""
    kept: Path = Path("kept.jsonl")
    """Where those go that pass."""
    dropped: Path = Path("dropped.jsonl")
    """Where the others go, each with the reason in `dropped`. Both files are appended to, and resumed by the same
    command."""
    mode: Mode = "process"
    """none, process (every step GOOD), outcome (the final answer correct), or both."""
    judge: str = "rule"
    """Who says which steps are GOOD: `rule` (Almanac's own), the URL of a server's model, or a checkpoint folder."""
    judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {context} and {action}. The built-in ones:
    python -m swirl.judging.prompts NAME."""
    outcome_judge: str | None = None
    """Who says whether an answer is correct: a URL or a checkpoint folder; default: the data set's official rule."""
    outcome_judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {answer} and {prediction}."""
    reward_judge: str | None = None
    """Who grades each step of what is kept, as `reward` from 0 to 1: a URL or a checkpoint folder."""
    reward_judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {context} and {action}."""
    votes: int = 4
    """Draws that a reward is the mean of, where the model gives no log-probs to take the expected score from."""
    in_flight: int = 256
    """Trajectories being judged at a time."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <kept>.answers.sqlite."""
    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        command.require_at_least(1, self, "votes", "in_flight")


# No verdict depends on these; templates are compared by content, in the names of the judges.
_MAY_CHANGE = ("data", "kept", "dropped", "in_flight", "cache", "endpoint")
_MAY_CHANGE += ("judge_prompt", "outcome_judge_prompt", "reward_judge_prompt")


class Judges(NamedTuple):
    """Who is asked about the steps, the final answer and the rewards. Without one, the official rule says whether an
    answer is correct, and nobody gives rewards.
    """

    steps: object
    outcome: object | None = None
    reward: object | None = None


def step_to_judge(trajectory: Trajectory, k: int, step: Step) -> StepToJudge:
    """`step`, recorded or drawn anew, at state k of the trajectory (from 0)."""
    return StepToJudge(
        question=trajectory.question, steps=trajectory.steps[:k], step=step, tools=tuple(trajectory.tools)
    )


async def judge_steps(trajectory: Trajectory, judge) -> Trajectory:
    """The trajectory with a verdict on every step; verdicts it already carries are kept."""

    async def judged(k, step):
        if step.verdict is not None:
            return step
        judgement = await judge.judge(step_to_judge(trajectory, k, step))
        reward = step.reward if judgement.reward is None else judgement.reward
        return replace(step, verdict=judgement.verdict, reason=judgement.reason, reward=reward)

    steps = await asyncio.gather(*(judged(k, step) for k, step in enumerate(trajectory.steps)))
    return replace(trajectory, steps=tuple(steps))


async def reward_steps(trajectory: Trajectory, judge) -> tuple[Trajectory, str | None]:
    """(the trajectory with a reward on every step, why it must be dropped or None); rewards it carries are kept."""

    async def graded(k, step):
        if step.reward is not None:
            return step, ""
        judgement = await judge.judge(step_to_judge(trajectory, k, step))
        return replace(step, reward=judgement.reward), judgement.reason

    graded_steps = await asyncio.gather(*(graded(k, step) for k, step in enumerate(trajectory.steps)))
    missing = [(f"step {k} has no reward", why) for k, (step, why) in enumerate(graded_steps, 1) if step.reward is None]
    return replace(trajectory, steps=tuple(step for step, _ in graded_steps)), _without_verdict(missing)


def _without_verdict(missing: list[tuple[str, str | None]]) -> str | None:
    """Why a trajectory is dropped that lacks (what, for this reason): `unanswered` if asking again may change it, else
    `unjudged`; None where it lacks nothing.
    """
    if not missing:
        return None
    unanswered = [(what, why) for what, why in missing if (why or "").startswith(NO_ANSWER)]
    what, why = (unanswered or missing)[0]
    return f"{'unanswered' if unanswered else 'unjudged'}: {what}" + (f" ({why})" if why else "")


def why_dropped(trajectory: Trajectory, mode: Mode, outcome_reason: str = "") -> str | None:
    """The reason, or None to keep it; `unanswered` and `unjudged` come before any other. `outcome_reason` says why the
    final answer is not scored.
    """
    missing: list[tuple[str, str | None]] = []
    if mode in ("process", "both"):
        steps = enumerate(trajectory.steps, 1)
        missing += [(f"step {k} has no verdict", step.reason) for k, step in steps if step.verdict is None]
    if mode in ("outcome", "both") and trajectory.outcome is None:
        golden = trajectory.question.answer is not None
        missing.append((f"the final answer has {'no verdict' if golden else 'no golden one'}", outcome_reason))
    if missing:
        return _without_verdict(missing)
    if mode in ("process", "both"):
        verdicts = [step.verdict for step in trajectory.steps]
        if "BAD" in verdicts:
            bad = verdicts.index("BAD")
            return f"process: step {bad + 1} is BAD ({trajectory.steps[bad].reason or 'no reason given'})"
    if mode in ("outcome", "both") and not trajectory.outcome:
        return "outcome: the final answer is not correct"
    return None


async def with_outcome(trajectory: Trajectory, judge=None) -> Trajectory:
    """The final answer held against the golden one by `judge`, or else by the official rule if it is not scored yet."""
    return (await _score_outcome(trajectory, judge))[0]


async def _score_outcome(trajectory: Trajectory, judge) -> tuple[Trajectory, str]:
    """(`with_outcome`, why the judge gave no verdict)"""
    if trajectory.question.answer is None or (judge is None and trajectory.outcome is not None):
        return trajectory, ""
    if judge is None:
        return replace(trajectory, outcome=is_correct(trajectory.question, trajectory.prediction)), ""
    judgement = await judge.judge(OutcomeToJudge(question=trajectory.question, prediction=trajectory.prediction))
    outcome = {"GOOD": True, "BAD": False, None: None}[judgement.verdict]
    return replace(trajectory, outcome=outcome), judgement.reason


def judged_trajectories(
    trajectories: Iterable[Trajectory], judges: Judges, *, mode: Mode, in_flight: int
) -> AsyncIterator[tuple[Trajectory, str | None]]:
    """(trajectory with verdicts, reason it is dropped or None) as they are done; the input is read lazily."""

    async def work(trajectory):
        if mode in ("process", "both"):
            trajectory = await judge_steps(trajectory, judges.steps)
        outcome_reason = ""
        if mode in ("outcome", "both"):
            trajectory, outcome_reason = await _score_outcome(trajectory, judges.outcome)
        reason = why_dropped(trajectory, mode, outcome_reason)
        if reason is None and judges.reward is not None:  # grades cost: only what is kept has them
            trajectory, reason = await reward_steps(trajectory, judges.reward)
        return trajectory, reason

    return as_done((work(trajectory) for trajectory in trajectories), in_flight)


async def filter_in_memory(
    trajectories: list[Trajectory], *, judge, mode: Mode, advance: Callable[[], None]
) -> tuple[list[Trajectory], list[Trajectory]]:
    """(kept, dropped), each in the order given, every judged step carrying its verdict."""
    order = {trajectory.id: place for place, trajectory in enumerate(trajectories)}
    kept, dropped = [], []
    async for trajectory, reason in judged_trajectories(trajectories, Judges(judge), mode=mode, in_flight=1024):
        (kept if reason is None else dropped).append(trajectory)
        advance()
    for part in (kept, dropped):
        part.sort(key=lambda trajectory: order[trajectory.id])
    return kept, dropped


def _known_as(config: FilterConfig, judges: Judges) -> dict[str, str]:
    """What the verdicts depend on: each judge's name, which holds the digest of a user's template, and the weights of
    one that is a checkpoint.
    """
    flags = {"judge": judges.steps, "outcome_judge": judges.outcome, "reward_judge": judges.reward}
    named = {flag: judge.name for flag, judge in flags.items() if judge is not None}
    for flag in named:
        spec = getattr(config, flag)
        if spec != "rule" and not is_url(spec):
            named[flag] += f" ({checkpoint_digest(model_folder(spec))})"
    return named


def _begun_again(config: FilterConfig, judges: Judges) -> TrajectoryLog:
    """The log of what is dropped, once nobody else writes to it and the settings are those that began it. What no
    judge has judged is left out, so that this run judges it again; what was answered then comes from the cache.
    """
    aside = config.dropped.with_name(config.dropped.name + ".partial")
    with TrajectoryLog(config.dropped):
        known_as = _known_as(config, judges)
        command.refuse_other_settings(config, [config.kept, config.dropped], may_change=_MAY_CHANGE, known_as=known_as)
        with open(config.dropped, "rb") as old, open(aside, "wb") as new:
            new.writelines(line for line in old if not any(mark in line for mark in _WITHOUT_VERDICT))
            new.flush()
            os.fsync(new.fileno())
        aside.replace(config.dropped)
    return TrajectoryLog(config.dropped)


def _open_judges(config: FilterConfig, client: Client) -> Judges:
    def opened(spec: str | None, kind: Kind, prompt: Path | None):
        if spec is None:
            return None
        return open_judge(spec, kind=kind, prompt=prompt, votes=config.votes, client=client, limits=config.endpoint)

    return Judges(
        opened(config.judge, "process", config.judge_prompt),
        opened(config.outcome_judge, "outcome", config.outcome_judge_prompt),
        opened(config.reward_judge, "reward", config.reward_judge_prompt),
    )


def _each_once(path: Path) -> Iterator[Trajectory]:
    """Streamed. Raises InputError at an id that stands there twice: what is kept or dropped is told apart by it."""
    seen: set[str] = set()
    for trajectory in iter_trajectories(path):
        if trajectory.id in seen:
            raise InputError(path, f"trajectory '{trajectory.id}' stands there twice, expected an id each", field="id")
        seen.add(trajectory.id)
        yield trajectory


async def _filter(config: FilterConfig) -> dict:
    if len({config.data.resolve(), config.kept.resolve(), config.dropped.resolve()}) < 3:
        raise ConfigError("--data, --kept and --dropped must be three different files")
    if not config.data.exists():
        raise InputError(config.data, "cannot be read (no such file)")
    reasons: list[str] = []
    async with Client(config.cache or answers_beside(config.kept)) as client:
        judges = _open_judges(config, client)
        with TrajectoryLog(config.kept) as kept, _begun_again(config, judges) as dropped:
            finished = kept.done | dropped.done
            decisions = judged_trajectories(
                (t for t in _each_once(config.data) if t.id not in finished),
                judges,
                mode=config.mode,
                in_flight=config.in_flight,
            )
            total = _count_lines(config.data)
            with progress("filter", total, completed=len(finished), note=client.progress.note) as advance:
                async for trajectory, reason in decisions:
                    if reason is None:
                        kept.append(trajectory)
                    else:
                        dropped.append(replace(trajectory, dropped=reason))
                        reasons.append(reason)
                    advance()
            counts = {"kept": len(kept.done), "dropped": len(dropped.done)}
    if not sum(counts.values()):
        raise InputError(config.data, "expected at least one trajectory, the file is empty")
    unanswered = [reason.partition(": ")[2] for reason in reasons if reason.startswith("unanswered: ")]
    unjudged = [reason.partition(": ")[2] for reason in reasons if reason.startswith("unjudged: ")]
    if unanswered:
        why = command.first_reasons(unanswered)
        command.warn(f"{len(unanswered)} trajectories unanswered, the same command asks for them again ({why})")
    if unjudged:
        why = command.first_reasons(unjudged)
        command.warn(f"{len(unjudged)} trajectories unjudged, which asking again would not change ({why})")
    return {
        "mode": config.mode,
        "judge": judges.steps.name,
        "outcome_judge": judges.outcome and judges.outcome.name,
        "reward_judge": judges.reward and judges.reward.name,
        **counts,
        "unanswered": len(unanswered),
        "unjudged": len(unjudged),
        "dropped_now": Counter(reason.partition(":")[0] for reason in reasons),
    }


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def main(config: FilterConfig) -> None:
    sys.stdout.write(msgspec.json.encode(asyncio.run(_filter(config))).decode() + "\n")


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, FilterConfig, __doc__)


if __name__ == "__main__":
    run_command()
