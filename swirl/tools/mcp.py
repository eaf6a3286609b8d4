"""Tools of servers that speak the Model Context Protocol: `mcp+http://host/mcp`, or `mcp+stdio:COMMAND`.

The official SDK does the talking. A session is opened once and lives as long as the event loop it was opened in; what
fails after that, the server's death included, is a result that the model can read.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from typing import Any

import msgspec

from swirl.errors import ConfigError, EndpointError
from swirl.rollout.tool import Tool

OPENING_S = 30.0  # a server that has not introduced itself by then is not there; ours


async def open_mcp_tools(spec: str, *, timeout_s: float = 60.0, max_characters: int = 20_000) -> tuple[Tool, ...]:
    """All tools that the server offers, each with these limits. Raises ConfigError where the spec cannot be read or the
    SDK is not installed, EndpointError where there is no such server, or none with tools.
    """
    session = _Session(_address(spec), spec)
    tools = await session.open()
    if not tools:
        raise EndpointError(spec, "the server offers no tools")
    return tuple(_tool(session, offered, timeout_s, max_characters) for offered in tools)


def _address(spec: str) -> Any:
    try:
        from mcp import StdioServerParameters
    except ImportError:
        raise ConfigError(f"--tool {spec}: needs the package mcp: pip install 'swirl[mcp]'") from None
    if not spec.startswith("mcp+stdio:"):
        return spec.removeprefix("mcp+")
    words = shlex.split(spec.removeprefix("mcp+stdio:"))
    if not words:
        raise ConfigError(f"--tool {spec}: expected mcp+stdio:COMMAND")
    return StdioServerParameters(command=words[0], args=words[1:])


class _Session:
    """One connection, held by a task of its own: the SDK's contexts must be left by the task that entered them."""

    def __init__(self, address: Any, spec: str):
        self.address, self.spec = address, spec

    async def open(self) -> list[Any]:
        """The tools offered. Raises EndpointError."""
        opened = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._hold(opened))
        try:
            async with asyncio.timeout(OPENING_S):
                return await opened
        except TimeoutError:
            self._task.cancel()
            raise EndpointError(self.spec, f"no answer within {OPENING_S:g} s") from None

    async def _hold(self, opened: asyncio.Future) -> None:
        from mcp import Client

        try:
            async with Client(self.address) as self.client:
                opened.set_result(list((await self.client.list_tools()).tools))
                await asyncio.Event().wait()  # until the event loop ends and cancels this task
        except Exception as error:
            if not opened.done():
                opened.set_exception(EndpointError(self.spec, f"cannot be opened ({_innermost(error)})"))

    async def call(self, name: str, arguments: dict[str, Any]) -> str:
        if self._task.done():
            return "error: the server is gone"
        result = await self.client.call_tool(name, arguments)
        parts = [getattr(part, "text", None) or f"({part.type})" for part in result.content]
        text = "\n".join(parts)
        return f"error: {text}" if result.is_error else text


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _tool(session: _Session, offered: Any, timeout_s: float, max_characters: int) -> Tool:
    read, shown = _argument_reader(offered.input_schema or {})

    async def run(text: str) -> str:
        return await session.call(offered.name, read(text))

    description = " ".join((offered.description or offered.title or "").partition("\n\n")[0].split())
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", offered.name)
    limits = {"timeout_s": timeout_s, "max_characters": max_characters}
    return Tool(name=name, run=run, description=description, argument=shown, **limits)


def _argument_reader(schema: dict[str, Any]) -> tuple[Callable[[str], dict[str, Any]], str]:
    """(from the text between the tags to the tool's arguments, how the prompt shows that text): the text itself where
    one text is all that the tool must be given, else a JSON object.
    """
    properties = schema.get("properties") or {}
    required = schema.get("required") or list(properties)
    if len(required) == 1 and properties.get(required[0], {}).get("type") == "string":
        return lambda text: {required[0]: text}, required[0]
    shown = ", ".join(f'"{name}": {about.get("type", "value")}' for name, about in properties.items())
    return lambda text: msgspec.json.decode(text, type=dict[str, Any]), f"{{{shown}}}"
