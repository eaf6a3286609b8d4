"""Tasks that swirl brings along: Almanac's families and the data sets, each by its name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from swirl.errors import ConfigError
from swirl.trajectories.record import Question

if TYPE_CHECKING:  # config knows the names alone, and must not load a rollout
    from swirl.rollout.task import Task
    from swirl.rollout.tool import Tool
    from swirl.tools.search import Page

FIRST_EDITION = ("bridge", "deep", "counterfactual", "mixed", "arithmetic")
ALMANAC_FAMILIES = FIRST_EDITION + tuple(f"{name}-2" for name in FIRST_EDITION)
DATA_SETS = ("gsm8k", "hotpotqa", "musique", "cofca", "beerqa", "own")
_CALCULATOR_TASKS = ("arithmetic", "arithmetic-2", "gsm8k")
_ACCURACY = {"gsm8k": "number"}  # numbers compared as numbers, where exact match is the rule for all others

PathLike = str | os.PathLike


def is_almanac_judge(spec: str) -> bool:
    """One of Almanac's own judges (swirl/tasks/almanac/weak_judges.py), which know no other task."""
    return spec in ("rule", "lenient") or spec.startswith("noisy:")


def open_task(
    name: str,
    *,
    questions: PathLike | Mapping[str, PathLike] | None = None,
    corpus: PathLike | None = None,
    top_k: int = 1,
    without_easy: bool = False,
    search: Tool | None = None,
) -> Task:
    """An Almanac family by name, or a data set by name with the file of its questions, or with one for each split.

    `corpus` is a JSONL of {title, text} pages for the search tool, or a folder of its index; without it, the pages of
    the questions' own files. The tool returns `top_k` pages a query (the paper's 1); `search` takes its place.
    `without_easy` leaves out HotPotQA's easy questions, as the paper did for training.
    Raises ConfigError on an unknown name, a data set without its file, or what means nothing to the task.
    """
    given = {"questions": questions, "corpus": corpus, "without_easy": without_easy, "retriever": search}
    require_use([flag for flag, value in given.items() if value] + ["top_k"] * (top_k != 1), [name])
    if name not in ALMANAC_FAMILIES and not questions:
        raise ConfigError(f"task '{name}' needs --questions, the file of the data set")
    if name in ALMANAC_FAMILIES:
        return _almanac_task(name, top_k, search)
    return _data_set_task(name, questions, corpus, top_k, without_easy, search)


def flags_of(name: str) -> frozenset[str]:
    """Which of the flags that say more of a task mean something to it. Raises ConfigError on an unknown name."""
    if name not in ALMANAC_FAMILIES + DATA_SETS:
        raise ConfigError(
            f"task '{name}' is unknown: expected one of {', '.join(ALMANAC_FAMILIES + DATA_SETS)}, module:object or "
            "file.py:object"
        )
    made, searches = name in ALMANAC_FAMILIES, name not in _CALCULATOR_TASKS
    means = {
        "split": made,
        "questions": not made,
        "corpus": searches and not made,
        "top_k": searches,
        "retriever": searches,
        "without_easy": name == "hotpotqa",
    }
    return frozenset(flag for flag in means if means[flag])


def require_use(flags: Iterable[str], names: Sequence[str]) -> None:
    """Raises ConfigError where a task is unknown, or one of the `flags` given means nothing to any of them."""
    refuse_flags(flags, {name: flags_of(name) for name in names})


def refuse_flags(flags: Iterable[str], means: Mapping[str, frozenset[str]]) -> None:
    """Raises ConfigError where one of the `flags` given is not among those that mean something to a task (`means`)."""
    for flag in flags:
        if not any(flag in of_task for of_task in means.values()):
            shown = ", ".join(f"'{name}'" for name in means)
            raise ConfigError(f"--{flag.replace('_', '-')}: means nothing to task {shown}; leave it out")


def _almanac_task(name: str, top_k: int, search: Tool | None) -> Task:
    from swirl.rollout.task import Task
    from swirl.tasks import almanac
    from swirl.tools.calculator.calculate import calculator_tool
    from swirl.tools.search import SearchTool, search_tool

    if name in _CALCULATOR_TASKS:
        tool = calculator_tool()
    else:
        tool = search or search_tool(almanac.tool(name) if top_k == 1 else SearchTool(almanac.pages(name), top_k))
    return Task(
        name=name,
        questions=lambda split, num: almanac.questions(name, split, num),
        tools=(tool,),
        max_queries=almanac.max_queries(name),
        score=almanac.score,
    )


def _data_set_task(name: str, files, corpus, top_k: int, without_easy: bool, search: Tool | None) -> Task:
    from swirl.rollout.task import Task
    from swirl.tools.calculator.calculate import calculator_tool
    from swirl.tools.search import SearchTool, search_tool

    module = import_module(f"swirl.tasks.{name}")
    options = {"without_easy": True} if without_easy else {}

    def questions(split: str, num: int | None) -> list[Question]:
        if isinstance(files, Mapping) and split not in files:
            raise ConfigError(f"task '{name}' has no file of questions for its split '{split}'")
        return module.load(files[split] if isinstance(files, Mapping) else files, **options)[:num]

    uses_calculator = name in _CALCULATOR_TASKS
    if uses_calculator:
        tool = calculator_tool()
    elif search is not None:
        tool = search
    elif corpus is not None:
        tool = search_tool(SearchTool.open(corpus, top_k))
    else:
        tool = search_tool(SearchTool(pages_of(name, files), top_k))
    return Task(
        name=name,
        questions=questions,
        tools=(tool,),
        max_queries=10 if uses_calculator else 5,
        score=module.score,
        accuracy=_ACCURACY.get(name, "em"),
    )


def pages_of(name: str, questions: PathLike | Mapping[str, PathLike] | None, corpus: PathLike | None = None):
    """The pages that a task's search looks through, each once: those of `corpus`, else of the questions' own files."""
    if name in ALMANAC_FAMILIES:
        return import_module("swirl.tasks.almanac").pages(name)
    if corpus is not None:
        from swirl.tools.search import read_pages

        return read_pages(Path(corpus, "pages.jsonl") if os.path.isdir(corpus) else corpus)
    return _own_pages(import_module(f"swirl.tasks.{name}"), questions)


def _own_pages(module, files: PathLike | Mapping[str, PathLike]) -> Iterable[Page]:
    from swirl.tasks.reading import each_once

    if not isinstance(files, Mapping):
        return module.corpus(files)
    return each_once(page for file in dict.fromkeys(files.values()) for page in module.corpus(file))


def scores(question: Question, prediction: str) -> dict[str, float]:
    """The official scores of an answer under the question's own task, by its name alone: for trajectories whose task is
    not at hand. Those of a user's own task are scored as HotPotQA's are.
    """
    if question.task in ALMANAC_FAMILIES:
        module = import_module("swirl.tasks.almanac")
    else:
        module = import_module(f"swirl.tasks.{question.task if question.task in DATA_SETS else 'own'}")
    return module.score(question, prediction)


def is_correct(question: Question, prediction: str | None) -> bool:
    """Exact match under the task's rule, as `scores` finds it (gsm8k: numbers compared as numbers); no prediction is
    not correct.
    """
    return prediction is not None and scores(question, prediction)[_ACCURACY.get(question.task, "em")] == 1.0
