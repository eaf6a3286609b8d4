"""A user's own questions: JSONL of {"question", "answer", "aliases"?, "id"?, "hops"?, "pages"?}.

`pages` is a list of {"title", "text"}; a corpus of its own file is the better place for many. Without an id
a question is named after its line. Scored by EM and HotPotQA's F1, each the maximum over answer and
aliases, and by the paper's rule for numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from swirl.errors import InputError
from swirl.tasks.reading import each_once, golden_answers, read_jsonl
from swirl.tasks.scoring import exact_match, f1, same_number
from swirl.tools.search import Page
from swirl.trajectories.record import Question


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    question: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    id: str | None = None
    hops: int | None = None
    pages: list[Page] = []


def load(path: str | os.PathLike) -> list[Question]:
    """All questions. Raises InputError, on an id used twice too."""
    questions, lines = [], {}
    for line, r in read_jsonl(path, _Record):
        name = r.id if r.id is not None else f"line-{line}"
        if name in lines:
            raise InputError(path, f"'{name}' names line {lines[name]} already", line=line, field="id")
        lines[name] = line
        fields = {"question": r.question, "answer": r.answer, "aliases": r.aliases, "hops": r.hops}
        questions.append(Question(id=name, task="own", **fields))
    return questions


def corpus(path: str | os.PathLike) -> Iterator[Page]:
    """The pages of all questions, each once. Raises InputError."""
    return each_once(page for _, record in read_jsonl(path, _Record) for page in record.pages)


def score(question: Question, answer: str) -> dict[str, float]:
    """`em` and `f1`, and `number`: 1 where EM is, or where both are the same number. Raises ConfigError
    without.
    """
    golden = golden_answers(question)
    em = max(exact_match(answer, g) for g in golden)
    number = float(em or any(same_number(answer, g) for g in golden))
    return {"em": em, "f1": max(f1(answer, g) for g in golden), "number": number}
