"""From what a user names on the command line to the thing itself: policies, judges, search tools."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from swirl import tasks
from swirl.app.progress import progress
from swirl.endpoints.address import EndpointLimits, endpoint_for, open_wire_policy, parse_spec
from swirl.endpoints.client import Client
from swirl.errors import CheckpointError, ConfigError, InputError
from swirl.judging.judges import Kind, judge_with
from swirl.rollout.task import Task
from swirl.tools.search import search_tool

ALMANAC_BASE = Path(__file__).parents[1] / "tasks" / "almanac" / "base"


def is_url(spec: str) -> bool:
    return "://" in spec


def model_folder(spec: str) -> Path:
    """`almanac` is the base policy that ships with swirl; anything else is a Hugging Face folder."""
    return ALMANAC_BASE if spec == "almanac" else Path(spec)


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


def load_model(spec: str, *, device="cpu", dtype=None, attention: str = "tree"):
    """(Gemma, Tokenizer) from a folder or `almanac`. Raises CheckpointError, also where the two do not fit, and
    ConfigError where there is no such device, or this `attention` cannot compute that model.
    """
    import torch

    from swirl.model.checkpoint import check_tokenizer_fits
    from swirl.model.gemma import Gemma
    from swirl.model.tokenizer import Tokenizer

    folder, device = model_folder(spec), device_for(str(device))
    if not folder.is_dir():
        raise CheckpointError(folder, "no such folder: expected `almanac` or a Hugging Face folder of a Gemma 2")
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Gemma.from_pretrained(folder, dtype=dtype or torch.float32, device=device, attention=attention)
    check_tokenizer_fits(tokenizer, model.config.vocab_size, folder)
    return model, tokenizer


def open_policy(
    spec: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    client: Client | None = None,
    limits: EndpointLimits | None = None,
    tokenizer: Path | None = None,
):
    """(policy, tokenizer or None) from `almanac`, a checkpoint folder, or the URL of a server, asked by `client`.

    A server's policy has one where `tokenizer` is its folder. Raises CheckpointError, ConfigError.
    """
    if is_url(spec):
        if tokenizer is not None:
            from swirl.model.tokenizer import Tokenizer

            tokenizer = Tokenizer.from_pretrained(tokenizer)
        return open_wire_policy(spec, client=client, role="policy", limits=limits, tokenizer=tokenizer), tokenizer
    if tokenizer is not None:
        raise ConfigError(f"--tokenizer {tokenizer}: the policy '{spec}' has its own, expected a URL's")
    import torch

    from swirl.sampling.local_policy import LocalPolicy

    model, tokenizer = load_model(spec, device=device, dtype=getattr(torch, dtype))
    return LocalPolicy(model, tokenizer, name=os.fspath(spec)), tokenizer


_ROLE_OF_JUDGE = {"process": "judge", "outcome": "outcome_judge", "reward": "reward"}


def open_judge(
    spec: str,
    *,
    kind: Kind = "process",
    prompt: Path | None = None,
    votes: int = 4,
    client: Client | None = None,
    limits: EndpointLimits | None = None,
    device: str = "cpu",
    dtype: str = "float32",
):
    """One of Almanac's own (rule, lenient, noisy:SHARE), a server's URL whose model judges, asked by `client`, or a
    checkpoint folder.

    `kind` asks a model for a verdict on a step, for one on the final answer, or for a step's graded reward; `prompt`
    is the file of another template for it. Raises ConfigError, CheckpointError, InputError.
    """
    if tasks.is_almanac_judge(spec):
        from swirl.tasks import almanac

        return almanac.open_judge(spec)
    if is_url(spec):
        policy = open_wire_policy(spec, client=client, role=_ROLE_OF_JUDGE[kind], limits=limits, details=False)
    elif model_folder(spec).is_dir():
        policy, _ = open_policy(spec, device=device, dtype=dtype)
    else:
        raise ConfigError(f"judge '{spec}' is unknown: expected 'rule', a URL or a checkpoint folder")
    return judge_with(policy, kind, prompt=prompt, votes=votes)


async def open_task(
    spec: str,
    *,
    questions: Path | Mapping[str, Path] | None = None,
    corpus: Path | None = None,
    retriever: str = "bm25",
    top_k: int = 1,
    without_easy: bool = False,
    client: Client,
    limits: EndpointLimits | None = None,
) -> Task:
    """The task by its name, with its search done by `retriever`: `bm25`, `dense+http://host/v1#model`, or a URL of
    Search-R1's form.

    Dense: the task's pages are embedded once, into a folder beside the file they come from; a later run opens that.
    Raises ConfigError where a flag means nothing to the task, or it has nothing that could be embedded, InputError
    where the folder is of other pages, EndpointError as the server does.
    """
    search = None
    if retriever != "bm25":
        tasks.require_use(["retriever"], [spec])
        pages = partial(tasks.pages_of, spec, questions, corpus)
        beside = corpus or (questions if isinstance(questions, Path) else None)
        search = search_tool(await _open_retriever(retriever, pages, beside, top_k, client, limits))
    options = {"corpus": corpus, "top_k": top_k, "without_easy": without_easy}
    return tasks.open_task(spec, questions=questions, search=search, **options)


async def _open_retriever(
    spec: str, pages: Callable[[], Iterable], beside: Path | None, top_k: int, client: Client, limits
):
    if not is_url(spec):
        raise ConfigError(
            f"retriever '{spec}' is unknown: expected bm25, dense+http://host/v1#model or http://host:port/retrieve"
        )
    if spec.startswith("dense+"):
        return await _open_dense(spec.removeprefix("dense+"), pages, beside, top_k, client, limits)
    from swirl.tools.retrieval import RetrievalServerTool, retriever

    endpoint = replace(endpoint_for(spec, limits=limits), key_env=None)  # that form knows no key
    return RetrievalServerTool(spec, retriever(client, endpoint), top_k)


async def _open_dense(
    spec: str, pages: Callable[[], Iterable], beside: Path | None, top_k: int, client: Client, limits
):
    from swirl.endpoints.batcher import embedder
    from swirl.tools.retrieval import DenseSearchTool, build_dense_index

    _, url, model = parse_spec(spec)
    endpoint = endpoint_for(url, role="retriever", limits=limits)
    embed = embedder(client, endpoint, model)
    if beside is None:
        raise ConfigError("--retriever: the task has no file of pages to index, a server's URL would do")
    folder = beside.with_name(f"{beside.name}.dense-{re.sub(r'[^A-Za-z0-9._-]+', '-', model)}")
    if not folder.exists():
        with progress("embed pages", None, note=client.progress.note) as advance:

            async def embed_pages(texts: list[str]) -> list[list[float]]:
                vectors = await embed(texts)
                advance(len(texts))
                return vectors

            at_a_time = endpoint.batch_size * endpoint.concurrency
            await build_dense_index(pages(), folder, embed_pages, pages_per_request=at_a_time)
    tool = DenseSearchTool(folder, embed, top_k)
    if any(old != new for old, new in zip_longest(tool.pages, pages())):
        raise InputError(folder, f"expected an index of {beside} as it is now: remove the folder to build it anew")
    return tool


def tokens_in_an_action(asked: int | None, policy: str) -> int:
    """What was asked for, else what suits the policy: a model behind a URL is taken to think aloud."""
    return asked or (512 if is_url(policy) else 48)


def answers_beside(out: Path) -> Path:
    """Where a command that writes `out` keeps the answers of servers, unless it is told another file."""
    return out.with_name(out.name + ".answers.sqlite")


async def close(*things) -> None:
    """Close what holds connections: policies and judges over the wire."""
    for thing in things:
        if hasattr(thing, "close"):
            await thing.close()
