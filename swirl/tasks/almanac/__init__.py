"""Almanac: an invented encyclopedia and families of questions about it, for runs without a network.

bridge          two hops                  after HotPotQA
deep            three and four hops       after MuSiQue
counterfactual  two and three hops over pages edited against the world the base policy saw, after CofCA
mixed           one, two and three hops   after BeerQA
arithmetic      word problems of two to four operations, with the calculator, after GSM8K

These five are the first edition: the pages are right, and the base that ships with swirl slips by the relation or the
phrase at hand, which no other tool knows. The second edition, bridge-2 and so on, is less kind (questions.py), and its
bases slip by habits that both tools share (shared_habits.py).

The bases are shown bridge, deep, mixed and arithmetic, never counterfactual. So from bridge to deep is longer chains of
relations that training has asked for, not another skill; from search to arithmetic is another tool.
"""

from __future__ import annotations

from swirl.tasks.almanac.demonstrator import HABITS, Habit, Habits, demonstrate, max_queries, tool
from swirl.tasks.almanac.judge import RuleJudge
from swirl.tasks.almanac.questions import ALL_FAMILIES, FAMILIES, SECOND_EDITION, is_arithmetic, questions
from swirl.tasks.almanac.shared_habits import SHARED_HABITS, SharedHabits, demonstrate_shared
from swirl.tasks.almanac.weak_judges import LenientJudge, NoisyJudge, open_judge
from swirl.tasks.almanac.world import World, world
from swirl.tasks.scoring import exact_match, f1, same_number
from swirl.tools.search import Page
from swirl.trajectories.record import Question

__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "HABITS",
    "SECOND_EDITION",
    "SHARED_HABITS",
    "Habit",
    "Habits",
    "LenientJudge",
    "NoisyJudge",
    "RuleJudge",
    "SharedHabits",
    "World",
    "demonstrate",
    "demonstrate_shared",
    "max_queries",
    "open_judge",
    "pages",
    "questions",
    "score",
    "tool",
    "world",
]


def pages(family: str) -> list[Page]:
    """The corpus a family searches."""
    return list(world().pages[ALL_FAMILIES[family].corpus])


def score(question: Question, prediction: str) -> dict[str, float]:
    """{"em", "f1"} by the official rule of HotPotQA; numbers are compared as numbers."""
    golden = question.answer or ""
    if is_arithmetic(question.task):
        right = float(same_number(prediction, golden))
        return {"em": right, "f1": right}
    return {"em": exact_match(prediction, golden), "f1": f1(prediction, golden)}
