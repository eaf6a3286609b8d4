"""From what a user names on the command line to the thing itself: models, policies, judges."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from swirl import tasks
from swirl.app.hub import hub_folder, is_hub_name
from swirl.app.loader import is_reference, load_object, name_of
from swirl.config import MAX_CACHE_TOKENS, tokens_of_an_action
from swirl.endpoints.address import EndpointLimits, open_wire_policy
from swirl.endpoints.client import Client
from swirl.errors import CheckpointError, ConfigError
from swirl.judging.judges import Kind, judge_with

ALMANAC_BASE = Path(__file__).parents[1] / "tasks" / "almanac" / "base"


def is_url(spec: str) -> bool:
    return "://" in spec


def model_folder(spec: str) -> Path:
    """`almanac` is the base policy that ships with swirl; anything else is a Hugging Face folder, or the name of a
    model on its hub. Raises CheckpointError where that is not to be had.
    """
    if is_hub_name(spec):
        return hub_folder(spec)
    return ALMANAC_BASE if spec == "almanac" else Path(spec)


def base_folder(folder: Path) -> Path:
    """The folder of the model itself: of its base, a folder or a name on the hub, where it holds adapters.

    Raises CheckpointError.
    """
    from swirl.model.lora import base_name, is_adapter

    if not is_adapter(folder):
        return folder
    name = base_name(folder)
    base = model_folder(name)
    if not base.is_dir():
        raise CheckpointError(folder, f"adapters of {name}, which is no folder here and no name on the hub")
    return base


def device_for(name: str) -> str:
    """The device of that name; `auto` is `cuda` where there is one, else `cpu`. Without a number `cuda` is this rank's.

    Raises ConfigError where it is none of these, or not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not number.isdecimal())):
        raise ConfigError(f"--device {name}: expected cpu, cuda or cuda:0")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or os.environ.get("LOCAL_RANK", 0)) >= count:
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds {count} CUDA devices here")
    return name


def dtype_for(name: str, device: str):
    """The torch dtype of that name; `auto` is bfloat16 on a GPU, else float32."""
    import torch

    if name == "auto":
        name = "float32" if device_for(device) == "cpu" else "bfloat16"
    return getattr(torch, name)


def load_model(spec: str, *, device="cpu", dtype=None, attention: str = "tree", prepare=None):
    """(Gemma, Tokenizer) from a folder or `almanac`; a folder of adapters is merged into the model that it names.

    `prepare` is called with the model before its weights are read. Raises CheckpointError, also where model and
    tokenizer do not fit, and ConfigError where there is no such device, or this `attention` cannot compute that model.
    """
    import torch

    from swirl.model.checkpoint import check_tokenizer_fits
    from swirl.model.gemma import Gemma
    from swirl.model.lora import base_name, is_adapter, load_adapter, merge_lora
    from swirl.model.tokenizer import Tokenizer

    folder, device = model_folder(spec), device_for(str(device))
    if not folder.is_dir():
        expected = "expected `almanac`, a Hugging Face folder of a Gemma 2 or 3, or its owner/name on the hub"
        raise CheckpointError(folder, f"no such folder: {expected}")
    adapter = folder if is_adapter(folder) else None
    folder = base_folder(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Gemma.from_pretrained(
        folder, dtype=dtype or torch.float32, device=device, attention=attention, prepare=prepare
    )
    name = base_name(adapter) if adapter else spec
    if is_hub_name(name):  # adapters that are trained on it name it so, and can be taken elsewhere
        model.origin = replace(model.origin, hub_name=name)
    check_tokenizer_fits(tokenizer, model.config.vocab_size, folder)
    if adapter:
        merge_lora(load_adapter(model, adapter)).requires_grad_(True)
    return model, tokenizer


def open_policy(
    spec: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    client: Client | None = None,
    limits: EndpointLimits | None = None,
    tokenizer: Path | None = None,
    max_cache_tokens: int = MAX_CACHE_TOKENS,
):
    """(policy, tokenizer or None) from `almanac`, a checkpoint's folder or hub name, or a server's URL, by `client`.

    A server's policy has one where `tokenizer` is its folder. Raises CheckpointError, ConfigError.
    """
    if is_url(spec):
        if tokenizer is not None:
            from swirl.model.tokenizer import Tokenizer

            tokenizer = Tokenizer.from_pretrained(model_folder(os.fspath(tokenizer)))
        return open_wire_policy(spec, client=client, role="policy", limits=limits, tokenizer=tokenizer), tokenizer
    if tokenizer is not None:
        raise ConfigError(f"--tokenizer {tokenizer}: the policy '{spec}' has its own, expected a URL's")
    from swirl.sampling.local_policy import LocalPolicy

    model, tokenizer = load_model(spec, device=device, dtype=dtype_for(dtype, device))
    policy = LocalPolicy(model, tokenizer, name=os.fspath(spec), max_cache_tokens=max_cache_tokens)
    return policy, tokenizer


_ROLE_OF_JUDGE = {"process": "judge", "outcome": "outcome_judge", "reward": "reward"}


def open_judge(
    spec: str,
    *,
    kind: Kind = "process",
    prompt: Path | None = None,
    votes: int = 4,
    client: Client | None = None,
    limits: EndpointLimits | None = None,
    device: str = "auto",
    dtype: str = "auto",
    flag: str = "--judge",
):
    """One of Almanac's judges by name (`rule`, `lenient`, `noisy:SHARE`), a function or a judge of one's own
    (module:object, file.py:object), the URL of a server whose model judges, or a checkpoint folder that does.

    `kind` asks a model for a verdict on a step, for one on the final answer, or for a step's graded reward; `prompt`
    is the file of another template for it. Raises ConfigError, CheckpointError, InputError.
    """
    if tasks.is_almanac_judge(spec):
        from swirl.tasks import almanac

        return almanac.open_judge(spec)
    if is_reference(spec):
        return _own_judge(spec, flag)
    if is_url(spec):
        policy = open_wire_policy(spec, client=client, role=_ROLE_OF_JUDGE[kind], limits=limits, details=False)
    elif model_folder(spec).is_dir():
        policy, _ = open_policy(spec, device=device, dtype=dtype)
    else:
        raise ConfigError(
            f"{flag} {spec}: unknown, expected {', '.join(_ALMANAC_JUDGES)}, a URL, a checkpoint folder, module:object "
            "or file.py:object"
        )
    return judge_with(policy, kind, prompt=prompt, votes=votes)


def _own_judge(spec: str, flag: str):
    """An object with `judge` as it is, any other callable as a FunctionJudge."""
    from swirl.judging.functions import FunctionJudge

    found = load_object(spec, flag)
    if not callable(found) and not hasattr(found, "judge"):
        raise ConfigError(f"{flag} {spec}: expected a function of (question, steps, step), or an object with `judge`")
    return found if hasattr(found, "judge") else FunctionJudge(found, name_of(spec, flag))


_ALMANAC_JUDGES = ("rule", "lenient", "noisy:SHARE")


def require_judge_knows(spec: str | None, task: str, flag: str = "--judge") -> None:
    """Raises ConfigError where one of Almanac's judges is asked about a task that is not Almanac's."""
    if spec is not None and tasks.is_almanac_judge(spec) and task not in tasks.ALMANAC_FAMILIES:
        raise ConfigError(f"{flag} {spec}: knows the steps of Almanac's tasks alone, not those of '{task}'")


def num_weights(spec: str) -> int:
    """Of a model, by its config.json. Raises CheckpointError."""
    from swirl.model.checkpoint import read_config

    return read_config(base_folder(model_folder(spec)))[1].num_weights


def tokens_in_an_action(asked: int | None, policy: str) -> int:
    """What was asked for, else what suits the policy: a model behind a URL is taken to think aloud, as a large one."""
    return asked or (512 if is_url(policy) else tokens_of_an_action(num_weights(policy)))


def answers_beside(out: Path) -> Path:
    """Where a command that writes `out` keeps the answers of servers, unless it is told another file."""
    return out.with_name(out.name + ".answers.sqlite")


async def close(*things) -> None:
    """Close what holds connections: policies and judges over the wire."""
    for thing in things:
        if hasattr(thing, "close"):
            await thing.close()
