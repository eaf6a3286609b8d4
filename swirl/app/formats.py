"""Trajectories in other people's formats, both ways: chat messages with tool calls, TRL's stepwise rows, Parquet.

- swirl: one Trajectory a row, as everywhere here

- messages: {"id", "messages", "tools", "swirl"}, OpenAI's chat form; the thought is the content, the call a tool call

- trl: {"prompt", "completions", "labels", "swirl"}; a completion is the result before it and the action

A name that ends in .parquet is read and written as Parquet (needs pyarrow), any other as JSONL. `swirl` is a string
of JSON with what the other format has no place for, so that a way there and back loses nothing but token ids and
their log-probs: the trainer tokenises such text once. Rows without `swirl`, written by others, are read too; they
have no rewards or verdicts, which `python -m swirl.filter` gives.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from swirl.app import command
from swirl.errors import ConfigError, InputError
from swirl.storage.digest import FIELD, seal
from swirl.storage.files import replacing
from swirl.trajectories.actions import ANSWER, action_text, observation_text, parse_action
from swirl.trajectories.log import read_lines
from swirl.trajectories.record import Question, Step, Trajectory, decode_trajectory, with_calls

Format = Literal["swirl", "messages", "trl"]

_ARGUMENT = {"search": "query", "calculator": "expression"}
_PURPOSE = {"search": "Find a page.", "calculator": "Calculate an expression."}
_ROWS_PER_GROUP = 1000


@dataclass(frozen=True)
class FormatsConfig:
    data: Path = Path("trajectories.jsonl")
    """What to read; .parquet is Parquet, all else JSONL."""
    out: Path = Path("messages.jsonl")
    """What to write, replaced whole or not at all."""
    read: Format = "swirl"
    write: Format = "messages"


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
    swirl: str | None = None


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
    tools: dict[str, None] = {}
    for k, step in enumerate(trajectory.steps):
        kind, argument = (step.call.tool, step.call.argument) if step.call else ("", "")
        call = action_text(kind, argument) if kind in _ARGUMENT else ""
        observation = step.observation
        if not call or not step.action.endswith(call):
            messages.append({"role": "assistant", "content": step.action})
            if observation is not None:
                messages.append({"role": "user", "content": observation})
            continue
        tools[kind] = None
        arguments = msgspec.json.encode({_ARGUMENT[kind]: argument}).decode()
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
    described = msgspec.json.encode([_tool(name) for name in tools]).decode()
    return {"id": trajectory.id, "messages": messages, "tools": described, "swirl": _rest(trajectory, steps)}


def _tool(name: str) -> dict:
    properties = {_ARGUMENT[name]: {"type": "string"}}
    parameters = {"type": "object", "properties": properties, "required": [_ARGUMENT[name]]}
    return {
        "type": "function",
        "function": {"name": name, "description": _PURPOSE[name], "parameters": parameters},
    }


def from_messages(row: dict, file: str | os.PathLike = "<memory>", line: int | None = None) -> Trajectory:
    """A trajectory without token ids. Raises InputError naming file, row and field."""
    made = _convert(row, _MessagesRow, file, line)

    def refuse(k: int, expected: str):
        raise InputError(file, expected, line=line, field=f"messages[{k}]")

    opening = 1 if made.messages and made.messages[0].role == "user" else 2
    roles = [message.role for message in made.messages[:opening]]
    if roles not in (["user"], ["system", "user"]):
        refuse(0, "expected a user message first, or a system message and then a user's")
    prompt = "\n\n".join(message.content or "" for message in made.messages[:opening])
    actions: list[str] = []
    observations: dict[int, str] = {}
    call = None
    for k, message in enumerate(made.messages[opening:], opening):
        answered = len(observations) == len(actions)
        if message.role == "assistant" and answered:
            call = _call(message, k, refuse)
            actions.append((message.content or "") + (action_text(*call) if call else ""))
        elif message.role == "tool" and call and not answered:
            observations[len(actions) - 1] = observation_text(call[1], message.content or "")
        elif message.role == "user" and not answered:
            observations[len(actions) - 1] = message.content or ""
        else:
            refuse(k, f"expected {'an assistant message' if answered else 'a result'}, got role '{message.role}'")
    if not actions:
        refuse(opening, "expected at least one assistant message")
    rest = _read_rest(made.swirl, len(actions), file, line) or _guess_rest(made, prompt, actions, observations, line)
    parts = enumerate(zip(actions, rest.steps, strict=True))
    steps = (
        Step(action=a, observation=observations.get(k), verdict=r.verdict, reason=r.reason, reward=r.reward)
        for k, (a, r) in parts
    )
    return _put_together(rest, prompt, steps)


def _call(message: _Message, k: int, refuse: Callable) -> tuple[str, str] | None:
    """(tool, argument) of an assistant message, None where it calls none."""
    if not message.tool_calls:
        return None
    if len(message.tool_calls) > 1:
        refuse(k, f"expected one tool call a step, got {len(message.tool_calls)}")
    function = message.tool_calls[0].function
    if function.name not in _ARGUMENT:
        refuse(k, f"expected a call of search or calculator, got '{function.name}'")
    arguments = function.arguments
    try:
        arguments = msgspec.json.decode(arguments) if isinstance(arguments, str) else arguments
    except msgspec.DecodeError:
        refuse(k, "expected the tool call's arguments to be a JSON object")
    values = list(arguments.values()) if isinstance(arguments, dict) else []
    if len(values) != 1 or not isinstance(values[0], str):
        refuse(k, f"expected one argument, the {_ARGUMENT[function.name]}, a text")
    return function.name, values[0]


def _guess_rest(row: _MessagesRow, prompt: str, actions, observations, line) -> _Rest:
    """For rows of others: the last message is the answer, in our tag or as plain text."""
    name = row.id or f"line-{line}"
    question = Question(id=name, task="own", question=prompt)
    if len(observations) == len(actions):
        return _Rest(id=name, question=question, stop="step_limit", steps=[_StepRest() for _ in actions])
    prediction = _prediction(actions[-1])
    steps = [_StepRest() for _ in actions]
    return _Rest(id=name, question=question, stop="answer", steps=steps, prediction=prediction)


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


def from_trl(row: dict, file: str | os.PathLike = "<memory>", line: int | None = None) -> Trajectory:
    """A trajectory without token ids; a label is a verdict, and the reward 1 or 0 where none is given."""
    made = _convert(row, _TrlRow, file, line)
    if len(made.labels) != len(made.completions):
        expected = f"expected {len(made.completions)} labels, one a completion, got {len(made.labels)}"
        raise InputError(file, expected, line=line, field="labels")
    if not made.completions:
        raise InputError(file, "expected at least one completion", line=line, field="completions")
    rest = _read_rest(made.swirl, len(made.completions), file, line)
    if rest is None:
        name = f"line-{line}"
        prediction = _prediction(made.completions[-1])
        steps = [_StepRest(reward=float(label)) for label in made.labels]
        question = Question(id=name, task="own", question=made.prompt)
        rest = _Rest(id=name, question=question, stop="answer", steps=steps, prediction=prediction)
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


def _read_rest(text: str | None, count: int, file, line) -> _Rest | None:
    if text is None:
        return None
    try:
        rest = msgspec.json.decode(text, type=_Rest)
    except msgspec.MsgspecError as error:
        raise InputError(file, f"expected what swirl wrote there ({error})", line=line, field="swirl") from None
    if len(rest.steps) != count:
        raise InputError(file, f"expected {count} steps, got {len(rest.steps)}", line=line, field="swirl")
    return rest


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'swirl[parquet]'") from None
    return pyarrow


def _parquet_schema(pa, kind: Format):
    """The columns of a format."""
    text, texts = pa.string(), pa.list_(pa.string())
    if kind == "trl":
        fields = {"prompt": text, "completions": texts, "labels": pa.list_(pa.bool_()), "swirl": text}
    elif kind == "messages":
        function = pa.struct({"name": text, "arguments": text}.items())
        call = pa.struct({"id": text, "type": text, "function": function}.items())
        message = {
            "role": text,
            "content": text,
            "tool_calls": pa.list_(call),
            "tool_call_id": text,
            "name": text,
        }
        fields = {"id": text, "messages": pa.list_(pa.struct(message.items())), "tools": text, "swirl": text}
    else:
        number, ids = pa.int64(), pa.list_(pa.int64())
        question = {
            "id": text,
            "task": text,
            "question": text,
            "answer": text,
            "aliases": texts,
            "hops": number,
        }
        call = pa.struct({"tool": text, "argument": text}.items())
        step = {"action": text, "observation": text, "action_ids": ids, "observation_ids": ids}
        step |= {"log_probs": pa.list_(pa.float64()), "truncated": pa.bool_(), "call": call, "invalid": text}
        step |= {"verdict": text, "judged": text, "reason": text, "reward": pa.float64()}
        fields = {"id": text, "question": pa.struct(question.items()), "prompt": text}
        fields |= {
            "steps": pa.list_(pa.struct(step.items())),
            "stop": text,
            "sample": number,
            "prediction": text,
        }
        fields |= {"prompt_ids": ids, "tokenizer": text, "retokenized": pa.bool_(), "policy": text}
        fields |= {"outcome": pa.bool_(), "dropped": text, "tools": pa.map_(text, text), "schema": number}
    return pa.schema(fields.items())


def _without_none(value):
    """Parquet keeps an absent field as null; JSON leaves it out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def read_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """(row number from 1, row) of a JSONL or Parquet file, streamed. Raises InputError."""
    if Path(path).suffix != ".parquet":
        for number, line in read_lines(path):
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(path, f"expected one JSON object a line ({error})", line=number) from None
            if not isinstance(row, dict):
                raise InputError(path, "expected one JSON object a line", line=number)
            yield number, row
        return
    yield from enumerate(_parquet_rows(path), 1)


def _parquet_rows(path: str | os.PathLike) -> Iterator[dict]:
    """Pages are held to their checksums, and where swirl wrote the file all rows to their digest, after the last."""
    pa = _pyarrow()
    rows_digest = hashlib.sha256()
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            claimed = (file.metadata.metadata or {}).get(FIELD.encode())
            for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP):
                for row in map(_without_none, batch.to_pylist(maps_as_pydicts="strict")):
                    if claimed is not None:
                        rows_digest.update(msgspec.json.encode(row))
                    yield row
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(path, f"cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    if claimed not in (None, rows_digest.hexdigest().encode()):
        raise InputError(path, "its rows do not match their digest: the file is damaged")


def write_rows(path: str | os.PathLike, rows: Iterable[dict], kind: Format) -> int:
    """Write JSONL or Parquet aside, then rename. Returns the number written."""
    with replacing(path) as file:
        return (_write_parquet if Path(path).suffix == ".parquet" else _write_jsonl)(file, rows, kind)


def _write_jsonl(file: BinaryIO, rows: Iterable[dict], kind: Format) -> int:
    count = 0
    for row in rows:
        file.write(seal(msgspec.json.encode(row) + b"\n"))
        count += 1
    return count


def _write_parquet(file: BinaryIO, rows: Iterable[dict], kind: Format) -> int:
    pa = _pyarrow()
    schema = _parquet_schema(pa, kind)
    count, rows, rows_digest = 0, iter(rows), hashlib.sha256()
    with pa.parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            table = pa.Table.from_pylist(group, schema=schema)
            writer.write_table(table)
            for row in table.to_pylist(maps_as_pydicts="strict"):
                rows_digest.update(msgspec.json.encode(_without_none(row)))
            count += len(group)
        writer.add_key_value_metadata({FIELD: rows_digest.hexdigest()})
    return count


def read_any(path: str | os.PathLike, kind: Format) -> Iterator[Trajectory]:
    """Trajectories of a file in any of the formats. Raises InputError naming file, row and field."""
    for number, row in read_rows(path):
        if kind == "swirl":
            yield decode_trajectory(msgspec.json.encode(row), path, number)
        else:
            yield (from_messages if kind == "messages" else from_trl)(row, path, number)


def main(config: FormatsConfig) -> None:
    if config.data.resolve() == config.out.resolve():
        raise ConfigError("--data and --out must be two different files")
    counts: Counter[str] = Counter()

    def rows():
        for trajectory in read_any(config.data, config.read):
            counts["read"] += 1
            if config.write == "swirl":
                yield msgspec.to_builtins(trajectory)
            elif config.write == "messages":
                yield to_messages(trajectory)
            elif (row := to_trl(trajectory)) is not None:
                yield row
            else:
                counts["left_out_unjudged"] += 1
        if not counts["read"]:
            raise InputError(config.data, "expected at least one trajectory, the file is empty")

    try:
        written = write_rows(config.out, rows(), config.write)
    except OSError as error:
        raise ConfigError(f"{config.out}: cannot be written ({error.strerror or error})") from None
    sys.stdout.write(msgspec.json.encode({"written": written, **counts}).decode() + "\n")


if __name__ == "__main__":
    command.run(main, FormatsConfig, __doc__)
