"""The text of an action and of its result, and how both are read: thought, then one call between tags.

    I need the painter first. <search_query>Kelmor Velsin</search_query>

A result comes back as `QUERY -> RESULT`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

ANSWER = "answer"
TAGS: dict[str, str] = {"search": "search_query", "calculator": "math_exp", ANSWER: "answer"}
"""Tool to tag, of the tools that swirl has. A tool of one's own brings its tag along."""


class Call(msgspec.Struct, frozen=True):
    """What an action does: `tool` names the tool it calls, or is "answer"; `argument` stands between its tags."""

    tool: str
    argument: str


def action_text(tool: str, argument: str, tag: str | None = None) -> str:
    """`<search_query>Kelmor Velsin</search_query>` and its like; the inverse of `parse_action`."""
    tag = tag or TAGS[tool]
    return f"<{tag}>{argument}</{tag}>"


def observation_text(argument: str, result: str) -> str:
    """The user turn that brings a tool's result back: `QUERY -> RESULT`."""
    return f"{argument} -> {result}"


def closing_tags(tools: Mapping[str, str]) -> tuple[str, ...]:
    """`</search_query>`, `</answer>`: what ends an action where `tools` are on offer, each with its tag."""
    return tuple(dict.fromkeys(f"</{tag}>" for tag in (*tools.values(), TAGS[ANSWER])))


@lru_cache(maxsize=256)
def _any_tag(tags: tuple[str, ...]) -> re.Pattern:
    return re.compile(rf"<(/?)({'|'.join(map(re.escape, tags))})>")


def parse_action(text: str, tools: Mapping[str, str] = TAGS) -> tuple[Call | None, str | None]:
    """(what an action does, None), or (None, why it is invalid, in one line).

    `tools` are those on offer, each with its tag; an answer may always be given. Valid is free thought, then exactly
    one tag pair with something in it, then nothing. Tags of swirl's other tools count too: a call of one is invalid.
    """
    tool_of_tag = {tag: tool for tool, tag in {**TAGS, **tools}.items()}
    tags = list(_any_tag(tuple(tool_of_tag)).finditer(text))
    if not tags:
        return None, "no tool call and no answer"
    if len(tags) != 2:
        return None, f"expected one opening and one closing tag, found {len(tags)} tags"
    opening, closing = tags
    if opening[1] or not closing[1] or opening[2] != closing[2]:
        return None, f"{opening[0]} and {closing[0]} are no pair"
    if text[closing.end() :].strip():
        return None, f"text after {closing[0]}"
    argument = text[opening.end() : closing.start()].strip()
    if not argument:
        return None, f"nothing between {opening[0]} and {closing[0]}"
    tool = tool_of_tag[opening[2]]
    if tool != ANSWER and tool not in tools:
        return None, f"{opening[0]} is not on offer"
    return Call(tool, argument), None


def tools_in_text(prompt: str, actions: Iterable[str]) -> dict[str, str]:
    """Tool to tag, for trajectories that do not say which were on offer: of swirl's own tools those that the prompt's
    rules show, else those that the actions call; empty where neither tells.
    """
    rules = prompt.partition("\nQuestion: ")[0]  # a question may speak of tags too
    for text in (rules, "\n".join(actions)):
        if found := {tool: tag for tool, tag in TAGS.items() if tool != ANSWER and f"<{tag}>" in text}:
            return found
    return {}
