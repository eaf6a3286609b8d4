"""The world of Almanac: invented people, works, cities and countries, one short page each.

Everything is drawn from a seed when first asked for and kept in memory; nothing is stored on disk.
There are three corpora over the same titles. `original` states the facts. `edited` states another world's, which
differs in about half of them, so that a policy that recalls instead of reading is wrong (after CofCA's counterfactual
passages). `stale` has fallen behind the facts in about one of six, so that sound reading can lead to a wrong answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from swirl.tools.search import Page

SEED = 2504
EDITED_SHARE = 0.5
STALE_SHARE = 0.18
Corpus = Literal["original", "edited", "stale"]
KINDS = ("person", "work", "city", "country")
NUM_TITLES = {"person": 1100, "work": 450, "city": 300, "country": 40}

# relation -> (kind of page that states it, kind of its value). Every page states exactly three.
RELATIONS: dict[str, tuple[str, str]] = {
    "birthplace": ("person", "city"),
    "spouse": ("person", "person"),
    "teacher": ("person", "person"),
    "author": ("work", "person"),
    "translator": ("work", "person"),
    "setting": ("work", "city"),
    "country": ("city", "country"),
    "mayor": ("city", "person"),
    "founder": ("city", "person"),
    "capital": ("country", "city"),
    "ruler": ("country", "person"),
    "chancellor": ("country", "person"),
}
RELATIONS_OF = {kind: tuple(r for r, (subject, _) in RELATIONS.items() if subject == kind) for kind in KINDS}

# Names are one first and one last syllable, so that a small BPE spells any of them in few tokens,
# and no two names share a word: BM25 finds a page by its title.
_FIRST = (
    "Bal Bar Bel Ber Bor Bri Cal Cas Cor Dal Dar Del Dor Dra Dun Eld Elm Fal Far Fen Fin Gal Gar Gel Gor Gra "
    "Hal Har Hel Hol Jar Jor Kal Kar Kel Ken Kir Kor Lan Lar Lem Lin Lor Lun Mal Mar Mel Mer Mir Mor Nal Nar "
    "Nel Nor Oba Oth Pal Par Pel Per Pol Ral Ran Rel Ros Sal San Sel Ser Sor Tal Tan Tel Tor Tru Val Van Vel "
    "Ver Vor Wal Wen Wil Yar Yel Zan Zar Zel Zor"
).split()
_LAST = (
    "bek bin bra dak den dis dov dus fay fen gan gil gon gus hak hin jas jin kab kas kin kos lam len lis lok "
    "lun mas mek min mos mur nak nel nis nok num pak pel pin pos rak rel ren rik ros ruk sal sek sin sok sul "
    "tak tem tis tok tuk vak vel vin vos vuk wen wik yan yel yor zak zel zim zon zur"
).split()
_CITY_END = (
    "ford ton burg haven wick mouth gate field bridge dale hurst stead holm minster port crest moor vale"
).split()
_COUNTRY_END = "onia land mark istan ovia aria heim esia".split()
_ADJECTIVES = (
    "Silent Golden Broken Hidden Distant Frozen Crimson Empty Burning Sleeping Lonely Ancient Bitter Hollow "
    "Wandering Painted Secret Stolen Northern Fallen Gentle Iron Pale Restless"
).split()
_NOUNS = (
    "Harbor Tower Garden River Mirror Forest Bell Crown Lantern Mountain Ship Road Window Orchard Island "
    "Clock Raven Shadow Temple Letter Feast Storm Anchor Candle"
).split()
_PEOPLE = "painter sailor weaver poet baker judge healer mason singer farmer hunter scribe".split()
_WORKS = "novel play ballad opera chronicle".split()
_CITIES = "city town port".split()
_COUNTRIES = "kingdom republic duchy".split()

_TITLE = r"[A-Z][A-Za-z'-]{0,30}(?: [A-Z][A-Za-z'-]{0,30}){0,5}"  # bounded, so that no text takes long
_INTRODUCTION_OR_FACT = re.compile(
    rf"(?P<title>{_TITLE}): An? [a-z]{{1,30}}\."
    rf"|\b(?:Her|His|Its) (?P<relation>{'|'.join(RELATIONS)}) is (?P<value>{_TITLE})\."
)


def names(value: str) -> str:
    """The form in which titles are compared: lower case, white space collapsed."""
    return " ".join(value.lower().split())


@dataclass(frozen=True)
class World:
    """Titles with their kind, and what each corpus states: title -> relation -> title, and the pages."""

    kinds: Mapping[str, str]
    stated: Mapping[Corpus, Mapping[str, Mapping[str, str]]]
    pages: Mapping[Corpus, tuple[Page, ...]]

    def follow(self, start: str, relations: tuple[str, ...], corpus: Corpus = "original") -> list[str]:
        """The len(relations) + 1 titles along the chain, `start` first. Raises KeyError where it breaks."""
        facts = self.stated[corpus]
        path = [start]
        for relation in relations:
            path.append(facts[path[-1]][relation])
        return path

    def titles(self, kind: str) -> list[str]:
        return [title for title, k in self.kinds.items() if k == kind]


@lru_cache(maxsize=4)
def world(seed: int = SEED) -> World:
    """Draw the world of a seed: about 1,900 pages, in well under a second."""
    rng = random.Random(f"almanac/{seed}")
    titles = _draw_titles(rng)
    kinds = {title: kind for kind in KINDS for title in titles[kind]}
    facts = _draw_facts(rng, titles)
    edited_facts = _edit(rng, titles, facts, EDITED_SHARE)
    frames = {title: _draw_frame(rng, kind) for title, kind in kinds.items()}
    stale_facts = _edit(random.Random(f"almanac/{seed}/stale"), titles, facts, STALE_SHARE)
    stated = {"original": facts, "edited": edited_facts, "stale": stale_facts}
    pages = {
        corpus: tuple(_page(title, frames[title], own[title]) for title in kinds) for corpus, own in stated.items()
    }
    return World(kinds=kinds, stated=stated, pages=pages)


def _draw_titles(rng: random.Random) -> dict[str, list[str]]:
    words = [first + last for first in _FIRST for last in _LAST]
    num_people = NUM_TITLES["person"]
    drawn = rng.sample(words, 2 * num_people)
    cities = [first + end for first in _FIRST for end in _CITY_END]
    countries = [first + end for first in _FIRST for end in _COUNTRY_END]
    works = [f"The {adjective} {noun}" for adjective in _ADJECTIVES for noun in _NOUNS]
    return {
        "person": [f"{a} {b}" for a, b in zip(drawn[:num_people], drawn[num_people:], strict=True)],
        "work": rng.sample(works, NUM_TITLES["work"]),
        "city": rng.sample(cities, NUM_TITLES["city"]),
        "country": rng.sample(countries, NUM_TITLES["country"]),
    }


def _draw_facts(rng: random.Random, titles: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    facts: dict[str, dict[str, str]] = {title: {} for kind in KINDS for title in titles[kind]}
    couples = rng.sample(titles["person"], len(titles["person"]))
    for a, b in zip(couples[::2], couples[1::2], strict=True):
        facts[a]["spouse"], facts[b]["spouse"] = b, a
    for relation, (subject_kind, value_kind) in RELATIONS.items():
        if relation == "spouse":
            continue
        for title in titles[subject_kind]:
            taken = {title, *facts[title].values()}  # the values on one page differ, so a wrong pick is wrong
            value = rng.choice(titles[value_kind])
            while value in taken:
                value = rng.choice(titles[value_kind])
            facts[title][relation] = value
    return facts


def _edit(
    rng: random.Random, titles: dict[str, list[str]], facts: dict[str, dict[str, str]], share: float
) -> dict[str, dict[str, str]]:
    """Move the values of that share of a relation's subjects around among them; couples are re-paired whole."""
    edited = {title: dict(own) for title, own in facts.items()}

    def clashes(title: str, relation: str, value: str) -> bool:
        return value == title or value in (v for r, v in edited[title].items() if r != relation)

    for relation, (subject_kind, _) in RELATIONS.items():
        both_ways = relation == "spouse"
        subjects = titles[subject_kind]
        if both_ways:
            subjects = [a for a in subjects if a < facts[a][relation]]
        while True:  # one shuffle in a few puts a value on a page that holds it already
            chosen = rng.sample(subjects, int(share * len(subjects)))
            values = [facts[title][relation] for title in chosen]
            moved = list(zip(chosen, values[1:] + values[:1], strict=True))
            pairs = moved + [(b, a) for a, b in moved] if both_ways else moved
            if not any(clashes(title, relation, value) for title, value in pairs):
                break
        for title, value in pairs:
            edited[title][relation] = value
    return edited


def _draw_frame(rng: random.Random, kind: str) -> tuple[str, str, tuple[str, ...]]:
    """What a page says besides its values: noun, possessive, order of its facts."""
    noun = rng.choice({"person": _PEOPLE, "work": _WORKS, "city": _CITIES, "country": _COUNTRIES}[kind])
    possessive = rng.choice(("Her", "His")) if kind == "person" else "Its"
    return noun, possessive, tuple(rng.sample(RELATIONS_OF[kind], 3))


def _page(title: str, frame: tuple[str, str, tuple[str, ...]], facts: Mapping[str, str]) -> Page:
    """The search tool shows a page as `title: text`, so the text need not say the title again."""
    noun, possessive, relations = frame
    sentences = [f"{possessive} {relation} is {facts[relation]}." for relation in relations]
    return Page(title=title, text=" ".join([f"{'An' if noun[0] in 'aeiou' else 'A'} {noun}.", *sentences]))


@lru_cache(maxsize=1 << 14)
def read_facts(text: str) -> tuple[tuple[str, str, str], ...]:
    """(subject, relation, value) of every fact a result states, subjects as `names` gives them.

    A fact belongs to the last page opened before it ("X: A painter. Her spouse is Y."). Any text may be
    given; what is no fact is passed over.
    """
    found = []
    subject = None
    for match in _INTRODUCTION_OR_FACT.finditer(text):
        if match["title"]:
            subject = names(match["title"])
        elif subject:
            found.append((subject, match["relation"], match["value"]))
    return tuple(found)
