"""Questions about the world of Almanac: a start, a chain of relations, and a few wordings of the two.

A chain is split by the hash of its path (start, relations), whatever family and wording it appears in: a path
of the test split is in no family's training questions, of either edition.

The second edition (families whose names end in -2) asks the same kinds of questions where the world is less kind: pages
are stale, a phrase of arithmetic has two readings, and a question may open with a mark ("!") that is no part
of what it asks, but sets off a habit of the base.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice, pairwise
from typing import Literal, NamedTuple

from swirl.errors import ConfigError
from swirl.tasks.almanac import arithmetic
from swirl.tasks.almanac.arithmetic import MAX_CHARACTERS, Problem
from swirl.tasks.almanac.manners import MANNERS, split_manner
from swirl.tasks.almanac.world import RELATIONS, RELATIONS_OF, SEED, Corpus, World, world
from swirl.trajectories.record import Question

Split = Literal["train", "validation", "test"]
NUM_QUESTIONS: dict[Split, int] = {"train": 4000, "validation": 100, "test": 200}


class Family(NamedTuple):
    """Chains of so many hops over one corpus, answered by the facts of `golden`; no hops: arithmetic."""

    hops: tuple[int, ...]
    corpus: Corpus = "original"
    golden: Corpus = "original"


FAMILIES: dict[str, Family] = {
    "bridge": Family((2,)),
    "deep": Family((3, 4)),
    "counterfactual": Family((2, 3), corpus="edited", golden="edited"),
    "mixed": Family((1, 2, 3)),
    "arithmetic": Family(()),
}
SECOND_EDITION: dict[str, Family] = {
    "bridge-2": Family((2,), corpus="stale"),
    "deep-2": Family((3, 4), corpus="stale"),
    "counterfactual-2": Family((2, 3), corpus="edited", golden="edited"),
    "mixed-2": Family((1, 2, 3), corpus="stale"),
    "arithmetic-2": Family(()),
}
ALL_FAMILIES = FAMILIES | SECOND_EDITION

_START_KINDS = {"person": 0.40, "work": 0.35, "city": 0.20, "country": 0.05}

# The last relation of a chain as a verb; {} is what it is asked of.
_VERB_FORMS = {
    "birthplace": "Where was {} born?",
    "spouse": "Who is married to {}?",
    "teacher": "Who taught {}?",
    "author": "Who wrote {}?",
    "translator": "Who translated {}?",
    "setting": "Where is {} set?",
    "country": "In which country is {}?",
    "mayor": "Who is mayor of {}?",
    "founder": "Who founded {}?",
    "capital": "Which city is the capital of {}?",
    "ruler": "Who rules {}?",
    "chancellor": "Who is chancellor of {}?",
}
_NOUN_FORMS = ("Who is {}?", "What is {}?", "Name {}.")
_VERB_PATTERNS = tuple(
    (relation, re.compile(re.escape(form).replace(r"\{\}", "(.+)"))) for relation, form in _VERB_FORMS.items()
)
_NOUN_PATTERN = re.compile("|".join(re.escape(form).replace(r"\{\}", "(.+)") for form in _NOUN_FORMS))
_THE_OF = re.compile(rf"the ({'|'.join(RELATIONS)}) of (?=.)")


@dataclass(frozen=True)
class Chain:
    """What a question asks: from the page of `start`, follow each relation in turn."""

    start: str
    relations: tuple[str, ...]

    @property
    def hops(self) -> int:
        return len(self.relations)


def question_text(chain: Chain, rng: random.Random) -> str:
    """One of three wordings: "Who is the mayor of the birthplace of X?" (half of all), "Name the mayor of …."
    and the last relation as a verb ("Where was the author of X born?"), a quarter each.
    """
    *inner, last = chain.relations
    phrase = chain.start
    for relation in inner:
        phrase = f"the {relation} of {phrase}"
    wording = rng.random()
    if wording < 0.25:
        return _VERB_FORMS[last].format(phrase)
    form = "Name {}." if wording < 0.5 else "Who is {}?" if RELATIONS[last][1] == "person" else "What is {}?"
    return form.format(f"the {last} of {phrase}")


def is_arithmetic(family: str) -> bool:
    return family in ALL_FAMILIES and not ALL_FAMILIES[family].hops


@lru_cache(maxsize=1 << 14)
def parse_question(text: str) -> Chain | None:
    """The chain a question asks for, None where it is no wording of Almanac's. Knows no fact of the world."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = split_manner(" ".join(text.split()))[1]
    for relation, pattern in _VERB_PATTERNS:
        if (match := pattern.fullmatch(text)) and (chain := _parse_phrase(match[1], (relation,))):
            return chain
    if match := _NOUN_PATTERN.fullmatch(text):
        return _parse_phrase(next(group for group in match.groups() if group), ())
    return None


def _parse_phrase(phrase: str, outer: tuple[str, ...]) -> Chain | None:
    relations = list(outer)
    while match := _THE_OF.match(phrase):
        relations.append(match[1])
        phrase = phrase[match.end() :]
    kinds_fit = all(RELATIONS[inner][1] == RELATIONS[outer][0] for outer, inner in pairwise(relations))
    if not relations or not kinds_fit or not phrase[:1].isupper():
        return None
    return Chain(phrase, tuple(reversed(relations)))


def split_of(key: str) -> Split:
    """The split of a path or a problem, by its hash: a tenth each to test and validation."""
    bucket = int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big") % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def path_key(chain: Chain) -> str:
    return "|".join((chain.start, *chain.relations))


@lru_cache(maxsize=64)
def _questions(family: str, split: Split, num: int) -> tuple[Question, ...]:
    stream = _arithmetic_stream(family, split) if is_arithmetic(family) else _chain_stream(family, split)
    drawn = tuple(islice(stream, num))
    if len(drawn) < num:
        raise ConfigError(f"almanac has no more than {len(drawn)} {split} questions in {family}, {num} were asked for")
    return drawn


def questions(family: str, split: Split, num: int | None = None) -> list[Question]:
    """The first `num` questions of a family's split, 4000, 100 and 200 by default; always the same ones.

    Raises ConfigError for an unknown family or split, or more questions than there are.
    """
    if family not in ALL_FAMILIES:
        raise ConfigError(f"almanac has no family {family!r}; expected one of {', '.join(ALL_FAMILIES)}")
    if split not in NUM_QUESTIONS:
        raise ConfigError(f"almanac has no split {split!r}; expected one of {', '.join(NUM_QUESTIONS)}")
    num = NUM_QUESTIONS[split] if num is None else num
    if num < 0:
        raise ConfigError(f"the number of questions must not be negative, got {num}")
    return list(_questions(family, split, num))


def _draw_manner(rng: random.Random, family: str) -> str:
    """One of the manners or none, equally likely, in the second edition; nothing is drawn in the first."""
    return rng.choice(("", *MANNERS.values())) if family in SECOND_EDITION else ""


def _chain_stream(family: str, split: Split) -> Iterator[Question]:
    rng = random.Random(f"almanac/{SEED}/{family}/{split}")
    here = world()
    own = ALL_FAMILIES[family]
    titles = {kind: here.titles(kind) for kind in _START_KINDS}
    seen: set[str] = set()
    misses = 0
    while misses < 2000:  # in a row: as good as exhausted
        chain = _draw_chain(rng, titles, rng.choice(own.hops))
        key = path_key(chain)
        if key in seen or split_of(key) != split or not _is_sound(here, chain, own):
            misses += 1
            continue
        misses = 0
        yield Question(
            id=f"{family}/{split}/{len(seen)}",
            task=family,
            question=_draw_manner(rng, family) + question_text(chain, rng),
            answer=here.follow(chain.start, chain.relations, own.golden)[-1],
            hops=chain.hops,
        )
        seen.add(key)


def _draw_chain(rng: random.Random, titles: dict[str, list[str]], hops: int) -> Chain:
    kind = rng.choices(tuple(_START_KINDS), tuple(_START_KINDS.values()))[0]
    start = rng.choice(titles[kind])
    relations = []
    for _ in range(hops):
        relations.append(rng.choice(RELATIONS_OF[kind]))
        kind = RELATIONS[relations[-1]][1]
    return Chain(start, tuple(relations))


def _is_sound(here: World, chain: Chain, family: Family) -> bool:
    """False where a chain comes back to a title, by the pages or by the facts, or edits leave the answer as it was."""
    for corpus in (family.corpus, family.golden):
        path = here.follow(chain.start, chain.relations, corpus)
        if len(set(path)) < len(path):
            return False
    return family.golden == "original" or path[-1] != here.follow(chain.start, chain.relations)[-1]


def _draw_reading(rng: random.Random, problem: Problem) -> Problem:
    all_readings = arithmetic.readings(problem)
    return rng.choice(all_readings) if len(all_readings) > 1 else problem


def _arithmetic_stream(family: str, split: Split) -> Iterator[Question]:
    rng = random.Random(f"almanac/{SEED}/{family}/{split}")
    draw = arithmetic.draw_ambiguous_problem if family in SECOND_EDITION else arithmetic.draw_problem
    seen: set[str] = set()
    while True:
        problem = draw(rng)
        key = problem.key
        if key in seen or split_of(key) != split:
            continue
        yield Question(
            id=f"{family}/{split}/{len(seen)}",
            task=family,
            question=_draw_manner(rng, family) + arithmetic.problem_text(problem, rng),
            answer=str(_draw_reading(rng, problem).values[-1]),
            hops=len(problem.operations),
        )
        seen.add(key)
