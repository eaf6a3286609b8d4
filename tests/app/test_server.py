"""The server in this process: what it holds back, refuses, and lets go of."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import aiohttp
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
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield server, engine, session
    finally:
        await runner.cleanup()


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
