"""CofCA (arXiv 2402.11924): counterfactual passages with 2-, 3- and 4-hop questions.

Its files could not be had when this was written and their field names are not documented, so this reads a
neutral JSONL of our own, into which they can be put with a few lines; it is not CofCA's official schema:

    {"id": "...", "question": "...", "answer": "...",
     "aliases": ["..."],                                     optional
     "hops": 3,                                              optional, else the number of sub-questions
     "sub_questions": [{"question": "...", "answer": "..."}], optional
     "pages": [{"title": "...", "text": "..."}]}             optional, the rewritten passages
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from swirl.errors import ConfigError
from swirl.tasks.reading import each_once, golden_answers, read_jsonl
from swirl.tasks.scoring import exact_match, f1
from swirl.tools.search import Page
from swirl.trajectories.record import Question


class _SubQuestion(msgspec.Struct):
    question: str
    answer: str


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    question: str
    answer: str | None = None
    aliases: tuple[str, ...] = ()
    hops: int | None = None
    sub_questions: list[_SubQuestion] = []
    pages: list[Page] = []


def load(path: str | os.PathLike) -> list[Question]:
    """The final questions. Raises InputError."""
    return [_question(record) for _, record in read_jsonl(path, _Record)]


def _question(r: _Record) -> Question:
    hops = r.hops if r.hops is not None else len(r.sub_questions) or None
    return Question(id=r.id, task="cofca", question=r.question, answer=r.answer, aliases=r.aliases, hops=hops)


def sub_questions(path: str | os.PathLike) -> dict[str, list[Question]]:
    """The sub-questions of every question by its id, in order, with ids `ID/1`, `ID/2`. Raises InputError."""
    return {
        record.id: [
            Question(id=f"{record.id}/{k}", task="cofca", question=part.question, answer=part.answer, hops=1)
            for k, part in enumerate(record.sub_questions, 1)
        ]
        for _, record in read_jsonl(path, _Record)
    }


def corpus(path: str | os.PathLike) -> Iterator[Page]:
    """The pages of all questions, each once. Raises InputError."""
    return each_once(page for _, record in read_jsonl(path, _Record) for page in record.pages)


def score(question: Question, answer: str) -> dict[str, float]:
    """EM and HotPotQA's F1, each the maximum over answer and aliases. Raises ConfigError where there is
    none.
    """
    golden = golden_answers(question)
    return {"em": max(exact_match(answer, g) for g in golden), "f1": max(f1(answer, g) for g in golden)}


def chain_score(steps: list[dict[str, float]]) -> dict[str, float]:
    """The joint score of one reasoning chain: the product of the scores of its sub-answers and the final
    one.
    """
    if not steps:
        raise ConfigError("a chain needs at least one scored answer")
    joint = {"em": 1.0, "f1": 1.0}
    for step in steps:
        joint = {name: joint[name] * step[name] for name in joint}
    return joint
