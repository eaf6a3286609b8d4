"""Functions as judges and rewards."""

from __future__ import annotations

import asyncio

import pytest

from swirl.errors import ConfigError
from swirl.judging.functions import FunctionJudge, batched
from swirl.judging.judges import StepToJudge
from swirl.trajectories.record import Question, Step, with_call

QUESTION = Question(id="q", task="t", question="?", answer="x")


def item(action="<answer>x</answer>"):
    return StepToJudge(question=QUESTION, steps=(), step=with_call(Step(action=action)), tools=("search",))


def judged(function, *items):
    async def all_of_them():
        judge = FunctionJudge(function, "mine")
        return await asyncio.gather(*map(judge.judge, items or (item(),)))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("value", "verdict", "reward"),
    [(1, "GOOD", 1.0), (0.4, "BAD", 0.4), (True, "GOOD", 1.0), ("BAD", "BAD", None), (None, None, None)],
)
def test_a_value_is_a_reward_a_verdict_or_no_opinion(value, verdict, reward):
    async def awaited(question, steps, step):
        return value

    for function in (lambda question, steps, step: value, awaited):
        (judgement,) = judged(function)
        assert (judgement.verdict, judgement.reward) == (verdict, reward)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan"), float("inf"), "good", [1]])
def test_what_is_no_reward_masks_the_step_and_is_named_once(value, caplog):
    judgements = judged(lambda question, steps, step: value, item(), item())
    assert [(j.verdict, j.reward) for j in judgements] == [(None, None)] * 2
    assert caplog.text.count("expected a number from 0 to 1") == 1


def test_what_the_environment_refuses_is_not_asked_about():
    (judgement,) = judged(lambda question, steps, step: step.call.tool, item("no tag"))
    assert (judgement.verdict, judgement.reward) == ("BAD", 0.0)


def test_a_batched_function_gets_what_waits_at_the_same_time():
    sizes = []

    @batched(size=4)
    def length(questions, states, steps):
        sizes.append(len(questions))
        return [len(step.action) / 100 for step in steps]

    items = [item(f"<answer>{'x' * k}</answer>") for k in range(1, 11)]
    assert [j.reward for j in judged(length, *items)] == [(17 + k) / 100 for k in range(1, 11)]
    assert sizes == [4, 4, 2]


def test_an_error_of_the_function_s_own_ends_the_run_with_its_place():
    def broken(question, steps, step):
        return 1 / 0

    for function in (broken, batched(2)(lambda questions, states, steps: [1, 2, 3])):
        with pytest.raises(ConfigError, match="test_functions.py|expected 1 rewards, got 3"):
            judged(function)
