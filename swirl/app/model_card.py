"""The model card beside trained weights: README.md, as the Hugging Face hub shows it, says how they were made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from swirl import __version__
from swirl.app.hub import is_hub_name
from swirl.app.tables import percent
from swirl.config import TrainConfig

CARD = "README.md"
_PAPER = "[SWiRL](https://arxiv.org/abs/2504.04736)"
_METHODS = {
    "sampled": "each step's action drawn from the policy and rewarded by itself",
    "recorded": "the recorded actions of each step, weighted by their rewards",
    "imitation": "imitation of recorded trajectories, without a reward",
    "outcome-rl": "reinforcement learning on the outcome of whole trajectories",
}


def model_card(
    config: TrainConfig, *, update: int, commit: str | None, summary: Mapping | None, kept: int | None
) -> str:
    """The card of a policy after `update`. `config` is settled, as a run's config.json has it.

    `summary` is the run's (accuracy before and after by task), None where the policy was not evaluated; `kept` the
    number of trajectories trained on, None where that is not known.
    """
    base = config.model if is_hub_name(config.model) or config.model == "almanac" else Path(config.model).name
    front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [swirl, reinforcement-learning]"]
    front += [f"base_model: {base.partition('@')[0]}"] if is_hub_name(config.model) else []
    made_by = f"swirl {__version__}" + (f" (commit {commit})" if commit else "")
    command = shlex.join(["python", "-m", "swirl.train", *flags_of(config)])
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {base}, trained on {', '.join(config.task) or 'recorded trajectories'}",
            "",
            f"Trained from `{base}` by {made_by} with mode `{config.mode}`: {_METHODS[config.mode]}; after {_PAPER}, "
            "step-wise reinforcement learning of tool-using language models.",
            "",
            "## Results",
            _results(summary),
            "",
            "## How it was made",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _facts(config, update, kept).items()),
            "",
            "```",
            command,
            "```",
            "Flags that are not named have the defaults of that version. Each of the policy's actions ends with a "
            "tag, as in `<search_query>…</search_query>` or `<answer>…</answer>`.",
            "",
        ]
    )


def _facts(config: TrainConfig, update: int, kept: int | None) -> dict[str, str]:
    filtered = f"{config.filter} filter, judge `{config.judge}`" if config.generates else "as given"
    data = " ".join(map(str, config.data)) or f"its own trajectories on {', '.join(config.task)}"
    return {
        "data": f"{data} ({filtered})",
        "trajectories trained on": "–" if kept is None else f"{kept:,}",
        "reward": f"`{config.reward}`",
        "updates": f"{update} of {config.updates}",
        "learning rate, seed": f"{config.learning_rate:g}, {config.seed}",
        "KL coefficient": f"{config.kl_coefficient:g}",
    }


def _results(summary: Mapping | None) -> str:
    if not summary or not summary.get("accuracy_after"):
        return "Not evaluated."
    lines = ["Greedy answers to test questions, 95% intervals by bootstrap:", "", "| task | before | after |"]
    lines += ["|---|---|---|"]
    for task in summary["accuracy_after"]:
        lines.append(f"| {task} | {_accuracy(summary, 'before', task)} | {_accuracy(summary, 'after', task)} |")
    return "\n".join(lines)


def _accuracy(summary: Mapping, when: str, task: str) -> str:
    shown = percent(summary[f"accuracy_{when}"].get(task))
    interval = summary.get(f"interval_{when}", {}).get(task)
    return shown if interval is None else f"{shown} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def flags_of(config: TrainConfig) -> list[str]:
    """The flags that differ from their defaults, as a command takes them; those of the endpoint are left out."""
    flags = []
    for name, default in asdict(TrainConfig()).items():
        value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        if value == default or name in ("endpoint", "out", "resume"):
            continue
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return flags
