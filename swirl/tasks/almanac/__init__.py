"""Almanac: an invented encyclopedia and five families of questions about it, for runs without a network.

bridge          two hops                  after HotPotQA
deep            three and four hops       after MuSiQue
counterfactual  two and three hops over pages edited against the world the base policy saw, after CofCA
mixed           one, two and three hops   after BeerQA
arithmetic      word problems of two to four operations, with the calculator, after GSM8K
"""

from __future__ import annotations

from swirl.tasks.almanac.demonstrator import HABITS, Habit, Habits, demonstrate, max_queries, tool
from swirl.tasks.almanac.judge import RuleJudge
from swirl.tasks.almanac.questions import FAMILIES, is_edited, questions
from swirl.tasks.almanac.world import World, world
from swirl.tasks.scoring import exact_match, f1, same_number
from swirl.tools.search import Page
from swirl.trajectories.record import Question

__all__ = [
    "FAMILIES",
    "HABITS",
    "Habit",
    "Habits",
    "RuleJudge",
    "World",
    "demonstrate",
    "max_queries",
    "pages",
    "questions",
    "score",
    "tool",
    "world",
]


def pages(family: str) -> list[Page]:
    """The corpus a family searches: the edited pages for `counterfactual`, else the original ones."""
    return list(world().edited_pages if is_edited(family) else world().pages)


def score(question: Question, prediction: str) -> dict[str, float]:
    """{"em", "f1"} by the official rule of HotPotQA; numbers are compared as numbers."""
    golden = question.answer or ""
    if question.task == "arithmetic":
        right = float(same_number(prediction, golden))
        return {"em": right, "f1": right}
    return {"em": exact_match(prediction, golden), "f1": f1(prediction, golden)}
