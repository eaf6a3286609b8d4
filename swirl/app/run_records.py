"""What a run writes down for those who look at it: answers before and after, some of what its updates drew, and what
one policy makes of the other's answers. Nothing that a run learns from is read from these files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TypeVar

import msgspec
import numpy as np

from swirl.trajectories.record import Question, Step, Trajectory

Item = TypeVar("Item")
EVALUATED = {"before": "evaluated-before.jsonl", "after": "evaluated-after.jsonl"}
GENERATED, KEPT, DROPPED = "trajectories.jsonl", "kept.jsonl", "dropped.jsonl"
SAMPLES, LOG_PROBS, STOPPED = "samples.jsonl", "log_probs.jsonl", "stopped.json"

# Bounds, so that a long run's files stay small; a report says what was left out.
SAMPLED_UPDATES = 30  # at most about so many updates of a run write samples
SAMPLED_TREES = 2  # of each of those, the groups of so many trees
COMPARED_QUESTIONS = 60  # whose answers get log-probs of the other policy


class SampledGroup(msgspec.Struct, frozen=True, omit_defaults=True):
    """One group of an update: what was drawn at state k (from 0) of a trajectory, or recorded there; in outcome-rl
    whole trajectories of a question, and then `trajectory` is None and k is 0.

    `attempts` are the actions of each, with their rewards; `advantages` are per attempt, None where it is masked. The
    trees of the update were `trees`, of which SAMPLED_TREES are written.
    """

    update: int
    question: Question
    k: int
    attempts: tuple[tuple[Step, ...], ...]
    advantages: tuple[float | None, ...]
    trees: int
    trajectory: str | None = None


class OtherLogProbs(msgspec.Struct, frozen=True):
    """Log-probs of a trajectory's action tokens, by step, under a policy that did not draw them: `policy` is base or
    trained, `file` where the trajectory stands. Natural log, temperature 1, rounded to 1e-4.
    """

    file: str
    task: str
    trajectory: str
    policy: str
    log_probs: tuple[tuple[float, ...], ...]


def has_samples(update: int, updates: int) -> bool:
    """Whether the update of that number, from 1, writes samples: evenly spaced, the first and the last among them."""
    return (update - 1) % max(1, updates // SAMPLED_UPDATES) == 0 or update == updates


def sampled_groups(groups, advantages: np.ndarray, update: int, *, whole: bool) -> list[SampledGroup]:
    """Of the groups of an update (app/attempts.py) and their advantages (N, G), those of its first trees. `whole`: an
    attempt is a trajectory, not an action at a state.
    """
    states = [attempt.actions[0][0] for group in groups for attempt in group if attempt.actions]
    trees = len({state.tree for state in states})
    made = []
    for group, row in zip(groups, advantages, strict=True):
        answered = [(attempt, float(a)) for attempt, a in zip(group, row, strict=True) if attempt.actions]
        if not answered or answered[0][0].actions[0][0].tree >= SAMPLED_TREES:
            continue
        state = answered[0][0].actions[0][0]
        made.append(
            SampledGroup(
                update=update,
                question=state.trajectory.question,
                k=state.k,
                attempts=tuple(tuple(step for _, step in attempt.actions) for attempt, _ in answered),
                advantages=tuple(None if np.isnan(a) else a for _, a in answered),
                trees=trees,
                trajectory=None if whole else state.trajectory.id,
            )
        )
    return made


def compared_answers(
    before: Sequence[Trajectory], after: Sequence[Trajectory], num: int = COMPARED_QUESTIONS
) -> list[tuple[Trajectory, Trajectory]]:
    """Pairs of answers to the same question: first those that became right or wrong; `num` at most."""
    first = {(t.question.task, t.id): t for t in before}
    pairs = [(first[key], t) for t in after if (key := (t.question.task, t.id)) in first]
    mended, broken, same = [], [], []
    for pair in _in_turn(pairs, lambda pair: pair[0].question.task):
        was, now = pair[0].outcome, pair[1].outcome
        (same if was == now else mended if now else broken).append(pair)
    return [*_in_turn([*mended, *broken], lambda pair: pair[1].outcome), *same][:num]


def _in_turn(items: Sequence[Item], key: Callable[[Item], object]) -> list[Item]:
    """The items of each key in turn, so that a few of them are some of every kind."""
    of_key: dict[object, list[Item]] = {}
    for item in items:
        of_key.setdefault(key(item), []).append(item)
    return [item for turn in zip_longest(*of_key.values()) for item in turn if item is not None]
