"""Judges: one verdict on one step, given only what came before it.

A judge is any object with a `name` and `async def judge(self, item: StepToJudge) -> Judgement`.
"""

from __future__ import annotations

import msgspec

from swirl.trajectory import Question, Step, Verdict


class StepToJudge(msgspec.Struct, frozen=True, kw_only=True):
    """Action k in its state: the question, the `steps` before k with their observations, and the action's text.

    `tool` is the tool of the trajectory, "search" or "calculator". A judge of the process must not read
    `question.answer`.
    """

    question: Question
    steps: tuple[Step, ...]
    action: str
    tool: str


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A judge's word. `verdict` None: the judge failed, the step is masked and counted, never scored 0.

    `reward` is the graded score of the action in [0, 1] where the judge gives one, else None.
    """

    verdict: Verdict | None
    reason: str
    reward: float | None = None
