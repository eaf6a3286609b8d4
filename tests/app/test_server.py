"""The server in this process: what it holds back, refuses, and lets go of."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from swirl.app.resolve import load_model
from swirl.app.server import Piecewise, Server
from swirl.model.tokenizer import Tokenizer
from swirl.sampling.draw import SamplingParams
from swirl.sampling.engine import Engine
from swirl.sampling.in_flight import InFlight


@asynccontextmanager
async def serving(max_concurrency=4):
    """(the server, its engine, a client's session there)."""
    model, tokenizer = load_model("almanac")
    engine = Engine(model, decode=tokenizer.decode)
    limits = dict(max_concurrency=max_concurrency, max_body_bytes=1 << 20)
    server = Server(engine, tokenizer, name="almanac", key=None, **limits)
    runner = server.runner()
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        try:
            yield server, engine, session
        finally:
            await server.drain()
            await runner.cleanup()


async def until(holds):
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def asked(session, path="completions", **fields):
    """(status, answer)"""
    async with session.post(f"/v1/{path}", json=fields) as answer:
        return answer.status, await answer.json()


def test_no_piece_holds_a_beginning_of_the_stop_text():
    tokenizer = load_model("almanac")[1]
    for text, stop in (("abcdef", "abcdef"), ("ab, abcdef", "abcdef"), ("é, é", "é, é"), ("ab", "b")):
        pieces, ids = Piecewise(tokenizer, (stop,)), tokenizer.encode(text)
        sent = [pieces.text_of(tuple(ids[:count])) for count in range(1, len(ids))]
        before = text[: text.index(stop)]
        assert before.startswith("".join(sent)) and "".join(sent) + pieces.rest_of(before) == before


def test_the_text_is_decoded_once_however_many_stop_texts_are_looked_for():
    calls = []
    params = SamplingParams(9, stop_texts=tuple("bcdef"))
    sequence = InFlight(state=None, seed=0, params=params, on_end=print, ids=[1, 2], log_probs=[-1.0, -1.0])
    assert sequence.cut_at_stop_text(0, lambda ids: calls.append(ids) or "a") is None
    assert len(calls) == 1


def test_no_prompt_is_tokenized_of_a_request_too_large_nor_any_where_others_are_answered(monkeypatch):
    threads, encode = [], Tokenizer.encode
    messages = [{"role": "user", "content": "a"}]

    def spied(self, text):
        threads.append(threading.current_thread())
        return encode(self, text)

    async def ask():
        async with serving(max_concurrency=4) as (_, _, session):
            monkeypatch.setattr(Tokenizer, "encode", spied)
            assert (await asked(session, prompt=["a"] * 3, n=2))[0] == 400
            assert (await asked(session, "chat/completions", messages=messages, n=5))[0] == 400
            assert threads == []
            assert (await asked(session, prompt=["a"] * 2, n=2, max_tokens=1))[0] == 200
            assert (await asked(session, "chat/completions", messages=messages, max_tokens=1))[0] == 200
            assert threads and threading.main_thread() not in threads

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_makes_room(stream):
    async def leave():
        async with serving(max_concurrency=4) as (server, engine, session):
            with engine.together():  # nothing is drawn while the body runs
                leaving = asyncio.create_task(asked(session, prompt="a", n=4, stream=stream))
                await until(lambda: server.num_in_flight == 1)
                leaving.cancel()
                await until(lambda: server.num_in_flight == 0)
            assert (await asked(session, prompt="a", n=4, max_tokens=1))[0] == 200

    asyncio.run(leave())


def test_a_client_that_leaves_its_stream_is_no_error(caplog):
    async def leave():
        async with serving(max_concurrency=4) as (server, _, session):
            for _ in range(20):
                long = dict(prompt="a", max_tokens=2000, temperature=100, seed=186, n=4, stream=True)
                answer = await session.post("/v1/completions", json=long)
                await answer.content.readline()
                answer.close()
                await until(lambda: server.num_in_flight == 0)

    asyncio.run(leave())
    assert not caplog.records


def test_the_server_ends_without_a_body_that_is_half_sent():
    async def half():
        yield b"{"
        await asyncio.Event().wait()

    async def send_half():
        async with asyncio.timeout(20), serving() as (server, _, session):
            sending = asyncio.create_task(session.post("/v1/completions", data=half()))
            await until(lambda: server._reading)
        with pytest.raises(aiohttp.ClientConnectionError):
            await sending

    asyncio.run(send_half())


def test_a_body_that_is_not_in_its_encoding_is_refused_and_no_error_of_ours(caplog):
    async def send():
        async with serving() as (_, _, session):
            headers = {"Content-Encoding": "gzip"}
            async with session.post("/v1/completions", data=b"abc", headers=headers) as answer:
                return answer.status, await answer.json()

    status, answer = asyncio.run(send())
    assert status == 400 and "encoding" in answer["error"]["message"]
    assert not caplog.records
