"""Tools: functions as they are, with limits; what goes wrong is a result that the model can read."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Literal

import pytest

from swirl.errors import ConfigError, EndpointError
from swirl.rollout.rollout import RolloutSpec, rollout
from swirl.rollout.task import Task
from swirl.rollout.tool import Tool, as_tools
from swirl.trajectories.record import Call, Question, Step

QUESTION = Question(id="q", task="t", question="Where?", answer="there")


def call(tool, text):
    return asyncio.run(tool(text))


def test_a_function_of_one_parameter_gets_the_text_or_what_its_hint_says():
    def shout(text: str) -> str:
        """Say it louder.

        Twice."""
        return text.upper()

    async def double(number: int):
        return 2 * number

    tool = Tool.from_function(shout)
    assert (tool.name, tool.tag, tool.argument, tool.description) == ("shout", "shout", "text", "Say it louder.")
    assert call(tool, '{"not": "JSON here"}') == '{"NOT": "JSON HERE"}'
    assert call(Tool.from_function(double), "21") == "42"
    assert call(Tool.from_function(double), "x").startswith("error: ValidationError: Expected `int`")


def test_a_function_of_several_parameters_gets_a_json_object():
    def convert(amount: float, to: Literal["miles", "feet"], digits: int = 1) -> str:
        return f"{amount:.{digits}f} {to}"

    tool = Tool.from_function(convert, tag="units")
    assert tool.call_text(tool.argument).startswith('<units>{"amount": float')
    assert call(tool, '{"amount": 2, "to": "feet"}') == "2.0 feet"
    for wrong in ("2 feet", '{"amount": 2}', '{"amount": 2, "to": "yards"}', '{"amount": 2, "to": "feet", "x": 1}'):
        assert call(tool, wrong).startswith("error: ")


def test_failures_are_results_and_have_limits():
    def fails(text):
        raise KeyError(text)

    def leaves(text):
        raise SystemExit

    async def sleeps(text):
        await asyncio.sleep(60)

    def hangs(text):
        time.sleep(1)

    assert call(Tool("fails", fails), "x") == "error: KeyError: 'x'"
    assert call(Tool("leaves", leaves), "x").startswith("error: RuntimeError: SystemExit")
    assert call(Tool("sleeps", sleeps, timeout_s=0.05), "x") == "error: no result within 0.05 s"
    assert call(Tool("hangs", hangs, timeout_s=0.05), "x") == "error: no result within 0.05 s"
    assert call(Tool("long", lambda text: "y" * 100, max_characters=10), "x") == "y" * 10 + " … (cut at 10 characters)"
    assert call(Tool("odd", lambda text: "\ud800"), "x") == "?" and call(Tool("none", lambda text: None), "x") == ""

    async def down(text):
        raise EndpointError("http://s", "down")

    with pytest.raises(EndpointError):  # swirl's own tools: the trajectory is left to the next run
        call(Tool("down", down), "x")


def test_plain_functions_run_one_at_a_time_and_async_ones_together():
    running, most = 0, 0
    lock = threading.Lock()

    def plain(text):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return text

    tool = Tool("plain", plain)

    async def many():
        return await asyncio.gather(*(tool(str(k)) for k in range(5)))

    assert asyncio.run(many()) == list("01234") == asyncio.run(many()) and most == 1


@pytest.mark.parametrize("name", ["", "answer", "a b", "<x>", "ä"])
def test_names_that_cannot_be_tags_are_refused(name):
    with pytest.raises(ConfigError, match="cannot be used"):
        Tool(name, print)


def test_two_tools_of_one_name_and_functions_without_parameters_are_refused():
    with pytest.raises(ConfigError, match="two tools have the tag 'a'"):
        as_tools([Tool("a", print), Tool("b", print, tag="a")])
    with pytest.raises(ConfigError, match="at least one named parameter"):
        as_tools([lambda: 1])


class Script:
    name = "script"

    def __init__(self, *lines):
        self.lines = lines

    async def act(self, state):
        return Step(action=self.lines[len(state.steps)], truncated=self.lines[len(state.steps)].endswith("…"))


def play(*lines, **fields):
    def add(a: int, b: int):
        """Add two numbers."""
        return a + b

    def where(thing: str):
        return f"{thing} is there"

    task = Task(name="t", questions={"test": [QUESTION]}, tools=(add, where), score=lambda q, a: float(a == q.answer))
    return asyncio.run(rollout(QUESTION, 0, RolloutSpec(task=task, policy=Script(*lines), max_steps=5, **fields)))


def test_several_tools_in_one_task_work_in_prompt_parser_and_rollout():
    made = play('<add>{"a": 1, "b": 2}</add>', "<where>It</where>", "<answer>there</answer>")
    assert "<add>…</add> Add two numbers." in made.prompt and "<where>thing</where>" in made.prompt
    assert [step.call.tool for step in made.steps] == ["add", "where", "answer"]
    assert [step.observation for step in made.steps] == ['{"a": 1, "b": 2} -> 3', "It -> It is there", None]
    assert made.outcome is True and made.tools == {"add": "add", "where": "where"}
    assert made.steps[1].call == Call("where", "It")
    assert play("<search_query>x</search_query>").steps[0].invalid == "<search_query> is not on offer"


def test_a_malformed_action_ends_it_or_goes_on():
    assert play("Hm.", "<answer>there</answer>").stop == "invalid_action"
    made = play("Hm.", "<add>1", "<answer>there</answer>", malformed="continue")
    assert made.stop == "answer" and made.outcome and len(made.steps) == 3
    assert made.steps[0].observation == "error: no tool call and no answer" and made.steps[0].call is None
    assert play(*["Hm."] * 5, malformed="continue").stop == "step_limit"


def test_after_a_truncated_action_the_turn_is_ended_as_context(tiny_folder):
    from swirl.app.resolve import load_model

    _, tokenizer = load_model(str(tiny_folder))
    made = play("Hm…", "<answer>there</answer>", malformed="continue", tokenizer=tokenizer)
    first, last = made.steps
    assert first.truncated and first.action_ids == tuple(tokenizer.encode("Hm…"))
    assert first.observation_ids[0] == tokenizer.end_of_turn_id and last.action_ids[-1] == tokenizer.end_of_turn_id


def test_a_task_says_what_is_missing():
    task = Task(name="t", questions={"test": [QUESTION]}, score=lambda q, a: {"f1": 1.0})
    with pytest.raises(ConfigError, match="no split 'train': expected test"):
        task.take("train")
    with pytest.raises(ConfigError, match="expected 'em' among its scores"):
        task.is_correct(QUESTION, "x")
    assert task.is_correct(QUESTION, None) is False
