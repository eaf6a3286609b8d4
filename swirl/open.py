"""From what a user names on the command line to the thing itself: policies and judges."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from swirl.environment.client import Client
from swirl.environment.policy import EndpointLimits
from swirl.errors import CheckpointError, ConfigError

ALMANAC_BASE = Path(__file__).parent / "tasks" / "almanac_base"


def is_url(spec: str) -> bool:
    return "://" in spec


def model_folder(spec: str) -> Path:
    """`almanac` is the base policy that ships with swirl; anything else is a Hugging Face folder."""
    return ALMANAC_BASE if spec == "almanac" else Path(spec)


def load_model(spec: str, *, device="cpu", dtype=None):
    """(Gemma, Tokenizer) from a folder or `almanac`. Raises CheckpointError, also where the two do not fit."""
    import torch

    from swirl.model.checkpoint import check_tokenizer_fits
    from swirl.model.gemma import Gemma
    from swirl.model.tokenizer import Tokenizer

    folder = model_folder(spec)
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder: expected `almanac` or a Hugging Face folder of a Gemma 2")
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Gemma.from_pretrained(folder, dtype=dtype or torch.float32, device=device)
    check_tokenizer_fits(tokenizer, model.config.vocab_size, folder)
    return model, tokenizer


def open_policy(
    spec: str, *, device: str = "cpu", client: Client | None = None, limits: EndpointLimits | None = None
):
    """(policy, token coder or None) from `almanac`, a checkpoint folder, or the URL of a server, asked by `client`."""
    if is_url(spec):
        from swirl.environment.policy import open_policy as open_wire_policy

        return open_wire_policy(spec, client=client, limits=limits), None
    from swirl.model.local_policy import LocalPolicy

    model, tokenizer = load_model(spec, device=device)
    return LocalPolicy(model, tokenizer, name=os.fspath(spec)), tokenizer


def open_judge(
    spec: str,
    *,
    kind: Literal["process", "outcome", "reward"] = "process",
    prompt: Path | None = None,
    votes: int = 4,
    client: Client | None = None,
    limits: EndpointLimits | None = None,
):
    """`rule` (knows Almanac only), the URL of a server whose model judges, or a checkpoint folder that does.

    `kind` asks a model for a verdict on a step, for one on the final answer, or for a step's graded reward; `prompt`
    is the file of another template for it. Without a `client` it has its own, and `close` must be awaited.
    Raises ConfigError, CheckpointError, InputError.
    """
    if spec == "rule":
        from swirl.tasks.almanac import RuleJudge

        return RuleJudge()
    from swirl.environment import judge

    if is_url(spec):
        return judge.open_judge(spec, kind=kind, prompt=prompt, votes=votes, client=client, limits=limits)
    if not model_folder(spec).is_dir():
        raise ConfigError(f"judge '{spec}' is unknown: expected 'rule', a URL or a checkpoint folder")
    policy, _ = open_policy(spec)
    return judge.judge_with(policy, kind, prompt=prompt, votes=votes)


def answers_beside(out: Path) -> Path:
    """Where a command that writes `out` keeps the answers of servers, unless it is told another file."""
    return out.with_name(out.name + ".answers.sqlite")


async def close(*things) -> None:
    """Close what holds connections: policies and judges over the wire."""
    for thing in things:
        if hasattr(thing, "close"):
            await thing.close()
