"""Stage 1: questions -> trajectories.jsonl. A policy and a task's tools answer each question several times.

The file grows line by line and survives being killed; the same command again goes on where it stopped. So it does
after a server failed: a trajectory whose request got no answer is not written, is counted as unanswered, and is asked
for again by the next run. Nothing that a server has answered, so that it can be read, is asked or paid for twice.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from swirl.app import command
from swirl.app.evaluation import generation_steps
from swirl.app.flags import PolicyFlags
from swirl.app.loader import is_reference, name_of
from swirl.app.progress import progress
from swirl.app.resolve import answers_beside, is_url, model_folder
from swirl.app.resolve_tasks import TaskFlags, open_tasks
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.errors import EndpointError, InputError
from swirl.rollout.rollout import Unanswered, rollouts, trajectory_id
from swirl.storage.digest import checkpoint_digest
from swirl.trajectories.log import TrajectoryLog
from swirl.trajectories.record import Question


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """How much is made, and where it goes."""

    out: Path = Path("trajectories.jsonl")
    """The JSONL file to append to."""
    samples: int = 5
    """Trajectories per question (the paper's 5)."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <out>.answers.sqlite."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(OutputFlags, TaskFlags, PolicyFlags):
    """All flags of `generate`, in the groups that it inherits."""

    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        command.require_at_least(1, self, "samples")
        command.require_no_folder(self, "out", "cache")
        self.check_task()
        self.check_policy()


# No line depends on these, but by rounding where a checkpoint runs here.
_MAY_CHANGE = ("out", "num_questions", "in_flight", "device", "max_cache_tokens", "cache", "endpoint")


async def _generate(config: GenerateConfig) -> dict:
    async with Client(config.cache or answers_beside(config.out)) as client:
        opened = await open_tasks(config, client=client, limits=config.endpoint)
        asked_of = [(task, task.take(config.split or "train", config.num_questions)) for task in opened]
        policy, tokenizer = config.open_policy(client, config.endpoint)
        with TrajectoryLog(config.out) as log:
            known_as = _known_as(config, tokenizer)
            command.refuse_other_settings(config, [config.out], may_change=_MAY_CHANGE, known_as=known_as)
            stops: Counter[str] = Counter()
            unanswered: list[Unanswered] = []
            total = sum(len(questions) for _, questions in asked_of) * config.samples
            done = [_still_to_ask(config, log, questions) for _, questions in asked_of]
            completed = total - sum(map(len, done))
            with progress("generate", total, completed=completed, note=client.progress.note) as advance:
                for (task, _), asked in zip(asked_of, done, strict=True):
                    spec = config.spec(task, policy, tokenizer, max_steps=generation_steps(task))
                    async for made in rollouts(asked, spec):
                        if isinstance(made, Unanswered):
                            unanswered.append(made)
                        else:
                            log.append(made)
                            stops[made.stop] += 1
                        advance()
            written = len(log.done)
    if unanswered:
        reasons = command.first_reasons(one.reason for one in unanswered)
        if not written:
            raise EndpointError(policy.name, f"none of {len(unanswered)} trajectories was answered ({reasons})")
        command.warn(f"{len(unanswered)} trajectories unanswered, the same command asks for them again ({reasons})")
    return {
        "out": str(config.out),
        "trajectories": written,
        "new": total - completed - len(unanswered),
        "unanswered": len(unanswered),
        "stops": stops,
    }


def _still_to_ask(config: GenerateConfig, log: TrajectoryLog, questions: list[Question]) -> list[tuple[Question, int]]:
    """The (question, sample) pairs without a trajectory. Raises InputError where one stands for another question."""
    wanted = [(question, sample) for question in questions for sample in range(config.samples)]
    for question, sample in wanted:
        if log.answers_another(trajectory_id(question, sample), question):
            raise InputError(
                config.out,
                f"'{trajectory_id(question, sample)}' answers another question than '{question.id}' now is: "
                "the questions have changed, take another --out",
            )
    return [pair for pair in wanted if trajectory_id(*pair) not in log.done]


def _known_as(config: GenerateConfig, tokenizer) -> dict[str, str]:
    """What the lines depend on beyond its name: a checkpoint's weights, a server's tokenizer, somebody's own code."""
    known = {
        name: " ".join(name_of(spec, f"--{name}") if is_reference(spec) else spec for spec in specs)
        for name, specs in (("task", config.task), ("tool", config.tool))
    }
    known["split"] = config.split or "train"
    if not is_url(config.policy):
        return known | {"policy": f"{config.policy} ({checkpoint_digest(model_folder(config.policy))})"}
    return known | ({"tokenizer": f"{config.tokenizer} ({tokenizer.fingerprint})"} if config.tokenizer else {})


def main(config: GenerateConfig) -> None:
    result = asyncio.run(_generate(config))
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, GenerateConfig, __doc__)


if __name__ == "__main__":
    run_command()
