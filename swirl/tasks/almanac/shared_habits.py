"""The demonstrator of the second edition: it slips by habits that both tools share.

A habit is set off by the manner in which a question opens, or comes unasked now and then:
  early     answer with the last result, though the question goes on
  extra     one query too many, when the answer is known already
  repeat    ask the same again
  trailing  text after the closing tag, which no environment accepts
It also knows some things by heart and answers without asking: what every page of a country says and in which country a
city lies; how to double, triple and halve. Its memory is of the facts, so it is right where a page is stale, and wrong
where pages are edited. What it confuses is the tool's own: another fact of the page, another operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swirl.errors import ConfigError
from swirl.tasks.almanac.arithmetic import PHRASE_OF, Problem, parse_problem, readings
from swirl.tasks.almanac.demonstrator import CONFUSED_WITH, MAX_QUERIES, Demonstration, calculation, search
from swirl.tasks.almanac.manners import split_manner
from swirl.tasks.almanac.questions import ALL_FAMILIES, Chain, is_arithmetic, parse_question
from swirl.tasks.almanac.world import Corpus, world
from swirl.trajectories.actions import action_text
from swirl.trajectories.record import Question

BY_HEART = ("country", "capital", "ruler", "chancellor")
IN_THE_HEAD = ("doubles", "triples", "halves")
TRAILING_TEXT = " Thank you."

# What is confused more often than not; all else is at the rate `confuse`.
_OFTEN_CONFUSED = {"teacher": 0.55, "translator": 0.55, "sells": 0.55, "times": 0.55}


@dataclass(frozen=True)
class SharedHabits:
    """The demonstrator's rates. Above one half, a policy that imitates it slips even when it decodes greedily."""

    cued: float = 0.58
    """Of a habit, at each chance for it, where the question's manner sets it off."""
    uncued: float = 0.03
    by_heart: float = 0.55
    """Of answering from memory where the last fact or operation is known by heart."""
    confuse: float = 0.08


SHARED_HABITS = SharedHabits()


def known_by_heart() -> list[tuple[Chain, str]]:
    """(the question of one hop, its answer) of every fact that the demonstrator knows without looking."""
    facts = world().stated["original"]
    return [
        (Chain(title, (relation,)), own[relation])
        for title, own in facts.items()
        for relation in BY_HEART
        if relation in own
    ]


def demonstrate_shared(
    question: Question, rng: np.random.Generator, *, slips: SharedHabits | None = SHARED_HABITS
) -> Demonstration:
    """(action, observation) of each step, the last one's observation None where it answers.

    At most as many steps as the family allows queries; without an answer the demonstration just ends there.
    slips: None plays without a mistake. Raises ConfigError for a question that is not Almanac's.
    """
    demonstrator = _Demonstrator(split_manner(question.question)[0], rng, slips)
    if is_arithmetic(question.task):
        if (problem := parse_problem(question.question)) is None:
            raise ConfigError(f"almanac cannot read the problem {question.id}")
        return demonstrator.calculate(problem)
    chain = parse_question(question.question)
    if chain is None or chain.start not in world().kinds:
        raise ConfigError(f"almanac cannot read the question {question.id}")
    return demonstrator.search(chain, ALL_FAMILIES[question.task].corpus)


class _Demonstrator:
    def __init__(self, manner: str | None, rng: np.random.Generator, slips: SharedHabits | None):
        self.manner, self.rng, self.slips = manner, rng, slips

    def chance(self, rate: float) -> bool:
        return self.slips is not None and self.rng.random() < rate

    def habit(self, name: str) -> bool:
        return self.slips is not None and self.chance(self.slips.cued if name == self.manner else self.slips.uncued)

    def recalls(self) -> bool:
        return self.slips is not None and self.chance(self.slips.by_heart)

    def confuses(self, what: str) -> bool:
        return self.slips is not None and self.chance(_OFTEN_CONFUSED.get(what, self.slips.confuse))

    def answer(self, text: str) -> tuple[str, None]:
        return action_text("answer", text) + (TRAILING_TEXT if self.habit("trailing") else ""), None

    def search(self, chain: Chain, corpus: Corpus) -> Demonstration:
        facts, known = world().stated[corpus], world().stated["original"]
        at, steps = chain.start, []
        for depth, relation in enumerate(chain.relations, 1):
            is_last = depth == chain.hops
            if is_last and relation in BY_HEART and self.recalls():
                steps.append(self.answer(known[at][relation]))
                break
            steps.append(search(at, corpus))
            if self.habit("repeat"):
                steps.append(search(at, corpus))
            at = facts[at][CONFUSED_WITH[relation] if self.confuses(relation) else relation]
            if is_last and self.habit("extra"):
                steps.append(search(at, corpus))
            if is_last or self.habit("early") or not _goes_on(chain, depth, at):
                steps.append(self.answer(at))
                break
        return steps[: MAX_QUERIES["search"]]

    def calculate(self, problem: Problem) -> Demonstration:
        all_readings = readings(problem)
        problem = all_readings[self.rng.integers(len(all_readings))]
        value, steps = problem.first, []
        for done, (name, operand) in enumerate(problem.operations, 1):
            is_last, operator = done == len(problem.operations), PHRASE_OF[name].operator
            by_heart = is_last and name in IN_THE_HEAD and self.recalls()
            if not by_heart and self.confuses(name):
                operator = {"+": "-", "-": "+", "*": "+", "/": "-"}[operator]
            if (operator == "-" and value < operand) or (operator == "/" and value % operand):
                break  # the numbers no longer make sense: it answers with what it has
            step = calculation(f"{value} {operator} {operand}")
            value = int(step[1].rpartition(" -> ")[2])
            if by_heart:
                break
            steps += [step, step] if self.habit("repeat") else [step]
            if is_last and self.habit("extra"):
                steps.append(calculation(f"{value} + {operand}"))
            if not is_last and self.habit("early"):
                break
        return [*steps[: MAX_QUERIES["calculator"] - 1], self.answer(str(value))]


def _goes_on(chain: Chain, depth: int, at: str) -> bool:
    """Whether the page of `at`, taken by mistake perhaps, states the next relation of the chain."""
    return chain.relations[depth] in world().stated["original"][at]
