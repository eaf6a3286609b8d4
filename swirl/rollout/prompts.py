"""What the policy is told, how its actions are read, and how a result comes back.

The wording is ours, its content the paper's (arXiv 2504.04736): think, then call the tool or answer, never
both; answer in just a few words; so many queries; repeat none. A result comes back as `QUERY -> RESULT`.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Tool = Literal["search", "calculator"]
ActionKind = Literal["search", "calculator", "answer", "invalid"]

TAGS: dict[str, str] = {"search": "search_query", "calculator": "math_exp", "answer": "answer"}
_KIND_OF_TAG = {tag: kind for kind, tag in TAGS.items()}
_ANY_TAG = re.compile(rf"<(/?)({'|'.join(_KIND_OF_TAG)})>")


class ParsedAction(NamedTuple):
    """What an action does. `argument` is the text between the tags, stripped; "" where the action is invalid.

    `reason` says, in one line, why an action is invalid; "" where it is valid.
    """

    kind: ActionKind
    argument: str
    reason: str = ""


def action_text(kind: Literal["search", "calculator", "answer"], argument: str) -> str:
    """`<search_query>Kelmor Velsin</search_query>` and its like; the inverse of `parse_action`."""
    return f"<{TAGS[kind]}>{argument}</{TAGS[kind]}>"


def parse_action(text: str) -> ParsedAction:
    """Read one action: free thought, then exactly one tag pair with something in it, then nothing."""

    def invalid(reason: str) -> ParsedAction:
        return ParsedAction("invalid", "", reason)

    tags = list(_ANY_TAG.finditer(text))
    if not tags:
        return invalid("no tool call and no answer")
    if len(tags) != 2:
        return invalid(f"expected one opening and one closing tag, found {len(tags)} tags")
    opening, closing = tags
    if opening[1] or not closing[1] or opening[2] != closing[2]:
        return invalid(f"{opening[0]} and {closing[0]} are no pair")
    if text[closing.end() :].strip():
        return invalid(f"text after {closing[0]}")
    argument = text[opening.end() : closing.start()].strip()
    if not argument:
        return invalid(f"nothing between {opening[0]} and {closing[0]}")
    return ParsedAction(_KIND_OF_TAG[opening[2]], argument)


def question_prompt(question_text: str, tool: Tool, max_queries: int) -> str:
    """The first user turn: the rules, then the question."""
    call = {"search": "search", "calculator": "calculate"}[tool]
    argument = {"search": "query", "calculator": "expression"}[tool]
    return (
        f"Think, then either {call} or answer, never both: {action_text(tool, argument)} or "
        f"{action_text('answer', 'just a few words')}. Queries allowed: {max_queries}; do not repeat any.\n"
        f"Question: {question_text}"
    )


def observation_text(argument: str, result: str) -> str:
    """The user turn that brings a tool's result back: `QUERY -> RESULT`."""
    return f"{argument} -> {result}"
