"""Stage 1: questions -> trajectories.jsonl. A policy and a tool answer each question several times, step by step.

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
from swirl.app.progress import progress
from swirl.app.resolve import answers_beside, is_url, model_folder, open_policy, open_task, tokens_in_an_action
from swirl.endpoints.address import EndpointLimits
from swirl.endpoints.client import Client
from swirl.errors import EndpointError, InputError
from swirl.rollout.rollout import RolloutSpec, Unanswered, rollouts, trajectory_id
from swirl.storage.digest import checkpoint_digest
from swirl.tasks import require_use
from swirl.trajectories.log import TrajectoryLog


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
    retriever: str = "bm25"
    """What searches them: `bm25`; `dense+http://host/v1#model`, by embeddings of that server, indexed once beside the
    file; or http://host:port/retrieve, a server of Search-R1's form with pages of its own."""
    top_k: int = 1
    """Pages returned for a query (the paper's 1)."""
    split: str = "train"
    """Almanac's split: train, validation or test."""
    limit: int | None = 400
    """Questions to take, from the first; None for all."""
    samples: int = 5
    """Trajectories per question (the paper's 5)."""
    policy: str = "almanac"
    """`almanac` (ships with swirl), a checkpoint folder, or a server's URL such as http://127.0.0.1:8000/v1#model."""
    tokenizer: Path | None = None
    """For a URL, the folder of its model's tokenizer.json: token ids then travel with the text, and those that the
    server gives are kept with their log-probs. Without it training tokenizes the text."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy. Ours, not the paper's."""
    max_steps: int | None = None
    """Steps in a trajectory at most; default: the paper's 5 with search, 10 with the calculator."""
    max_new_tokens: int | None = None
    """Tokens in an action at most; default: 48, enough for `almanac`, or 512 for a model behind a URL."""
    in_flight: int = 1024
    """Trajectories in flight at a time."""
    seed: int = 0
    """Of all draws: a trajectory's depend on it, its question and its sample alone."""
    device: str = "cpu"
    """Where a checkpoint runs: cpu or cuda."""
    cache: Path | None = None
    """File that keeps the answers of servers, so that none is paid for twice; default: <out>.answers.sqlite."""
    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        command.require_at_least(1, self, "top_k", "limit", "samples", "max_steps", "max_new_tokens", "in_flight")
        command.require_at_least(0, self, "temperature")


# No line depends on these, but by rounding where a checkpoint runs here.
_MAY_CHANGE = ("out", "limit", "in_flight", "device", "cache", "endpoint")


def _known_as(config: GenerateConfig, tokenizer) -> dict[str, str]:
    """What the lines depend on beyond its name: a checkpoint's weights, a server's tokenizer."""
    if not is_url(config.policy):
        return {"policy": f"{config.policy} ({checkpoint_digest(model_folder(config.policy))})"}
    return {"tokenizer": f"{config.tokenizer} ({tokenizer.fingerprint})"} if config.tokenizer else {}


async def _generate(config: GenerateConfig) -> dict:
    if config.split != GenerateConfig.split:
        require_use(["split"], [config.task])
    async with Client(config.cache or answers_beside(config.out)) as client:
        task = await open_task(
            config.task,
            questions=config.questions,
            corpus=config.corpus,
            retriever=config.retriever,
            top_k=config.top_k,
            client=client,
            limits=config.endpoint,
        )
        questions = task.take(config.split, config.limit)
        policy, tokenizer = open_policy(
            config.policy,
            device=config.device,
            client=client,
            limits=config.endpoint,
            tokenizer=config.tokenizer,
        )
        spec = RolloutSpec(
            task=task,
            policy=policy,
            tokenizer=tokenizer,
            max_steps=config.max_steps or generation_steps(task),
            max_new_tokens=tokens_in_an_action(config.max_new_tokens, config.policy),
            temperature=config.temperature,
            seed=config.seed,
            in_flight=config.in_flight,
        )
        with TrajectoryLog(config.out) as log:
            known_as = _known_as(config, tokenizer)
            command.refuse_other_settings(config, [config.out], may_change=_MAY_CHANGE, known_as=known_as)
            wanted = [(question, sample) for question in questions for sample in range(config.samples)]
            for question, sample in wanted:
                if log.answers_another(trajectory_id(question, sample), question):
                    raise InputError(
                        config.out,
                        f"'{trajectory_id(question, sample)}' answers another question than '{question.id}' now is: "
                        "the questions have changed, take another --out",
                    )
            asked = [pair for pair in wanted if trajectory_id(*pair) not in log.done]
            playing = rollouts(asked, spec)
            stops: Counter[str] = Counter()
            unanswered: list[Unanswered] = []
            done = len(wanted) - len(asked)
            with progress("generate", len(wanted), completed=done, note=client.progress.note) as advance:
                async for made in playing:
                    if isinstance(made, Unanswered):
                        unanswered.append(made)
                    else:
                        log.append(made)
                        stops[made.stop] += 1
                    advance()
            total = len(log.done)
    if unanswered:
        reasons = command.first_reasons(one.reason for one in unanswered)
        if not total:
            raise EndpointError(policy.name, f"none of {len(unanswered)} trajectories was answered ({reasons})")
        command.warn(f"{len(unanswered)} trajectories unanswered, the same command asks for them again ({reasons})")
    return {
        "out": str(config.out),
        "trajectories": total,
        "new": len(asked) - len(unanswered),
        "unanswered": len(unanswered),
        "stops": stops,
    }


def main(config: GenerateConfig) -> None:
    result = asyncio.run(_generate(config))
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, GenerateConfig, __doc__)


if __name__ == "__main__":
    run_command()
