"""HotPotQA (arXiv 1809.09600), distractor and fullwiki: one JSON array in the official schema.

    {_id, question, answer, type, level, supporting_facts: [[title, sentence]], context: [[title,
    [sentences]]]}
Test files carry no answer. Scored as hotpot_evaluate_v1.py does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from swirl.tasks.reading import each_once, golden_answers, read_array
from swirl.tasks.scoring import exact_match, f1
from swirl.tools.search import Page
from swirl.trajectories.record import Question


class _Record(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    question: str
    answer: str | None = None
    level: str | None = None


class _Context(msgspec.Struct):
    context: list[tuple[str, list[str]]]
    question: str = ""
    supporting_facts: list[tuple[str, int]] = []


def load(path: str | os.PathLike, *, without_easy: bool = False) -> list[Question]:
    """All questions; `without_easy` leaves out level "easy", as the paper did for training. Raises
    InputError.
    """
    return [
        Question(id=r.id, task="hotpotqa", question=r.question, answer=r.answer, hops=2)
        for r in read_array(path, _Record)
        if not (without_easy and r.level == "easy")
    ]


def corpus(path: str | os.PathLike) -> Iterator[Page]:
    """The paragraphs of all contexts, each once. Raises InputError."""
    return each_once(page for record in read_array(path, _Context) for page in _pages(record))


def support(path: str | os.PathLike) -> Iterator[tuple[str, list[Page]]]:
    """(question, its supporting paragraphs in the order of the facts): what retrieval is measured on."""
    for record in read_array(path, _Context):
        by_title = {page.title: page for page in _pages(record)}
        titles = dict.fromkeys(title for title, _ in record.supporting_facts)
        yield record.question, [by_title[title] for title in titles if title in by_title]


def _pages(record: _Context) -> list[Page]:
    return [Page(title, "".join(sentences).strip()) for title, sentences in record.context]


def score(question: Question, answer: str) -> dict[str, float]:
    """EM and F1 against the one golden answer. Raises ConfigError where there is none."""
    golden = golden_answers(question)[0]
    return {"em": exact_match(answer, golden), "f1": f1(answer, golden)}
