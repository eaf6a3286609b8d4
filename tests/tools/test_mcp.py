"""Tools of an MCP server of the official SDK, over stdio and over HTTP."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytest.importorskip("mcp")

from swirl.errors import ConfigError, EndpointError
from swirl.rollout.rollout import RolloutSpec, rollout
from swirl.rollout.task import Task
from swirl.tools.mcp import open_mcp_tools
from swirl.trajectories.record import Question, Step

SERVER = """
import os, sys, time
from mcp.server import MCPServer

server = MCPServer("cities")

@server.tool()
def country(city: str) -> str:
    '''The country of a city.

    Of some cities.'''
    return {"Oslo": "Norway", "Far": "x" * 100}[city]

@server.tool()
def add(a: int, b: int = 1) -> int:
    "Add."
    return a + b

@server.tool()
def slow(text: str) -> str:
    "Never done."
    time.sleep(60)

@server.tool()
def leave(text: str) -> str:
    "Die."
    os._exit(1)

if len(sys.argv) > 1:
    server.run("streamable-http", port=int(sys.argv[1]))
else:
    server.run()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


def test_a_server_over_stdio_serves_a_tool_to_a_rollout(script):
    question = Question(id="q", task="t", question="Which country has Oslo?", answer="Norway")
    lines = ["<country>Oslo</country>", "<country>Rome</country>", '<add>{"a": 2}</add>', "<answer>Norway</answer>"]

    class Script:
        name = "script"

        async def act(self, state):
            return Step(action=lines[len(state.steps)])

    async def play():
        tools = await open_mcp_tools(f"mcp+stdio:{sys.executable} {script}")
        task = Task(name="t", questions={"test": [question]}, tools=tools, score=lambda q, a: float(a == q.answer))
        return await rollout(question, 0, RolloutSpec(task=task, policy=Script(), max_steps=5))

    made = asyncio.run(play())
    assert "<country>…</country> The country of a city.\n" in made.prompt and "<country>city</country>" in made.prompt
    assert made.steps[0].observation == "Oslo -> Norway" and made.steps[2].observation == '{"a": 2} -> 3'
    assert made.steps[1].observation.startswith("Rome -> error: ") and made.outcome is True


def test_limits_and_the_server_s_death_are_results(script):
    async def calls():
        spec = f"mcp+stdio:{sys.executable} {script}"
        tools = {tool.name: tool for tool in await open_mcp_tools(spec, timeout_s=5, max_characters=60)}
        cut, hasty = await tools["country"]("Far"), replace(tools["slow"], timeout_s=0.1)
        return cut, await hasty("x"), await tools["leave"]("x"), await tools["country"]("Oslo")

    cut, slow, died, after = asyncio.run(calls())
    assert cut == "x" * 60 + " … (cut at 60 characters)" and slow == "error: no result within 0.1 s"
    assert died.startswith("error: ") and after.startswith("error: ")


def test_a_server_over_http(script):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(script), str(port)], stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not _answers(port):
            time.sleep(0.1)

        async def call():
            tools = {tool.name: tool for tool in await open_mcp_tools(f"mcp+http://127.0.0.1:{port}/mcp")}
            return await tools["country"]("Oslo")

        assert asyncio.run(call()) == "Norway"
    finally:
        process.kill()
        process.wait()


def _answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_what_is_no_server_is_one_line():
    for spec, error in (
        ("mcp+stdio:", ConfigError),
        ("mcp+stdio:/no/such/command", EndpointError),
        ("mcp+http://127.0.0.1:9/mcp", EndpointError),
        (f"mcp+stdio:{sys.executable} -c 0", EndpointError),
    ):
        with pytest.raises(error) as caught:
            asyncio.run(open_mcp_tools(spec))
        assert "\n" not in str(caught.value)
