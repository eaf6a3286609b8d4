"""Ids are what a resumed file goes by: they must mean one thing."""

import asyncio
import json

import pytest

from swirl.errors import InputError
from swirl.filter import FilterConfig, _filter
from swirl.generate import GenerateConfig, _generate
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Question, Step, Trajectory


def trajectory(name):
    question, steps = Question(id="q", task="bridge", question="Who?"), (Step(action="<answer>A</answer>"),)
    return Trajectory(id=name, question=question, prompt="Who?", steps=steps, stop="answer")


def test_filter_refuses_an_id_that_stands_twice(tmp_path):
    write_trajectories(tmp_path / "t.jsonl", [trajectory("a#0"), trajectory("a#1"), trajectory("a#0")])
    config = FilterConfig(
        data=tmp_path / "t.jsonl", kept=tmp_path / "k.jsonl", dropped=tmp_path / "d.jsonl", mode="none"
    )
    with pytest.raises(InputError, match="'a#0' stands there twice"):
        asyncio.run(_filter(config))


def test_generate_refuses_questions_that_have_changed_under_their_ids(tmp_path):
    questions = tmp_path / "q.jsonl"
    texts = ["Capital of France?", "Capital of Italy?"]
    questions.write_text("".join(json.dumps({"question": text, "answer": "x"}) + "\n" for text in texts))
    pages = tmp_path / "pages.jsonl"
    pages.write_text(json.dumps({"title": "France", "text": "Paris is its capital."}) + "\n")
    asked = {"task": ("own",), "questions": questions, "corpus": pages}
    config = GenerateConfig(out=tmp_path / "t.jsonl", samples=1, max_steps=1, max_new_tokens=4, **asked)
    assert asyncio.run(_generate(config))["new"] == 2
    assert asyncio.run(_generate(config))["new"] == 0
    questions.write_text(json.dumps({"question": "Capital of Spain?", "answer": "x"}) + "\n" + questions.read_text())
    with pytest.raises(InputError, match="answers another question"):
        asyncio.run(_generate(config))
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 2
