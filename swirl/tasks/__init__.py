"""Tasks: where questions come from, which tool they need, and how an answer is scored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from swirl.errors import ConfigError
from swirl.trajectories.record import Question

if TYPE_CHECKING:
    from swirl.tools.search import Page

FIRST_EDITION = ("bridge", "deep", "counterfactual", "mixed", "arithmetic")
ALMANAC_FAMILIES = FIRST_EDITION + tuple(f"{name}-2" for name in FIRST_EDITION)
_CALCULATOR_TASKS = ("arithmetic", "arithmetic-2", "gsm8k")
_DATA_SETS = ("gsm8k", "hotpotqa", "musique", "cofca", "beerqa", "own")


@dataclass(frozen=True)
class Task:
    """One family of questions. `max_queries` is the paper's: 5 with search, 10 with the calculator.

    `pages` are what a search looks through, and `corpus` the file they come from, None where there is none.
    """

    name: str
    tool_name: str
    max_queries: int
    questions: Callable[[str, int | None], list[Question]]
    open_tool: Callable[[], object]
    pages: Callable[[], Iterable[Page]]
    corpus: Path | None


def open_task(
    name: str,
    *,
    questions: str | os.PathLike | None = None,
    corpus: str | os.PathLike | None = None,
    top_k: int = 1,
) -> Task:
    """An Almanac family by name, or a data set by name with the file of its questions.

    `corpus` is a JSONL of {title, text} pages for the search tool, or a folder of its index; without it, the pages of
    the questions' own file. The tool returns `top_k` pages a query (the paper's 1).
    Raises ConfigError on an unknown name, a data set without its file, or what means nothing to the task.
    """
    given = {"questions": questions is not None, "corpus": corpus is not None, "top_k": top_k != 1}
    require_use([flag for flag in given if given[flag]], [name])
    if name in ALMANAC_FAMILIES:
        return _almanac_task(name, top_k)
    if questions is None:
        raise ConfigError(f"task '{name}' needs --questions, the file of the data set")
    return _data_set_task(name, questions, corpus, top_k)


def flags_of(name: str) -> frozenset[str]:
    """Which of questions, corpus, top_k and split mean something to a task. Raises ConfigError on an unknown name."""
    if name not in ALMANAC_FAMILIES + _DATA_SETS:
        raise ConfigError(f"task '{name}' is unknown: expected one of {', '.join(ALMANAC_FAMILIES + _DATA_SETS)}")
    made, searches = name in ALMANAC_FAMILIES, name not in _CALCULATOR_TASKS
    means = {"split": made, "questions": not made, "corpus": searches and not made, "top_k": searches}
    return frozenset(flag for flag in means if means[flag])


def require_use(flags: Iterable[str], names: Sequence[str]) -> None:
    """Raises ConfigError where a task is unknown, or one of the `flags` given means nothing to any of them."""
    meant = frozenset().union(*map(flags_of, names))
    for flag in flags:
        if flag not in meant:
            shown = ", ".join(f"'{name}'" for name in names)
            raise ConfigError(f"--{flag.replace('_', '-')}: means nothing to task {shown}; leave it out")


def _almanac_task(name: str, top_k: int) -> Task:
    from swirl.tasks import almanac
    from swirl.tools.search import SearchTool

    return Task(
        name=name,
        tool_name="calculator" if name in _CALCULATOR_TASKS else "search",
        max_queries=almanac.max_queries(name),
        questions=lambda split, num: almanac.questions(name, split, num),
        open_tool=lambda: almanac.tool(name) if top_k == 1 else SearchTool(almanac.pages(name), top_k),
        pages=lambda: almanac.pages(name),
        corpus=None,
    )


def _data_set_task(name: str, path, corpus, top_k: int) -> Task:
    module = import_module(f"swirl.tasks.{name}")
    uses_calculator = name in _CALCULATOR_TASKS

    def questions(split: str, num: int | None) -> list[Question]:
        return module.load(path)[:num]

    def pages() -> Iterable[Page]:
        if corpus is None:
            return module.corpus(path)
        from swirl.tools.search import read_pages

        return read_pages(Path(corpus, "pages.jsonl") if os.path.isdir(corpus) else corpus)

    def open_tool():
        if uses_calculator:
            from swirl.tools.calculator.calculate import CalculatorTool

            return CalculatorTool()
        from swirl.tools.search import SearchTool

        return SearchTool.open(corpus, top_k) if corpus is not None else SearchTool(module.corpus(path), top_k)

    return Task(
        name=name,
        tool_name="calculator" if uses_calculator else "search",
        max_queries=10 if uses_calculator else 5,
        questions=questions,
        open_tool=open_tool,
        pages=pages,
        corpus=Path(path if corpus is None else corpus),
    )


def tool_name(task: str, prompt: str, actions: Iterable[str] = ()) -> str:
    """The tool of a trajectory; of a user's own task (`own`, or an unknown one) what its prompt offers, or else its
    actions call: the prompts of others may describe their tools elsewhere.
    """
    if task in _CALCULATOR_TASKS:
        return "calculator"
    if task != "own" and task in ALMANAC_FAMILIES + _DATA_SETS:
        return "search"
    from swirl.rollout.prompts import TAGS

    offered = prompt.partition("\nQuestion: ")[0]  # a question may speak of tags too
    for text in (offered, *actions):
        tools = [tool for tool in ("search", "calculator") if f"<{TAGS[tool]}>" in text]
        if len(tools) == 1:
            return tools[0]
    return "search"


def score(question: Question, prediction: str) -> dict[str, float]:
    """The official scores of an answer under the question's own task; a user's own task scores as HotPotQA does."""
    if question.task in ALMANAC_FAMILIES:
        module = import_module("swirl.tasks.almanac")
    else:
        module = import_module(f"swirl.tasks.{question.task if question.task in _DATA_SETS else 'own'}")
    return module.score(question, prediction)


def is_correct(question: Question, prediction: str | None) -> bool:
    """Exact match under the task's rule (numbers compared as numbers for gsm8k); no prediction is not correct."""
    key = "number" if question.task == "gsm8k" else "em"
    return prediction is not None and score(question, prediction)[key] == 1.0
