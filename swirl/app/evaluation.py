"""A policy's answers to questions, with verdicts: what evaluation scores, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from swirl.judging.filtering import judge_steps, with_outcome
from swirl.rollout.rollout import RolloutSpec, Unanswered, collect
from swirl.rollout.task import Task
from swirl.trajectories.record import Question, Trajectory


def generation_steps(task: Task) -> int:
    """Steps of a generated trajectory: as many as the paper allows queries, the last of which may be the answer."""
    return task.max_queries


def evaluation_steps(task: Task) -> int:
    """Steps of an evaluated trajectory: all the queries that the prompt allows, and the answer."""
    return task.max_queries + 1


async def answer(
    questions: Sequence[Question],
    spec: RolloutSpec,
    *,
    samples: int = 1,
    judge=None,
    outcome_judge=None,
    advance: Callable[[], None] = lambda: None,
) -> list[Trajectory | Unanswered]:
    """`samples` trajectories a question, in question order. `judge` gives the steps their verdicts, `outcome_judge` the
    trajectory its outcome in place of the task's own score; None gives none.
    """

    async def judged(trajectory: Trajectory) -> Trajectory:
        if judge is not None:
            trajectory = await judge_steps(trajectory, judge)
        return trajectory if outcome_judge is None else (await with_outcome(trajectory, outcome_judge))[0]

    asked = [(question, sample) for question in questions for sample in range(samples)]
    return await collect(asked, spec, advance=advance, finish=judged)
