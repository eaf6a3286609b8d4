"""Keep the trajectories a judge calls sound: trajectories.jsonl -> kept.jsonl and dropped.jsonl with reasons.

  none      keep all                      process   every step GOOD
  outcome   the final answer is correct   both      process and outcome

A step without a verdict is never taken for GOOD or BAD. Where the judge's server gave no answer its trajectory is
dropped as unanswered, and the next run of the same command asks again. Where the judge answered twice without a verdict
it is dropped as unjudged, and stays so: what was answered is not asked twice. Both are counted apart.
With --reward-judge a model also grades every step of what is kept, for training on recorded actions; a step without a
grade is a step without a verdict.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from swirl.app import command
from swirl.app.progress import progress
from swirl.app.resolve import answers_beside, model_folder, open_judge, require_judge_knows
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, InputError
from swirl.judging.filtering import Judges, Mode, Why, as_dropped, judged_trajectories, rule_name
from swirl.judging.judges import Kind
from swirl.storage.digest import checkpoint_digest, seal
from swirl.storage.files import replacing
from swirl.tasks import is_correct
from swirl.trajectories.log import TrajectoryLog, iter_trajectories, read_lines
from swirl.trajectories.record import Judged, Trajectory


class _Decided(msgspec.Struct):
    """What a dropped line says of a judgement that it lacks."""

    judged: Judged | None = None


@dataclass(frozen=True, kw_only=True)
class FileFlags:
    """What is judged, and where it goes."""

    data: Path = Path("trajectories.jsonl")
    """Trajectories to judge, JSONL."""
    kept: Path = Path("kept.jsonl")
    """Where those go that pass."""
    dropped: Path = Path("dropped.jsonl")
    """Where the others go, each with the reason in `dropped`. Both files are appended to, and resumed by the same
    command."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is asked for twice; default: <kept>.answers.sqlite."""


@dataclass(frozen=True, kw_only=True)
class JudgeFlags:
    """What has to hold for a trajectory to be kept, and who says so. Defaults are ours, but for the mode."""

    mode: Mode = "process"
    """none, process (every step GOOD; the paper's best), outcome (the final answer correct), or both."""
    judge: str = "rule"
    """Who says which steps are GOOD: the URL of a server's model, a checkpoint folder, or one of Almanac's own: `rule`
    (the oracle), `lenient` (anything grounded is GOOD), `noisy:0.2` (the oracle, wrong about that share of steps)."""
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
    device: str = "auto"
    """Where a checkpoint that judges runs: auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in; auto: bfloat16 on cuda, else float32."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig(FileFlags, JudgeFlags):
    """All flags of `filter`, in the groups that it inherits."""

    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        command.require_at_least(1, self, "votes", "in_flight")
        command.require_no_folder(self, "data", "kept", "dropped", "cache")


# No verdict depends on these; templates are compared by content, in the names of the judges.
_MAY_CHANGE = ("data", "kept", "dropped", "in_flight", "device", "cache", "endpoint")
_MAY_CHANGE += ("judge_prompt", "outcome_judge_prompt", "reward_judge_prompt")


def _known_as(config: FilterConfig, judges: Judges) -> dict[str, str]:
    """What the verdicts depend on: each judge's name, which holds the digest of a user's template, and the weights of
    one that is a checkpoint.
    """
    flags = {"judge": judges.steps, "outcome_judge": judges.outcome, "reward_judge": judges.reward}
    named = {flag: judge.name for flag, judge in flags.items() if judge is not None}
    for flag in named:
        spec = getattr(config, flag)
        if model_folder(spec).is_dir():
            named[flag] += f" ({checkpoint_digest(model_folder(spec))})"
    return named


def _begun_again(config: FilterConfig, judges: Judges) -> TrajectoryLog:
    """The log of what is dropped, once nobody else writes to it and the settings are those that began it. What no
    judge has judged is left out, so that this run judges it again; what was answered then comes from the cache.
    """
    with TrajectoryLog(config.dropped):
        known_as = _known_as(config, judges)
        command.refuse_other_settings(config, [config.kept, config.dropped], may_change=_MAY_CHANGE, known_as=known_as)
        decoder = msgspec.json.Decoder(_Decided)
        with replacing(config.dropped) as new:
            for number, line in read_lines(config.dropped):
                try:
                    judged = decoder.decode(line).judged
                except msgspec.DecodeError as error:
                    raise InputError(config.dropped, f"expected a dropped trajectory ({error})", line=number) from None
                if judged is None:
                    new.write(seal(line))
    return TrajectoryLog(config.dropped)


def _open_judges(config: FilterConfig, client: Client) -> Judges:
    how = {"votes": config.votes, "device": config.device, "dtype": config.dtype}

    def opened(flag: str, kind: Kind):
        spec, prompt = getattr(config, flag), getattr(config, f"{flag}_prompt")
        if spec is None:
            return None
        named = "--" + flag.replace("_", "-")
        return open_judge(spec, kind=kind, prompt=prompt, client=client, limits=config.endpoint, flag=named, **how)

    return Judges(
        opened("judge", "process"), is_correct, opened("outcome_judge", "outcome"), opened("reward_judge", "reward")
    )


def _each_once(path: Path, judge: str | None) -> Iterator[Trajectory]:
    """Streamed. Raises InputError at an id that stands there twice: what is kept or dropped is told apart by it; and
    ConfigError at a task that the judge of steps, where one is asked, cannot know.
    """
    seen: set[str] = set()
    for trajectory in iter_trajectories(path):
        if trajectory.id in seen:
            raise InputError(path, f"trajectory '{trajectory.id}' stands there twice, expected an id each", field="id")
        seen.add(trajectory.id)
        require_judge_knows(judge, trajectory.question.task)
        yield trajectory


async def _filter(config: FilterConfig) -> dict:
    if len({config.data.resolve(), config.kept.resolve(), config.dropped.resolve()}) < 3:
        raise ConfigError("--data, --kept and --dropped must be three different files")
    if not config.data.exists():
        raise InputError(config.data, "cannot be read (no such file)")
    dropped_now: list[Why] = []
    async with Client(config.cache or answers_beside(config.kept)) as client:
        judges = _open_judges(config, client)
        asked = config.judge if config.mode in ("process", "both") else None
        with TrajectoryLog(config.kept) as kept, _begun_again(config, judges) as dropped:
            finished = kept.done | dropped.done
            decisions = judged_trajectories(
                (t for t in _each_once(config.data, asked) if t.id not in finished),
                judges,
                mode=config.mode,
                in_flight=config.in_flight,
            )
            total = _count_lines(config.data)
            with progress("filter", total, completed=len(finished), note=client.progress.note) as advance:
                async for trajectory, why in decisions:
                    if why is None:
                        kept.append(trajectory)
                    else:
                        dropped.append(as_dropped(trajectory, why))
                        dropped_now.append(why)
                    advance()
            counts = {"kept": len(kept.done), "dropped": len(dropped.done)}
    if not sum(counts.values()):
        raise InputError(config.data, "expected at least one trajectory, the file is empty")
    unanswered = [why.text for why in dropped_now if why.rule is Judged.UNANSWERED]
    unjudged = [why.text for why in dropped_now if why.rule is Judged.UNREADABLE]
    if unanswered:
        reasons = command.first_reasons(unanswered)
        command.warn(f"{len(unanswered)} trajectories unanswered, the same command asks for them again ({reasons})")
    if unjudged:
        reasons = command.first_reasons(unjudged)
        command.warn(f"{len(unjudged)} trajectories unjudged, which asking again would not change ({reasons})")
    return {
        "mode": config.mode,
        "judge": judges.steps.name,
        "outcome_judge": judges.outcome and judges.outcome.name,
        "reward_judge": judges.reward and judges.reward.name,
        **counts,
        "unanswered": len(unanswered),
        "unjudged": len(unjudged),
        "dropped_now": Counter(map(rule_name, dropped_now)),
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
