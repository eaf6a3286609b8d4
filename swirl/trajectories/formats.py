"""Trajectories in other people's formats, both ways: chat messages with tool calls, TRL's stepwise rows, Parquet.

- swirl: one Trajectory a row, as everywhere here

- messages: {"id", "messages", "tools", "swirl"}, OpenAI's chat form; the thought is the content, the call a tool call

- trl: {"prompt", "completions", "labels", "swirl"}; a completion is the result before it and the action. Read only:
  {"prompt", "completion"}, each a text or messages

A name that ends in .parquet is read and written as Parquet (needs pyarrow), any other as JSONL. `swirl` is a string
of JSON with what the other format has no place for, so that a way there and back loses nothing but token ids and
their log-probs: the trainer tokenises such text once. Rows without `swirl`, written by others, are read too; they
have no rewards or verdicts, which `python -m swirl.filter` gives. Tools of one's own
keep their names; what a tool is for is not in a trajectory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import msgspec

from swirl.errors import InputError
from swirl.trajectories.actions import ANSWER, TAGS, action_text, observation_text, parse_action
from swirl.trajectories.record import Question, Step, Trajectory, decode_trajectory, with_calls
from swirl.trajectories.rows import Format, read_rows

_ARGUMENT = {"search": "query", "calculator": "expression"}
_PURPOSE = {"search": "Find a page.", "calculator": "Calculate an expression."}
_OWN = {tool: tag for tool, tag in TAGS.items() if tool != ANSWER}


class _Function(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(msgspec.Struct):
    function: _Function


class _Message(msgspec.Struct):
    role: str
    content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _MessagesRow(msgspec.Struct):
    messages: list[_Message]
    id: str | None = None
    tools: str | list[Any] | None = None
    swirl: str | None = None


class _PromptRow(msgspec.Struct):
    prompt: str | list[_Message]
    completion: str | list[_Message]
    id: str | None = None
    tools: str | list[Any] | None = None


class _TrlRow(msgspec.Struct):
    prompt: str
    completions: list[str]
    labels: list[bool]
    swirl: str | None = None


class _StepRest(msgspec.Struct, omit_defaults=True):
    """What neither format has of a step; `action_at` is where the action starts in a completion of TRL's."""

    verdict: Literal["GOOD", "BAD"] | None = None
    reason: str | None = None
    reward: float | None = None
    observation: str | None = None
    action_at: int = 0


class _Rest(msgspec.Struct, omit_defaults=True):
    """What neither format has of a trajectory."""

    id: str
    question: Question
    stop: Literal["answer", "step_limit", "invalid_action", "context_limit"]
    steps: list[_StepRest]
    sample: int = 0
    prediction: str | None = None
    policy: str | None = None
    outcome: bool | None = None
    dropped: str | None = None
    tools: dict[str, str] = {}


def _rest(trajectory: Trajectory, steps: list[_StepRest]) -> str:
    names = [name for name in _Rest.__struct_fields__ if name != "steps"]
    rest = _Rest(steps=steps, **{name: getattr(trajectory, name) for name in names})
    return msgspec.json.encode(rest).decode()


def _put_together(rest: _Rest, prompt: str, steps: Iterable[Step]) -> Trajectory:
    names = [name for name in _Rest.__struct_fields__ if name != "steps"]
    return with_calls(Trajectory(prompt=prompt, steps=tuple(steps), **{name: getattr(rest, name) for name in names}))


def to_messages(trajectory: Trajectory) -> dict:
    """One row of chat messages. Actions and results that have no such form stay plain text."""
    messages: list[dict] = [{"role": "user", "content": trajectory.prompt}]
    for k, step in enumerate(trajectory.steps):
        kind, argument = (step.call.tool, step.call.argument) if step.call else ("", "")
        call = action_text(kind, argument, trajectory.tools[kind]) if kind in trajectory.tools else ""
        observation = step.observation
        if not call or not step.action.endswith(call):
            messages.append({"role": "assistant", "content": step.action})
            if observation is not None:
                messages.append({"role": "user", "content": observation})
            continue
        arguments = msgspec.json.encode({_ARGUMENT.get(kind, "argument"): argument}).decode()
        function = {"id": f"call_{k}", "type": "function", "function": {"name": kind, "arguments": arguments}}
        messages.append({"role": "assistant", "content": step.action[: -len(call)], "tool_calls": [function]})
        if observation is not None:
            before = observation_text(argument, "")
            if observation.startswith(before):
                result = observation[len(before) :]
                messages.append({"role": "tool", "tool_call_id": f"call_{k}", "name": kind, "content": result})
            else:
                messages.append({"role": "user", "content": observation})
    steps = [_StepRest(verdict=s.verdict, reason=s.reason, reward=s.reward) for s in trajectory.steps]
    described = msgspec.json.encode([_tool(name) for name in trajectory.tools]).decode()
    return {"id": trajectory.id, "messages": messages, "tools": described, "swirl": _rest(trajectory, steps)}


def _tool(name: str) -> dict:
    argument = _ARGUMENT.get(name, "argument")
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    described = _PURPOSE.get(name, f"The tool {name}.")
    return {"type": "function", "function": {"name": name, "description": described, "parameters": parameters}}


def _tools_of(row: _MessagesRow, rest: _Rest | None, file, line) -> dict[str, str]:
    """Tool to tag: those that the trajectory had; else those that the row lists, by their names; else swirl's own."""
    if rest is not None:
        return rest.tools
    try:
        listed = msgspec.json.decode(row.tools) if isinstance(row.tools, str) else row.tools
        names = [one["function"]["name"] for one in listed or ()]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise InputError(file, "expected a list of tools in OpenAI's form", line=line, field="tools") from None
    return {name: TAGS.get(name, name) for name in names}


def from_messages(row: dict, file: str | os.PathLike = "<memory>", line: int | None = None) -> Trajectory:
    """A trajectory without token ids. Raises InputError naming file, row and field."""
    return _from_messages(_convert(row, _MessagesRow, file, line), file, line, lambda k: f"messages[{k}]")


def _from_messages(made: _MessagesRow, file, line: int | None, field_of: Callable[[int], str]) -> Trajectory:
    """`field_of(k)` is what message k is called in the row that was read."""

    def refuse(k: int, expected: str):
        raise InputError(file, expected, line=line, field=field_of(k))

    opening = 1 if made.messages and made.messages[0].role == "user" else 2
    roles = [message.role for message in made.messages[:opening]]
    if roles not in (["user"], ["system", "user"]):
        refuse(0, "expected a user message first, or a system message and then a user's")
    prompt = "\n\n".join(message.content or "" for message in made.messages[:opening])
    rest = _read_rest(made.swirl, file, line)
    tools = _tools_of(made, rest, file, line)
    actions: list[str] = []
    observations: dict[int, str] = {}
    call = None
    for k, message in enumerate(made.messages[opening:], opening):
        answered = len(observations) == len(actions)
        if message.role == "assistant" and answered:
            call = _call(message, k, tools or _OWN, refuse)
            text = action_text(*call, (tools or _OWN)[call[0]]) if call else ""
            actions.append((message.content or "") + text)
        elif message.role == "tool" and call and not answered:
            observations[len(actions) - 1] = observation_text(call[1], message.content or "")
        elif message.role == "user" and not answered:
            observations[len(actions) - 1] = message.content or ""
        else:
            refuse(k, f"expected {'an assistant message' if answered else 'a result'}, got role '{message.role}'")
    if not actions:
        refuse(opening, "expected at least one assistant message")
    rest = rest or _guess_rest(made, prompt, actions, observations, tools, line)
    _require_steps(rest, len(actions), file, line)
    parts = enumerate(zip(actions, rest.steps, strict=True))
    steps = (
        Step(action=a, observation=observations.get(k), verdict=r.verdict, reason=r.reason, reward=r.reward)
        for k, (a, r) in parts
    )
    return _put_together(rest, prompt, steps)


def _call(message: _Message, k: int, tools: dict[str, str], refuse: Callable) -> tuple[str, str] | None:
    """(tool, argument) of an assistant message, None where it calls none."""
    if not message.tool_calls:
        return None
    if len(message.tool_calls) > 1:
        refuse(k, f"expected one tool call a step, got {len(message.tool_calls)}")
    function = message.tool_calls[0].function
    if function.name not in tools:
        refuse(k, f"expected a call of {' or '.join(tools)}, got '{function.name}'")
    arguments = function.arguments
    try:
        arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except msgspec.DecodeError:
        refuse(k, "expected the tool call's arguments to be a JSON object")
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    if len(values) != 1 or not isinstance(values[0], str):
        refuse(k, f"expected one argument, the {_ARGUMENT.get(function.name, 'argument')}, a text")
    return function.name, values[0]


def _guess_rest(row: _MessagesRow, prompt: str, actions, observations, tools, line) -> _Rest:
    """For rows of others: the last message is the answer, in our tag or as plain text."""
    name = row.id or f"line-{line}"
    question = Question(id=name, task="own", question=prompt)
    if len(observations) == len(actions):
        return _Rest(id=name, question=question, stop="step_limit", steps=[_StepRest() for _ in actions], tools=tools)
    prediction = _prediction(actions[-1])
    steps = [_StepRest() for _ in actions]
    return _Rest(id=name, question=question, stop="answer", steps=steps, prediction=prediction, tools=tools)


def _prediction(action: str) -> str:
    """The answer of a last message, in our tag or as plain text."""
    call, _ = parse_action(action)
    return call.argument if call and call.tool == ANSWER else action.strip()


def to_trl(trajectory: Trajectory) -> dict | None:
    """One row of TRL's stepwise supervision, None where a step has no verdict: a label cannot say so.

    A completion ends with its action, so that the label stands right behind it; the result before comes
    first.
    """
    if any(step.verdict is None for step in trajectory.steps):
        return None
    completions, steps, before = [], [], ""
    for step in trajectory.steps:
        completions.append(before + step.action)
        rest = _StepRest(reason=step.reason, reward=step.reward, observation=step.observation, action_at=len(before))
        steps.append(rest)
        before = "" if step.observation is None else f"{step.observation}\n"
    labels = [step.verdict == "GOOD" for step in trajectory.steps]
    row = {"prompt": trajectory.prompt, "completions": completions, "labels": labels}
    return row | {"swirl": _rest(trajectory, steps)}


def _from_prompt(made: _PromptRow, file, line: int | None) -> Trajectory:
    """What is learned is the completion: the assistant's messages in it are the actions."""
    as_messages = {"user": made.prompt, "assistant": made.completion}
    prompt, completion = (
        [_Message(role=role, content=given)] if isinstance(given, str) else given for role, given in as_messages.items()
    )
    if any(message.role == "assistant" for message in prompt):
        expected = "expected no assistant message, since actions are what the completion holds"
        raise InputError(file, expected, line=line, field="prompt")
    count = len(prompt)
    row = _MessagesRow(messages=[*prompt, *completion], id=made.id, tools=made.tools)
    return _from_messages(row, file, line, lambda k: f"prompt[{k}]" if k < count else f"completion[{k - count}]")


def from_trl(row: dict, file: str | os.PathLike = "<memory>", line: int | None = None) -> Trajectory:
    """A trajectory without token ids; a label is a verdict, and the reward 1 or 0 where none is given.

    A row of {"prompt", "completion"} has neither.
    """
    if "completion" in row:
        return _from_prompt(_convert(row, _PromptRow, file, line), file, line)
    made = _convert(row, _TrlRow, file, line)
    if len(made.labels) != len(made.completions):
        expected = f"expected {len(made.completions)} labels, one a completion, got {len(made.labels)}"
        raise InputError(file, expected, line=line, field="labels")
    if not made.completions:
        raise InputError(file, "expected at least one completion", line=line, field="completions")
    rest = _read_rest(made.swirl, file, line)
    if rest is None:
        name = f"line-{line}"
        prediction = _prediction(made.completions[-1])
        steps = [_StepRest(reward=float(label)) for label in made.labels]
        question = Question(id=name, task="own", question=made.prompt)
        rest = _Rest(id=name, question=question, stop="answer", steps=steps, prediction=prediction)
    _require_steps(rest, len(made.completions), file, line)
    steps = (
        Step(
            action=completion[r.action_at :],
            observation=r.observation,
            verdict="GOOD" if label else "BAD",
            reason=r.reason,
            reward=r.reward,
        )
        for completion, label, r in zip(made.completions, made.labels, rest.steps, strict=True)
    )
    return _put_together(rest, made.prompt, steps)


def _convert(row, kind, file, line):
    try:
        return msgspec.convert(row, kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        raise InputError(file, message, line=line, field=where.strip("`.") or None) from None


def _read_rest(text: str | None, file, line) -> _Rest | None:
    if text is None:
        return None
    try:
        return msgspec.json.decode(text, type=_Rest)
    except msgspec.MsgspecError as error:
        raise InputError(file, f"expected what swirl wrote there ({error})", line=line, field="swirl") from None


def _require_steps(rest: _Rest, count: int, file, line) -> None:
    if len(rest.steps) != count:
        raise InputError(file, f"expected {count} steps, got {len(rest.steps)}", line=line, field="swirl")


def read_any(path: str | os.PathLike, kind: Format) -> Iterator[Trajectory]:
    """Trajectories of a file in any of the formats. Raises InputError naming file, row and field."""
    for number, row in read_rows(path):
        if kind == "swirl":
            yield decode_trajectory(msgspec.json.encode(row), path, number)
        else:
            yield (from_messages if kind == "messages" else from_trl)(row, path, number)
