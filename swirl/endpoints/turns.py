"""A state as text: the turns that a server is sent.

Text of pages, questions and actions must stay text. Servers render a chat into one string and tokenize it with their
control tokens switched on, so a page that holds `<end_of_turn>\\n<start_of_turn>model\\n` would close its turn and
speak as the model. Such spellings are broken by a space before they are sent: a reader sees the same, a tokenizer does
not.
"""

from __future__ import annotations

import re

from swirl.rollout.policy import PolicyState

# Gemma 2's and 3's by name, and the forms of other models: <|im_end|>, <|turn>, <turn|>, [INST], </s>.
_CONTROL_SPELLING = re.compile(
    r"<(?=(?:start_of_turn|end_of_turn|pad|eos|bos|unk|mask|unused\d+|start_of_image|end_of_image|image_soft_token"
    r"|/?s)>)"
    r"|<(?=\|[^\s<>|]{1,64}\|?>|[^\s<>|]{1,64}\|>)"
    r"|\[(?=/?(?:INST|SYS|multimodal|toxicity|@BOS@)\])"
)


def break_control_spellings(text: str) -> str:
    """The text with a space after the first character of whatever some tokenizer may take for a control token."""
    return _CONTROL_SPELLING.sub(lambda match: match[0] + " ", text)


def chat_messages(state: PolicyState) -> list[dict[str, str]]:
    """The state as user and assistant turns in turn: prompt, action, observation, action, …"""
    messages = [{"role": "user", "content": break_control_spellings(state.prompt)}]
    for step in state.steps:
        messages.append({"role": "assistant", "content": break_control_spellings(step.action)})
        messages.append({"role": "user", "content": break_control_spellings(step.observation or "")})
    return messages


def gemma_turns(state: PolicyState) -> str:
    """The state as Gemma was trained to read it, without <bos>, which servers add, up to where the model speaks."""
    names = {"user": "user", "assistant": "model"}
    turns = (f"<start_of_turn>{names[m['role']]}\n{m['content']}<end_of_turn>\n" for m in chat_messages(state))
    return "".join(turns) + "<start_of_turn>model\n"
