"""What the policy is told: the rules, the tools, the question.

The wording is ours, its content the paper's (arXiv 2504.04736): think, then call the tool or answer, never both; answer
in just a few words; so many queries; repeat none. The base policy that ships was trained on these very words.
"""

from __future__ import annotations

from collections.abc import Sequence

from swirl.rollout.tool import Tool
from swirl.trajectories.actions import ANSWER, action_text


def question_prompt(question_text: str, tools: Sequence[Tool], max_queries: int) -> str:
    """The first user turn: the rules, then the question. Without tools the model answers directly.

    A single tool that has a `verb` is told by that alone, any other by a line with its description.
    """
    answer = action_text(ANSWER, "just a few words")
    if not tools:
        return f"Think, then answer: {answer}.\nQuestion: {question_text}"
    calls = ", ".join(tool.call_text(tool.argument) for tool in tools)
    told_by_verb = len(tools) == 1 and tools[0].verb
    descriptions = "" if told_by_verb else "".join(f"{tool.call_text('…')} {tool.description}\n" for tool in tools)
    return (
        f"Think, then either {tools[0].verb if told_by_verb else 'call a tool'} or answer, never both: {calls} or "
        f"{answer}. Queries allowed: {max_queries}; do not repeat any.\n{descriptions}"
        f"Question: {question_text}"
    )
