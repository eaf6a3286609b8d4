"""BeerQA (arXiv 2010.12527): {"version", "split", "data": [{id, src, answers, question, context: [[title,
text]]}]}.

Test files carry {id, question} alone. Scored as the official script does: HotPotQA's F1 over `answers`, and
the EM of the answer with the strictly best F1. `src` says where a question came from; averages are micro,
per src and macro.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import msgspec

from swirl.tasks.reading import each_once, golden_answers, read_array
from swirl.tasks.scoring import exact_match, f1, mean_scores
from swirl.tools.search import Page
from swirl.trajectories.record import Question

_HOPS = {"squad": 1, "hotpotqa": 2}


class _Record(msgspec.Struct):
    id: str
    question: str
    src: str | None = None
    answers: list[str] = []


class _Context(msgspec.Struct):
    context: list[tuple[str, str]] = []


def load(path: str | os.PathLike) -> list[Question]:
    """All questions; the first of `answers` is the answer, the others its aliases. Raises InputError."""
    return [
        Question(
            id=r.id,
            task="beerqa",
            question=r.question,
            answer=r.answers[0] if r.answers else None,
            aliases=tuple(r.answers[1:]),
            hops=_HOPS.get(r.src),
        )
        for r in read_array(path, _Record, key=True)
    ]


def sources(path: str | os.PathLike) -> dict[str, str]:
    """The src of every question by its id; a question without one is left out. Raises InputError."""
    return {r.id: r.src for r in read_array(path, _Record, key=True) if r.src is not None}


def corpus(path: str | os.PathLike) -> Iterator[Page]:
    """The paragraphs of all contexts, each once; none in a test file. Raises InputError."""
    records = read_array(path, _Context, key=True)
    return each_once(Page(title, text) for record in records for title, text in record.context)


def score(question: Question, answer: str) -> dict[str, float]:
    """The best F1 over the answers, and that answer's EM; both 0 where every F1 is 0. Raises ConfigError
    without.
    """
    best = {"em": 0.0, "f1": 0.0}
    for golden in golden_answers(question):
        value = f1(answer, golden)
        if value > best["f1"]:
            best = {"em": exact_match(answer, golden), "f1": value}
    return best


def averages(scores: Iterable[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """From (src, score) pairs: `micro`, one entry per src, and `macro`, the mean over the srcs."""
    by_source: dict[str, list[dict[str, float]]] = {}
    for source, one in scores:
        by_source.setdefault(source, []).append(one)
    means = {source: mean_scores(ones) for source, ones in sorted(by_source.items())}
    macro = mean_scores([{name: m[name] for name in ("em", "f1")} for m in means.values()])
    return {
        "micro": mean_scores([one for ones in by_source.values() for one in ones]),
        **means,
        "macro": macro,
    }
