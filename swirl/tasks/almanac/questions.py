"""Questions about the world of Almanac: a start, a chain of relations, and a few wordings of the two.

A chain is split by the hash of its path (start, relations), whatever family and wording it appears in: a path
of the test split is in no family's training questions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice, pairwise
from typing import Literal

from swirl.errors import ConfigError
from swirl.tasks.almanac import arithmetic
from swirl.tasks.almanac.arithmetic import MAX_CHARACTERS
from swirl.tasks.almanac.world import RELATIONS, RELATIONS_OF, SEED, World, world
from swirl.trajectories.record import Question

Family = Literal["bridge", "deep", "counterfactual", "mixed", "arithmetic"]
Split = Literal["train", "validation", "test"]
FAMILIES: tuple[Family, ...] = ("bridge", "deep", "counterfactual", "mixed", "arithmetic")
NUM_QUESTIONS: dict[Split, int] = {"train": 4000, "validation": 100, "test": 200}

_HOPS = {"bridge": (2,), "deep": (3, 4), "counterfactual": (2, 3), "mixed": (1, 2, 3)}
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


@lru_cache(maxsize=1 << 14)
def parse_question(text: str) -> Chain | None:
    """The chain a question asks for, None where it is no wording of Almanac's. Knows no fact of the world."""
    if len(text) > MAX_CHARACTERS:
        return None
    text = " ".join(text.split())
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


def is_edited(family: str) -> bool:
    """Whether a family is asked over the edited corpus."""
    return family == "counterfactual"


@lru_cache(maxsize=64)
def _questions(family: Family, split: Split, num: int) -> tuple[Question, ...]:
    stream = _arithmetic_stream(split) if family == "arithmetic" else _chain_stream(family, split)
    drawn = tuple(islice(stream, num))
    if len(drawn) < num:
        raise ConfigError(f"almanac has no more than {len(drawn)} {split} questions in {family}, {num} were asked for")
    return drawn


def questions(family: Family, split: Split, num: int | None = None) -> list[Question]:
    """The first `num` questions of a family's split, 4000, 100 and 200 by default; always the same ones.

    Raises ConfigError for an unknown family or split, or more questions than there are.
    """
    if family not in FAMILIES:
        raise ConfigError(f"almanac has no family {family!r}; expected one of {', '.join(FAMILIES)}")
    if split not in NUM_QUESTIONS:
        raise ConfigError(f"almanac has no split {split!r}; expected one of {', '.join(NUM_QUESTIONS)}")
    num = NUM_QUESTIONS[split] if num is None else num
    if num < 0:
        raise ConfigError(f"the number of questions must not be negative, got {num}")
    return list(_questions(family, split, num))


def _chain_stream(family: Family, split: Split) -> Iterator[Question]:
    rng = random.Random(f"almanac/{SEED}/{family}/{split}")
    here = world()
    edited = is_edited(family)
    titles = {kind: here.titles(kind) for kind in _START_KINDS}
    seen: set[str] = set()
    misses = 0
    while misses < 2000:  # in a row: as good as exhausted
        chain = _draw_chain(rng, titles, rng.choice(_HOPS[family]))
        key = path_key(chain)
        if key in seen or split_of(key) != split or not (path := _sound_path(here, chain, edited)):
            misses += 1
            continue
        misses = 0
        yield Question(
            id=f"{family}/{split}/{len(seen)}",
            task=family,
            question=question_text(chain, rng),
            answer=path[-1],
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


def _sound_path(here: World, chain: Chain, edited: bool) -> list[str] | None:
    """The titles along a chain; None where it comes back to one, or edits leave the answer as it was."""
    path = here.follow(chain.start, chain.relations, edited=edited)
    if len(set(path)) < len(path):
        return None
    if edited and path[-1] == here.follow(chain.start, chain.relations)[-1]:
        return None
    return path


def _arithmetic_stream(split: Split) -> Iterator[Question]:
    rng = random.Random(f"almanac/{SEED}/arithmetic/{split}")
    seen: set[str] = set()
    while True:
        problem = arithmetic.draw_problem(rng)
        key = problem.key
        if key in seen or split_of(key) != split:
            continue
        yield Question(
            id=f"arithmetic/{split}/{len(seen)}",
            task="arithmetic",
            question=arithmetic.problem_text(problem, rng),
            answer=str(problem.values[-1]),
            hops=len(problem.operations),
        )
        seen.add(key)
