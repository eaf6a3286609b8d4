"""What a policy may call: a function with a name and a tag, with limits on its time and the size of its result."""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import msgspec

from swirl.errors import ConfigError, EndpointError, SwirlError
from swirl.trajectories.actions import ANSWER, action_text

_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@dataclass(frozen=True, eq=False)
class Tool:
    """The model calls it by `<tag>argument</tag>` and reads what `run(argument)` returns, as text.

    `run` is a plain or an async function; a plain one runs in a thread, one call at a time. `description` is what the
    prompt says of the tool, `argument` the word for what goes between the tags, and `verb`, where there is one, what
    calling it is called. The tag is the name unless given.

    What goes wrong (an exception, no result after `timeout_s` seconds) is a result that the model can read, and results
    are cut at `max_characters`; both limits are ours. Raises ConfigError where the name or the tag cannot be used.
    """

    name: str
    run: Callable[[str], Any]
    tag: str = ""
    description: str = ""
    argument: str = "text"
    verb: str | None = None
    timeout_s: float | None = 60.0
    max_characters: int = 20_000
    _locks: weakref.WeakKeyDictionary = field(default_factory=weakref.WeakKeyDictionary, init=False, repr=False)

    def __post_init__(self):
        if not self.tag:
            object.__setattr__(self, "tag", self.name)
        for what, value in (("name", self.name), ("tag", self.tag)):
            if not value or not _NAME_CHARACTERS.issuperset(value) or value == ANSWER:
                raise ConfigError(
                    f"tool '{self.name}': the {what} '{value}' cannot be used, expected letters, digits, _ or -, and "
                    f"not '{ANSWER}'"
                )

    @classmethod
    def from_function(cls, function: Callable[..., Any], **fields: Any) -> Tool:
        """A Tool of a function: its name, its docstring's first paragraph, its parameters; `fields` replace those.

        A function of one parameter is given the text between the tags, read as the parameter's type; one of several is
        given a JSON object of them. Raises ConfigError where its signature or type hints cannot be read.
        """
        name = fields.get("name") or getattr(function, "__name__", type(function).__name__)
        read, argument = _argument_reader(function, name)
        is_async = _is_async(function)

        async def run_async(text: str):
            arguments = read(text)
            return await function(**arguments)

        def run(text: str):
            return function(**read(text))

        description = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
        own = {"name": name, "argument": argument, "description": description}
        return cls(run=run_async if is_async else run, **{**own, **fields})

    def call_text(self, argument: str) -> str:
        """The text of a call of this tool."""
        return action_text(self.name, argument, self.tag)

    async def __call__(self, argument: str) -> str:
        """The result of one call. Raises EndpointError as swirl's own tools do: that a server was down for a moment is
        no result, and leaves the trajectory to the next run.
        """
        try:
            if _is_async(self.run):
                async with asyncio.timeout(self.timeout_s):
                    result = await self.run(argument)
            else:
                async with self._locks.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
                    async with asyncio.timeout(self.timeout_s):
                        result = await _in_thread(self.run, argument)
        except EndpointError:
            raise
        except TimeoutError:
            return f"error: no result within {self.timeout_s:g} s"
        except Exception as error:
            said = str(error) if isinstance(error, SwirlError) else f"{type(error).__name__}: {error}"
            result = f"error: {said}"
        text = result if isinstance(result, str) else "" if result is None else str(result)
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate could not be written down
        if len(text) > self.max_characters:
            text = f"{text[: self.max_characters]} … (cut at {self.max_characters} characters)"
        return text


def as_tools(given: Iterable[Tool | Callable[..., Any]]) -> tuple[Tool, ...]:
    """Each as a Tool. Raises ConfigError where two share a name or a tag."""
    tools = tuple(tool if isinstance(tool, Tool) else Tool.from_function(tool) for tool in given)
    for what in ("name", "tag"):
        values = [getattr(tool, what) for tool in tools]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ConfigError(f"two tools have the {what} '{min(twice)}', expected one each")
    return tools


def _is_async(function: Callable) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _in_thread(function: Callable[[str], Any], argument: str) -> Any:
    """Like asyncio.to_thread, but in a thread that does not keep the process alive when it hangs."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():  # else it took too long
            done.set_result((result, error))

    def work() -> None:
        try:
            outcome = function(argument), None
        except BaseException as error:
            outcome = None, error
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:  # the loop has ended meanwhile
            pass

    threading.Thread(target=work, daemon=True).start()
    result, error = await done
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    return result


def _argument_reader(function: Callable, name: str) -> tuple[Callable[[str], dict[str, Any]], str]:
    """(from the text between the tags to keyword arguments, how the prompt shows that text)."""
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = get_type_hints(function if inspect.isroutine(function) else type(function).__call__)
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"tool '{name}': its signature cannot be read ({error})") from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named or any(p not in named for p in required):
        raise ConfigError(f"tool '{name}': expected a function of at least one named parameter")
    if len(named) == 1:
        only, kind = named[0].name, hints.get(named[0].name, str)

        def read_one(text: str) -> dict[str, Any]:
            return {only: text if kind in (str, Any) else _converted(_json_or_text(text), kind)}

        return read_one, only
    fields = [(p.name, hints.get(p.name, Any), *(() if p.default is p.empty else (p.default,))) for p in named]
    try:
        record = msgspec.defstruct(f"{name}_arguments", fields, forbid_unknown_fields=True, kw_only=True)
    except (TypeError, NameError) as error:
        raise ConfigError(f"tool '{name}': its parameters cannot be read from JSON ({error})") from None

    def read(text: str) -> dict[str, Any]:
        values = _converted(msgspec.json.decode(text), record)
        return {p.name: getattr(values, p.name) for p in named}

    shown = ", ".join(f'"{p.name}": {getattr(hints.get(p.name, str), "__name__", "value")}' for p in named)
    return read, f"{{{shown}}}"


def _json_or_text(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _converted(value: Any, kind: Any) -> Any:
    return msgspec.convert(value, kind, strict=False)
