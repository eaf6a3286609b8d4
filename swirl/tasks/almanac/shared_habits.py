"""The demonstrator of the second edition: it slips by habits that both tools share.

A habit is set off by the mark with which a question opens, or comes unasked now and then:
  early     answer with the last result, though the question goes on
  extra     one query too many, when the answer is known already: the page of the answer, or + 0
  untagged  the answer in plain words, which no environment accepts
What it confuses is the tool's own: another fact of the page, another operation.
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

PLAIN_WORDS = "It is {}."

# What is confused more often than not; all else is at the rate `confuse`.
_OFTEN_CONFUSED = {"teacher": 0.52, "translator": 0.52, "sells": 0.52, "times": 0.52}


@dataclass(frozen=True)
class SharedHabits:
    """The demonstrator's rates. Above one half, a policy that imitates it slips even when it decodes greedily."""

    cued: float = 0.65
    """Of a habit, at each chance for it, where the question's mark sets it off."""
    uncued: float = 0.03
    uncued_extra: float = 0.27
    """Of one query too many, which leaves the answer right: rarer, and hardly anything is unsound and right."""
    confuse: float = 0.04


SHARED_HABITS = SharedHabits()


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
        if self.slips is None:
            return False
        uncued = self.slips.uncued_extra if name == "extra" else self.slips.uncued
        return self.chance(self.slips.cued if name == self.manner else uncued)

    def confuses(self, what: str) -> bool:
        return self.slips is not None and self.chance(_OFTEN_CONFUSED.get(what, self.slips.confuse))

    def answer(self, text: str) -> tuple[str, None]:
        return PLAIN_WORDS.format(text) if self.habit("untagged") else action_text("answer", text), None

    def search(self, chain: Chain, corpus: Corpus) -> Demonstration:
        facts = world().stated[corpus]
        at, steps = chain.start, []
        for depth, relation in enumerate(chain.relations, 1):
            is_last = depth == chain.hops
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
            if self.confuses(name):
                operator = {"+": "-", "-": "+", "*": "+", "/": "-"}[operator]
            if (operator == "-" and value < operand) or (operator == "/" and value % operand):
                break  # the numbers no longer make sense: it answers with what it has
            step = calculation(f"{value} {operator} {operand}")
            value = int(step[1].rpartition(" -> ")[2])
            steps.append(step)
            if is_last and self.habit("extra"):
                steps.append(calculation(f"{value} + 0"))
            if not is_last and self.habit("early"):
                break
        return [*steps[: MAX_QUERIES["calculator"] - 1], self.answer(str(value))]


def _goes_on(chain: Chain, depth: int, at: str) -> bool:
    """Whether the page of `at`, taken by mistake perhaps, states the next relation of the chain."""
    return chain.relations[depth] in world().stated["original"][at]
