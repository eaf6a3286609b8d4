"""Word problems of two to four operations on a running number (after GSM8K), and their parser.

    Mira has 12 coins. Mira finds 7 more, then gives away 4. Mira doubles them. How many coins are there now?

Every number is an integer from 0 to 9,999; every division is exact. One phrase, "gets 3 times more", has two readings
(three or four times as many): a problem that holds it has a golden answer by one of them, and no text says which.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from swirl.tasks.almanac.manners import split_manner

Operator = Literal["+", "-", "*", "/"]


@dataclass(frozen=True)
class Phrase:
    """A wording of an operation. `text` holds `{n}` where the operand is said, else it is the word's own."""

    name: str
    operator: Operator
    text: str
    operand: int | None = None


PHRASES: tuple[Phrase, ...] = (
    Phrase("finds", "+", "finds {n} more"),
    Phrase("buys", "+", "buys {n}"),
    Phrase("is given", "+", "is given {n}"),
    Phrase("earns", "+", "earns {n}"),
    Phrase("loses", "-", "loses {n}"),
    Phrase("gives away", "-", "gives away {n}"),
    Phrase("sells", "-", "sells {n}"),
    Phrase("spends", "-", "spends {n}"),
    Phrase("times", "*", "gets {n} times as many"),
    Phrase("doubles", "*", "doubles them", 2),
    Phrase("triples", "*", "triples them", 3),
    Phrase("shares", "/", "keeps one of {n} equal shares"),
    Phrase("halves", "/", "keeps only half", 2),
)
AMBIGUOUS = Phrase("times more", "*", "gets {n} times more")
PHRASE_OF = {phrase.name: phrase for phrase in (*PHRASES, AMBIGUOUS)}

_ITEMS = "coins apples books stones shells beads stamps eggs nails cups keys maps".split()
_NAMES = "Mira Tomas Lena Pavel Ines Bruno Clara Felix Nora Oscar Ruth Hugo".split()
_STARTS = (
    "{name} has {n} {items}.",
    "{name} starts with {n} {items}.",
    "There are {n} {items} in the box of {name}.",
)
_ENDS = (
    "How many {items} are there now?",
    "How many {items} does {name} have now?",
    "What is the number of {items}?",
)
_MAX_VALUE = 9999
MAX_CHARACTERS = 1000  # a longer question is not Almanac's, and is not read


@dataclass(frozen=True)
class Problem:
    """A first number, then (phrase name, operand) in order; `values` are all running numbers."""

    first: int
    operations: tuple[tuple[str, int], ...]

    @property
    def values(self) -> tuple[int, ...]:
        values = [self.first]
        for name, operand in self.operations:
            values.append(_apply(PHRASE_OF[name].operator, values[-1], operand))
        return tuple(values)

    @property
    def key(self) -> str:
        """The numbers and operators alone: problems that differ in words only are the same problem."""
        return str(self.first) + "".join(f" {PHRASE_OF[name].operator} {operand}" for name, operand in self.operations)


def _apply(operator: Operator, value: int, operand: int) -> int:
    match operator:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case "*":
            return value * operand
        case "/":
            return value // operand


def readings(problem: Problem) -> tuple[Problem, ...]:
    """Every sound reading of a problem as it is worded, its own first: more than one where it is ambiguous."""
    found = [problem]
    for index, (name, operand) in enumerate(problem.operations):
        if name == AMBIGUOUS.name:
            for read in tuple(found):
                operations = (*read.operations[:index], (name, operand + 1), *read.operations[index + 1 :])
                found.append(Problem(problem.first, operations))
    return tuple(read for read in found if _is_exact(read))


def draw_ambiguous_problem(rng: random.Random) -> Problem:
    """As `draw_problem`, with phrases that can be read two ways; every reading of all of them is a sound problem."""
    while True:
        problem = draw_problem(rng, (*PHRASES, *[AMBIGUOUS] * 4))
        all_values = [read.values for read in readings(problem)]
        count = 2 ** sum(name == AMBIGUOUS.name for name, _ in problem.operations)
        distinct = all(len(set(values)) == len(values) and 0 < min(values) for values in all_values)
        if len(all_values) == count and distinct and max(map(max, all_values)) <= _MAX_VALUE:
            return problem


def draw_problem(rng: random.Random, phrases: tuple[Phrase, ...] = PHRASES) -> Problem:
    """Two to four operations, mostly on numbers of one or two digits; no running number comes twice."""
    while True:
        first = value = rng.randint(2, 60)
        values = [first]
        operations = []
        for phrase in rng.choices(phrases, k=rng.choice((2, 3, 4))):
            operand = phrase.operand or _draw_operand(rng, phrase.operator, value)
            if operand is None or (phrase.operator == "/" and value % operand):
                break
            value = _apply(phrase.operator, value, operand)
            if not 0 < value <= _MAX_VALUE or value in values:
                break
            values.append(value)
            operations.append((phrase.name, operand))
        else:
            return Problem(first, tuple(operations))


def _draw_operand(rng: random.Random, operator: Operator, value: int) -> int | None:
    match operator:
        case "+":
            return rng.randint(2, 40)
        case "-":
            return rng.randint(1, min(value - 1, 60)) if value > 1 else None
        case "*":
            return rng.randint(2, 6)
        case "/":
            divisors = [d for d in range(2, 10) if value % d == 0]
            return rng.choice(divisors) if divisors else None


def problem_text(problem: Problem, rng: random.Random) -> str:
    """Word a problem: one sentence an operation, or two joined by "then"."""
    name, items = rng.choice(_NAMES), rng.choice(_ITEMS)
    said = [PHRASE_OF[phrase].text.format(n=operand) for phrase, operand in problem.operations]
    sentences = [rng.choice(_STARTS).format(name=name, n=problem.first, items=items)]
    while said:
        count = 2 if len(said) > 1 and rng.random() < 0.4 else 1
        sentences.append(f"{name} {', then '.join(said[:count])}.")
        said = said[count:]
    sentences.append(rng.choice(_ENDS).format(name=name, items=items))
    return " ".join(sentences)


def _pattern(form: str) -> str:
    pattern = re.escape(form)
    for field, group in (("name", "[A-Z][a-z]+"), ("items", "[a-z]+"), ("n", r"(\d{1,4})")):
        pattern = pattern.replace(re.escape(f"{{{field}}}"), group)
    return pattern


_START_PATTERN = re.compile("|".join(map(_pattern, _STARTS)))
_END_PATTERN = re.compile("|".join(map(_pattern, _ENDS)))
_SENTENCE_PATTERN = re.compile(r"[A-Z][a-z]+ ([a-z0-9 ,]+)\.")
_PHRASE_PATTERNS = tuple((phrase, re.compile(_pattern(phrase.text))) for phrase in PHRASE_OF.values())


@lru_cache(maxsize=1 << 14)
def parse_problem(text: str) -> Problem | None:
    """The problem a text words, None where it is not one of Almanac's wordings."""
    if len(text) > MAX_CHARACTERS:
        return None
    sentences = re.findall(r"[^.?]+[.?]", split_manner(" ".join(text.split()))[1])
    if len(sentences) < 3:
        return None
    start, *middle, end = (sentence.strip() for sentence in sentences)
    opened = _START_PATTERN.fullmatch(start)
    if opened is None or _END_PATTERN.fullmatch(end) is None:
        return None
    operations: list[tuple[str, int]] = []
    for sentence in middle:
        match = _SENTENCE_PATTERN.fullmatch(sentence)
        if match is None:
            return None
        for part in match[1].split(", then "):
            operation = _parse_phrase(part)
            if operation is None:
                return None
            operations.append(operation)
    if len(operations) > 8:
        return None
    problem = Problem(int(next(group for group in opened.groups() if group)), tuple(operations))
    return problem if _is_exact(problem) else None


def _parse_phrase(text: str) -> tuple[str, int] | None:
    for phrase, pattern in _PHRASE_PATTERNS:
        if match := pattern.fullmatch(text):
            return phrase.name, phrase.operand or int(match[1])
    return None


def _is_exact(problem: Problem) -> bool:
    """False where a step divides by zero or leaves a remainder: then the running numbers mean nothing."""
    value = problem.first
    for name, operand in problem.operations:
        operator = PHRASE_OF[name].operator
        if operator == "/" and (operand == 0 or value % operand):
            return False
        value = _apply(operator, value, operand)
    return True
