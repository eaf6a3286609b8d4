"""From what a user names on the command line to the tasks themselves, their tools and their search."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

from swirl import tasks
from swirl.app import command
from swirl.app.loader import is_reference, load_object
from swirl.app.progress import progress
from swirl.app.resolve import is_url
from swirl.endpoints.address import EndpointLimits, endpoint_for, parse_spec
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, InputError
from swirl.rollout.task import Task
from swirl.rollout.tool import Tool, as_tools
from swirl.tools.search import search_tool


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """What is asked, and which tools are on offer."""

    task: tuple[str, ...] = ("bridge",)
    """Almanac families (bridge, deep, counterfactual, mixed, arithmetic; with -2 those of the second edition), data
    sets (gsm8k, hotpotqa, musique, cofca, beerqa, own), or tasks of your own: module:object, file.py:object."""
    questions: Path | None = None
    """The data set's file; for no other task."""
    num_questions: int | None = 400
    """Questions of each task, from the first; None for all. Ours; the paper takes 10,000 to train on."""
    split: str | None = None
    """train, validation or test, where the task has splits; default: train to generate, test to evaluate."""
    without_easy: bool = False
    """Leave out HotPotQA's easy questions, as the paper does to train."""
    tool: tuple[str, ...] = ()
    """Tools on offer in place of the task's own: search, calculator, module:object, file.py:object,
    mcp+http://host/mcp, mcp+stdio:COMMAND."""
    corpus: Path | None = None
    """Pages to search: JSONL of {title, text}, or a folder of its index; default: those of the questions' own file."""
    retriever: str = "bm25"
    """What searches them: `bm25`; `dense+http://host/v1#model`, by embeddings of that server, indexed once beside the
    file; or http://host:port/retrieve, a server of Search-R1's form with pages of its own."""
    top_k: int = 1
    """Pages returned for a query (the paper's 1)."""

    def check_task(self) -> None:
        """Raises ConfigError on a value that cannot be meant; called by the config that inherits the group."""
        command.require_at_least(1, self, "num_questions", "top_k")
        if not self.task:
            raise ConfigError("--task: expected at least one task")


async def open_tasks(flags: TaskFlags, *, client: Client, limits: EndpointLimits | None = None) -> list[Task]:
    """Every task that is named, by the flags that mean something to it. Raises ConfigError where a flag means nothing
    to any of them, and as `open_task` does.
    """
    given = [
        flag
        for flag in ("questions", "corpus", "top_k", "split", "retriever", "without_easy")
        if getattr(flags, flag) != getattr(TaskFlags, flag)
    ]
    means = {name: frozenset({"split"}) if is_reference(name) else tasks.flags_of(name) for name in flags.task}
    tasks.refuse_flags(given, means)
    opened = []
    for name, takes in means.items():
        own = {flag: getattr(flags, flag) for flag in given if flag in takes and flag != "split"}
        opened.append(await open_task(name, tool=flags.tool, client=client, limits=limits, **own))
    return opened


async def open_task(
    spec: str,
    *,
    questions: Path | Mapping[str, Path] | None = None,
    corpus: Path | None = None,
    retriever: str = "bm25",
    top_k: int = 1,
    without_easy: bool = False,
    tool: Sequence[str] = (),
    client: Client | None = None,
    limits: EndpointLimits | None = None,
) -> Task:
    """One task by its name or reference, with the tools named in `tool` in place of its own where there are any.

    `retriever` says who searches: `bm25`, `dense+http://host/v1#model`, or a URL of Search-R1's form. Dense: the task's
    pages are embedded once, into a folder beside the file they come from; a later run opens that. `questions` is a
    file, or a file for each split.
    Raises ConfigError where a flag means nothing to the task, or it has nothing that could be embedded, InputError
    where the folder is of other pages, EndpointError as the server does.
    """
    if is_reference(spec):
        task = _own_task(spec)
    else:
        search = None
        if retriever != "bm25":
            tasks.require_use(["retriever"], [spec])
            pages = partial(tasks.pages_of, spec, questions, corpus)
            beside = corpus or (questions if isinstance(questions, Path) else None)
            search = search_tool(await _open_retriever(retriever, pages, beside, top_k, client, limits))
        elif tool and "search" not in tool and "retriever" in tasks.flags_of(spec):
            search = search_tool()  # not on offer: nothing is indexed
        options = {"corpus": corpus, "top_k": top_k, "without_easy": without_easy}
        task = tasks.open_task(spec, questions=questions, search=search, **options)
    if tool:
        task = replace(task, tools=await open_tools(tool, task))
    return task


def _own_task(spec: str) -> Task:
    """The Task that a reference names, or that a function without parameters gives."""
    found = load_object(spec, "--task")
    if callable(found) and not isinstance(found, Task):
        found = found()
    if not isinstance(found, Task):
        raise ConfigError(f"--task {spec}: expected a swirl.Task, or a function that gives one")
    return found


def require_named(task: Sequence[str], tool: Sequence[str]) -> None:
    """Raises ConfigError where no such task or tool is known, or a reference leads nowhere. Nothing is opened."""
    for spec in task:
        if is_reference(spec):
            load_object(spec, "--task")
        else:
            tasks.flags_of(spec)
    for spec in tool:
        if is_reference(spec):
            load_object(spec, "--tool")
        elif spec not in ("search", "calculator") and not spec.startswith("mcp+"):
            raise ConfigError(
                f"--tool {spec}: unknown, expected search, calculator, module:object, file.py:object, "
                "mcp+http://host/mcp or mcp+stdio:COMMAND"
            )


async def open_tools(specs: Sequence[str], task: Task) -> tuple[Tool, ...]:
    """The tools that are named; `search` is the task's own. Raises ConfigError, EndpointError where a server of tools
    cannot be reached.
    """
    require_named((), specs)
    made: list = []
    for spec in specs:
        if spec == "search":
            made += [tool for tool in task.tools if tool.name == "search"]
            if not made:
                raise ConfigError(f"--tool search: task '{task.name}' has nothing to search")
        elif spec == "calculator":
            from swirl.tools.calculator.calculate import calculator_tool

            made.append(calculator_tool())
        elif spec.startswith("mcp+"):
            from swirl.tools.mcp import open_mcp_tools

            made += await open_mcp_tools(spec)
        else:
            found = load_object(spec, "--tool")
            if not callable(found):
                raise ConfigError(f"--tool {spec}: expected a function or a swirl.Tool")
            made.append(found)
    return as_tools(made)


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
