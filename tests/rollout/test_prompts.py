from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl.rollout.prompts import TAGS, action_text, observation_text, parse_action, question_prompt


@pytest.mark.parametrize("kind", TAGS)
def test_an_action_is_read_back(kind):
    assert parse_action(action_text(kind, "Orvane Tallis")) == (kind, "Orvane Tallis", "")
    thought = f"First the painter, then 3 < 4.\n{action_text(kind, '  Orvane Tallis ')}\n"
    assert parse_action(thought) == (kind, "Orvane Tallis", "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no tool call"),
        ("Kelmora", "no tool call"),
        ("<query>Kelmora</query>", "no tool call"),
        ("<answer>Kelmora", "found 1 tags"),
        ("Kelmora</answer>", "found 1 tags"),
        ("</answer>Kelmora<answer>", "no pair"),
        ("<answer>Kelmora</search_query>", "no pair"),
        ("<answer>Kelmora<answer>", "no pair"),
        ("<answer></answer>", "nothing between"),
        ("<answer> \n </answer>", "nothing between"),
        ("<answer><answer>Kelmora</answer></answer>", "found 4 tags"),
        ("<search_query>a</search_query><answer>b</answer>", "found 4 tags"),
        ("<search_query>a</search_query><search_query>b</search_query>", "found 4 tags"),
        ("<search_query>a</search_query>\na -> A page.", "text after"),
    ],
)
def test_anything_else_is_invalid_for_a_reason(text, reason):
    parsed = parse_action(text)
    assert (parsed.kind, parsed.argument) == ("invalid", "")
    assert reason in parsed.reason and "\n" not in parsed.reason


_PIECES = [f"<{slash}{tag}>" for tag in TAGS.values() for slash in ("", "/")] + [
    "x",
    " ",
    "\n",
    "<",
    ">",
    "é",
    "\0",
]


@given(st.lists(st.sampled_from(_PIECES), max_size=8).map("".join))
def test_any_text_is_either_an_action_or_invalid(text):
    kind, argument, reason = parse_action(text)
    if kind == "invalid":
        assert not argument and reason
    else:
        assert not reason and argument and text.rstrip().endswith(action_text(kind, "").partition("><")[2])
        assert parse_action(action_text(kind, argument)) == (kind, argument, "")


@pytest.mark.parametrize(("tool", "limit"), [("search", 5), ("calculator", 10)])
def test_the_prompt_says_the_paper_s_rules_in_few_words(tool, limit):
    prompt = question_prompt("Who is it?", tool, limit)
    assert prompt.endswith("Who is it?") and len(prompt.split()) <= 45 + 3
    assert f"<{TAGS[tool]}>" in prompt and "<answer>" in prompt
    for content in ("Think", "never both", "few words", f"Queries allowed: {limit}", "do not repeat"):
        assert content in prompt
    other = "math_exp" if tool == "search" else "search_query"
    assert other not in prompt


def test_a_result_comes_back_beside_its_query():
    assert observation_text("12 + 7", "19") == "12 + 7 -> 19"
