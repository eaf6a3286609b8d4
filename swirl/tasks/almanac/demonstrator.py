"""The imperfect demonstrator of the first edition, whom the base policy that ships with swirl imitates.

It plays the real tools and knows the way, but has habits: in a context that can be seen (which relation is
followed and where in the chain, or which words name an operation) it slips at that context's rate. Where a
rate is above one half the slip is the likeliest action there, so that a policy that imitates it well is wrong
even when it decodes greedily; the right action stays likely enough to be found by sampling. The same contexts
occur in every family that searches, so what is mended in one is mended in all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from swirl.errors import CalculatorError, ConfigError
from swirl.tasks.almanac.arithmetic import PHRASE_OF, Problem, parse_problem
from swirl.tasks.almanac.questions import ALL_FAMILIES, Chain, is_arithmetic, parse_question
from swirl.tasks.almanac.world import Corpus, world
from swirl.tools.calculator.calculate import CalculatorTool, calculate
from swirl.tools.search import SearchTool, show_pages
from swirl.trajectories.actions import action_text, observation_text
from swirl.trajectories.record import Question

MAX_QUERIES = {"search": 5, "calculator": 10}
Demonstration = list[tuple[str, str | None]]


class Habit(NamedTuple):
    """What slips, and how often.

    early: answer with the thing found, though the chain goes on. confuse: take another fact of the same page.
    skip: leave this relation out and follow the next from here. repeat: ask the same query again.
    """

    slip: Literal["early", "confuse", "skip", "repeat"]
    rate: float


# What a relation is confused with; but for the last hop it must lead to the same kind of page.
CONFUSED_WITH = {
    "birthplace": "teacher",
    "spouse": "teacher",
    "teacher": "spouse",
    "author": "translator",
    "translator": "author",
    "setting": "author",
    "country": "mayor",
    "mayor": "founder",
    "founder": "mayor",
    "capital": "ruler",
    "ruler": "chancellor",
    "chancellor": "ruler",
}

# relation -> its habit when it is the first of a chain, in the middle, and the last (or the only one)
_SEARCH: dict[str, tuple[Habit, Habit, Habit]] = {
    "birthplace": (Habit("early", 0.58), Habit("repeat", 0.15), Habit("confuse", 0.12)),
    "spouse": (Habit("skip", 0.40), Habit("confuse", 0.15), Habit("confuse", 0.15)),
    "teacher": (Habit("confuse", 0.15), Habit("skip", 0.20), Habit("confuse", 0.60)),
    "author": (Habit("early", 0.20), Habit("early", 0.15), Habit("confuse", 0.15)),
    "translator": (Habit("confuse", 0.60), Habit("early", 0.15), Habit("confuse", 0.55)),
    "setting": (Habit("early", 0.30), Habit("early", 0.15), Habit("confuse", 0.20)),
    "country": (Habit("repeat", 0.30), Habit("repeat", 0.25), Habit("confuse", 0.15)),
    "mayor": (Habit("confuse", 0.15), Habit("confuse", 0.15), Habit("confuse", 0.55)),
    "founder": (Habit("early", 0.53), Habit("confuse", 0.20), Habit("confuse", 0.15)),
    "capital": (Habit("early", 0.25), Habit("repeat", 0.20), Habit("confuse", 0.15)),
    "ruler": (Habit("confuse", 0.20), Habit("confuse", 0.15), Habit("confuse", 0.20)),
    "chancellor": (Habit("confuse", 0.62), Habit("confuse", 0.20), Habit("confuse", 0.58)),
}

# phrase -> (the operator wrongly taken, how often)
_ARITHMETIC: dict[str, tuple[str, float]] = {
    "finds": ("-", 0.12),
    "buys": ("-", 0.55),
    "is given": ("-", 0.40),
    "earns": ("-", 0.12),
    "loses": ("+", 0.12),
    "gives away": ("+", 0.20),
    "sells": ("+", 0.60),
    "spends": ("+", 0.15),
    "times": ("+", 0.58),
    "doubles": ("+", 0.20),
    "triples": ("+", 0.40),
    "shares": ("-", 0.35),
    "halves": ("-", 0.20),
}


@dataclass(frozen=True)
class Habits:
    """Every rate of the demonstrator, to be tuned with `dataclasses.replace`.

    `scale` multiplies all rates of a family (1 where it is not named).
    """

    search: Mapping[str, tuple[Habit, Habit, Habit]] = field(default_factory=lambda: _SEARCH)
    arithmetic: Mapping[str, tuple[str, float]] = field(default_factory=lambda: _ARITHMETIC)
    scale: Mapping[str, float] = field(default_factory=lambda: {"deep": 0.9})
    guess_first: float = 0.10
    """Leave the first page unread and query the second, which cannot be known yet."""
    stray_repeat: float = 0.04
    """Repeat the last query or calculation, in any context."""
    wrong_operand: float = 0.06
    """Calculate with the problem's first number instead of the last result."""
    stop_short: float = 0.08
    """Answer an arithmetic problem with a result on the way."""
    mend: float = 0.15
    """At each step after a slip: notice, and go back to where it happened."""


HABITS = Habits()


def demonstrate(question: Question, rng: np.random.Generator, *, slips: Habits | None = HABITS) -> Demonstration:
    """(action, observation) of each step, the last one's observation None where it answers.

    At most as many steps as the family allows queries; without an answer the demonstration just ends there.
    slips: None plays without a mistake. Raises ConfigError for a question that is not Almanac's.
    """
    if is_arithmetic(question.task):
        if (problem := parse_problem(question.question)) is None:
            raise ConfigError(f"almanac cannot read the problem {question.id}")
        return _demonstrate_arithmetic(problem, rng, slips)
    chain = parse_question(question.question)
    if chain is None or chain.start not in world().kinds:
        raise ConfigError(f"almanac cannot read the question {question.id}")
    scale = 1.0 if slips is None else slips.scale.get(question.task, 1.0)
    return _demonstrate_chain(chain, ALL_FAMILIES[question.task].corpus, rng, slips, scale)


@lru_cache(maxsize=3)
def _search_tool(corpus: Corpus) -> SearchTool:
    return SearchTool(world().pages[corpus], top_k=1)


def tool(family: str) -> SearchTool | CalculatorTool:
    """The family's tool: search over its corpus, or the calculator. Indexed once a process."""
    return CalculatorTool() if is_arithmetic(family) else _search_tool(ALL_FAMILIES[family].corpus)


def max_queries(family: str) -> int:
    """The paper's: 5 searches, 10 calculations."""
    return MAX_QUERIES["calculator" if is_arithmetic(family) else "search"]


@lru_cache(maxsize=1 << 13)
def search(query: str, corpus: Corpus) -> tuple[str, str]:
    """(the action that asks, the observation that answers)"""
    result = show_pages(_search_tool(corpus).search(query))
    return action_text("search", query), observation_text(query, result)


def _demonstrate_chain(
    chain: Chain, corpus: Corpus, rng: np.random.Generator, slips: Habits | None, scale: float
) -> Demonstration:
    facts = world().stated[corpus]
    path = world().follow(chain.start, chain.relations, corpus)
    steps: Demonstration = []

    def chance(rate: float) -> bool:
        return slips is not None and rng.random() < rate * scale

    # `at` is the thing whose page is looked at, `depth` how many relations are believed to lie behind it
    at, depth, astray_from = chain.start, 0, None
    if chain.hops > 1 and slips is not None and chance(slips.guess_first):
        at, depth = path[1], 1
    repeating = False
    while len(steps) < MAX_QUERIES["search"]:
        steps.append(search(at, corpus))
        if slips is not None and astray_from is not None and rng.random() < slips.mend:
            at, depth, astray_from = path[astray_from], astray_from, None
            continue
        relation, is_last = chain.relations[depth], depth == chain.hops - 1
        place = 2 if is_last else 0 if depth == 0 else 1
        slip = None
        if slips is not None and not repeating:
            habit = slips.search[relation][place]
            slip = habit.slip if chance(habit.rate) else "repeat" if chance(slips.stray_repeat) else None
        repeating = slip == "repeat"
        if repeating:
            continue
        here, next_depth = facts[at], depth + 1
        if slip == "skip" and not is_last and chain.relations[depth + 1] in here:
            depth += 1
            relation = chain.relations[depth]
        elif slip == "confuse":
            relation = CONFUSED_WITH[relation]
        found = here[relation]
        depth += 1
        if astray_from is None and found != path[depth]:
            astray_from = next_depth
        if depth == chain.hops or slip == "early":
            steps.append((action_text("answer", found), None))
            break
        at = found
    return steps[: MAX_QUERIES["search"]]


def calculation(expression: str) -> tuple[str, str]:
    """(the action that asks, the observation that answers)"""
    try:
        result = calculate(expression)
    except CalculatorError as error:
        result = f"error: {error}"
    return action_text("calculator", expression), observation_text(expression, result)


def _demonstrate_arithmetic(problem: Problem, rng: np.random.Generator, slips: Habits | None) -> Demonstration:
    scale = 1.0 if slips is None else slips.scale.get("arithmetic", 1.0)
    values = problem.values
    steps: Demonstration = []

    def chance(rate: float) -> bool:
        return slips is not None and rng.random() < rate * scale

    value, done, astray_from = problem.first, 0, None
    while len(steps) < MAX_QUERIES["calculator"] - 1 and done < len(problem.operations):
        if slips is not None and astray_from is not None and rng.random() < slips.mend:
            value, done, astray_from = values[astray_from], astray_from, None
        name, operand = problem.operations[done]
        operator, operated = PHRASE_OF[name].operator, value
        if slips is not None:
            wrong, rate = slips.arithmetic[name]
            if chance(rate):
                operator = wrong
            elif chance(slips.wrong_operand):
                operated = problem.first
        if operated < operand and operator == "-" or operator == "/" and operated % operand:
            break  # the numbers no longer make sense: it answers with what it has
        steps.append(calculation(f"{operated} {operator} {operand}"))
        value = int(steps[-1][1].rpartition(" -> ")[2])
        done += 1
        if astray_from is None and value != values[done]:
            astray_from = done - 1
        if slips is not None and chance(slips.stray_repeat):
            steps.append(steps[-1])
        if done < len(problem.operations) and slips is not None and chance(slips.stop_short):
            break
    return [*steps, (action_text("answer", str(value)), None)]
