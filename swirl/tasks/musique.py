"""MuSiQue (arXiv 2108.00573): JSONL in the official schema.

    {id, question, answer, answer_aliases, answerable, paragraphs: [{idx, title, paragraph_text,
    is_supporting}],
     question_decomposition: [{id, question, answer, paragraph_support_idx}]}
`#1` in a sub-question stands for an earlier answer. Questions marked as not answerable (MuSiQue-Full) are
left out: they repeat answerable ones with a paragraph taken away. EM and F1 each take their maximum over
answer and aliases.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

import msgspec

from swirl.errors import InputError
from swirl.rollout.prompts import question_prompt
from swirl.tasks.reading import each_once, golden_answers, read_jsonl
from swirl.tasks.scoring import exact_match, f1_squad
from swirl.tools.search import Page, search_tool, show_pages
from swirl.trajectories.actions import TAGS, action_text, observation_text
from swirl.trajectories.record import Question, Step, Trajectory, with_calls

MAX_QUERIES = 5


class _Paragraph(msgspec.Struct):
    idx: int
    title: str
    paragraph_text: str
    is_supporting: bool = False


class _SubQuestion(msgspec.Struct):
    question: str
    answer: str
    paragraph_support_idx: int | None = None


class _Record(msgspec.Struct):
    id: str
    question: str
    answer: str | None = None
    answer_aliases: tuple[str, ...] = ()
    answerable: bool = True
    paragraphs: list[_Paragraph] = []
    question_decomposition: list[_SubQuestion] = []


def _questions(path) -> Iterator[tuple[int, _Record, Question]]:
    for line, r in read_jsonl(path, _Record):
        if r.answerable:
            hops = len(r.question_decomposition) or None
            fields = {"question": r.question, "answer": r.answer, "aliases": r.answer_aliases, "hops": hops}
            yield line, r, Question(id=r.id, task="musique", **fields)


def load(path: str | os.PathLike) -> list[Question]:
    """All answerable questions; `hops` is the number of sub-questions. Raises InputError."""
    return [question for _, _, question in _questions(path)]


def corpus(path: str | os.PathLike) -> Iterator[Page]:
    """The paragraphs of all questions, each once. Raises InputError."""
    return each_once(_page(paragraph) for _, record in read_jsonl(path, _Record) for paragraph in record.paragraphs)


def support(path: str | os.PathLike) -> Iterator[tuple[str, list[Page]]]:
    """(question, its supporting paragraphs): what retrieval is measured on."""
    for _, record, question in _questions(path):
        yield question.question, [_page(p) for p in record.paragraphs if p.is_supporting]


def _page(paragraph: _Paragraph) -> Page:
    return Page(paragraph.title, paragraph.paragraph_text)


def score(question: Question, answer: str) -> dict[str, float]:
    """The maxima over answer and aliases. Raises ConfigError where there is no golden answer."""
    golden = golden_answers(question)
    return {"em": max(exact_match(answer, g) for g in golden), "f1": max(f1_squad(answer, g) for g in golden)}


def records(path: str | os.PathLike, dropped: Counter[str] | None = None) -> Iterator[Trajectory]:
    """Known trajectories: each sub-question is a query, its supporting paragraph the result, then the answer.

    Text only, no token ids. Every step is GOOD with reward 1. Records without answer or decomposition, or
    with more sub-questions than a trajectory may have queries, are left out and counted in `dropped` by
    reason.
    """
    dropped = Counter() if dropped is None else dropped
    for line, record, question in _questions(path):
        parts = record.question_decomposition
        if record.answer is None or not parts or any(p.paragraph_support_idx is None for p in parts):
            dropped["no answer or decomposition"] += 1
            continue
        if len(parts) > MAX_QUERIES:
            dropped[f"more than {MAX_QUERIES} queries"] += 1
            continue
        paragraphs = {p.idx: p for p in record.paragraphs}
        steps = []
        for k, part in enumerate(parts):
            if part.paragraph_support_idx not in paragraphs:
                field = f"question_decomposition[{k}].paragraph_support_idx"
                raise InputError(path, "expected the idx of one of the paragraphs", line=line, field=field)
            query = _resolve(part.question, parts[:k])
            result = show_pages([_page(paragraphs[part.paragraph_support_idx])])
            observation = observation_text(query, result)
            steps.append(Step(action=action_text("search", query), observation=observation, verdict="GOOD", reward=1.0))
        steps.append(Step(action=action_text("answer", record.answer), verdict="GOOD", reward=1.0))
        made = Trajectory(
            id=f"{question.id}#0",
            question=question,
            prompt=question_prompt(question.question, [search_tool()], MAX_QUERIES),
            tools={"search": TAGS["search"]},
            steps=tuple(steps),
            stop="answer",
            prediction=record.answer,
            policy="musique",
            outcome=True,
        )
        yield with_calls(made)


def _resolve(sub_question: str, earlier: list[_SubQuestion]) -> str:
    """`#1` becomes the first answer; "X >> relation" becomes "X relation"."""

    def answer(match: re.Match) -> str:
        i = int(match[1])
        return earlier[i - 1].answer if 1 <= i <= len(earlier) else match[0]

    return re.sub(r"#(\d+)", answer, sub_question.replace(" >> ", " "), flags=re.ASCII)
