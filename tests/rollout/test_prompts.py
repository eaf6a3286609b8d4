from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl.rollout.prompts import question_prompt
from swirl.rollout.tool import Tool
from swirl.tools.calculator.calculate import calculator_tool
from swirl.tools.search import search_tool
from swirl.trajectories.actions import TAGS, Call, action_text, observation_text, parse_action


@pytest.mark.parametrize("kind", TAGS)
def test_an_action_is_read_back(kind):
    assert parse_action(action_text(kind, "Orvane Tallis")) == (Call(kind, "Orvane Tallis"), None)
    thought = f"First the painter, then 3 < 4.\n{action_text(kind, '  Orvane Tallis ')}\n"
    assert parse_action(thought) == (Call(kind, "Orvane Tallis"), None)


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
    call, invalid = parse_action(text)
    assert call is None and reason in invalid and "\n" not in invalid


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
    call, invalid = parse_action(text)
    if call is None:
        assert invalid
    else:
        assert not invalid and call.argument
        assert text.rstrip().endswith(action_text(call.tool, "").partition("><")[2])
        assert parse_action(action_text(call.tool, call.argument)) == (call, None)


def test_only_tools_on_offer_may_be_called_and_tags_of_one_s_own_are_read():
    assert parse_action("<math_exp>1</math_exp>", {"search": "search_query"})[1] == "<math_exp> is not on offer"
    offered = {"search": "search_query", "cities": "sql"}
    assert parse_action("So <sql>SELECT 1</sql>", offered) == (Call("cities", "SELECT 1"), None)
    assert parse_action("So <answer>4</answer>", offered) == (Call("answer", "4"), None)
    assert "found 4 tags" in parse_action("<sql>1</sql><answer>1</answer>", offered)[1]
    assert "no tool call" in parse_action("<sql>SELECT 1</sql>")[1]


@pytest.mark.parametrize(("tool", "limit"), [(search_tool(), 5), (calculator_tool(), 10)])
def test_the_prompt_says_the_paper_s_rules_in_few_words(tool, limit):
    prompt = question_prompt("Who is it?", [tool], limit)
    assert prompt.endswith("Who is it?") and len(prompt.split()) <= 45 + 3
    assert f"<{tool.tag}>" in prompt and "<answer>" in prompt
    for content in ("Think", "never both", "few words", f"Queries allowed: {limit}", "do not repeat"):
        assert content in prompt
    other = "math_exp" if tool.name == "search" else "search_query"
    assert other not in prompt


def test_a_result_comes_back_beside_its_query():
    assert observation_text("12 + 7", "19") == "12 + 7 -> 19"


def test_the_prompt_of_the_base_policy_is_byte_for_byte_what_it_was_trained_on():
    assert question_prompt("Who?", [search_tool()], 5) == (
        "Think, then either search or answer, never both: <search_query>query</search_query> or "
        "<answer>just a few words</answer>. Queries allowed: 5; do not repeat any.\nQuestion: Who?"
    )
    assert question_prompt("How many?", [calculator_tool()], 10) == (
        "Think, then either calculate or answer, never both: <math_exp>expression</math_exp> or "
        "<answer>just a few words</answer>. Queries allowed: 10; do not repeat any.\nQuestion: How many?"
    )


def test_several_tools_and_tools_of_one_s_own_are_told_with_their_descriptions():
    def sql(query: str):
        """One SQL query over cities(name, people).

        Never shown.
        """

    prompt = question_prompt("Who?", [search_tool(), Tool.from_function(sql)], 3)
    assert prompt == (
        "Think, then either call a tool or answer, never both: <search_query>query</search_query>, <sql>query</sql> or "
        "<answer>just a few words</answer>. Queries allowed: 3; do not repeat any.\n"
        "<search_query>…</search_query> Find a page.\n<sql>…</sql> One SQL query over cities(name, people).\n"
        "Question: Who?"
    )
    assert question_prompt("Who?", [], 3) == "Think, then answer: <answer>just a few words</answer>.\nQuestion: Who?"
