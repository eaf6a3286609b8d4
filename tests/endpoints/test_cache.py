"""Paid answers, kept: on disk before they are used, whatever happens to the process or to the file."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

import pytest

from benchmarks.fault_server import FaultServer
from swirl.endpoints.cache import AnswerCache
from swirl.endpoints.client import Client
from swirl.endpoints.endpoint import Endpoint
from swirl.errors import EndpointError, InputError

CHAT = "/v1/chat/completions"


def endpoint(url: str) -> Endpoint:
    return Endpoint(url, backoff_s=0.01, read_s=5.0)


def prompt(text: str = "hello") -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def test_answers_outlive_the_client(tmp_path):
    server, path = FaultServer(), tmp_path / "deep" / "answers.sqlite"

    async def run(client, where):
        async with client:
            return await client.post(where, CHAT, prompt())

    async def all_of_it():
        async with server:
            where = endpoint(server.url)
            first = await run(Client(path), where)
            again = Client(path)
            assert await run(again, where) == first
            assert (again.progress.cached, again.progress.done) == (1, 1)
            assert await run(again, where) == first  # opened anew after it was closed

    asyncio.run(all_of_it())
    assert len(server.log) == 1


def test_an_answer_is_on_disk_before_it_is_used(tmp_path):
    path = tmp_path / "answers.sqlite"

    async def run():
        async with FaultServer() as server, Client(path) as client:
            where = endpoint(server.url)

            async def used(k):
                await client.post(where, CHAT, prompt(str(k)))
                with sqlite3.connect(path) as other:
                    return other.execute("SELECT count(*) FROM answers").fetchone()[0]

            for expected in range(1, 4):
                assert await used(expected) == expected
            assert min(await asyncio.gather(*(used(k) for k in range(10, 60)))) >= 4

    asyncio.run(run())


def test_failures_are_not_kept(tmp_path):
    made = iter([{"error": {"message": "overloaded"}}, "ok"])

    def answer(path, payload):
        return next(made)

    server = FaultServer(answer, script=["not_json"])

    async def run():
        async with server, Client(tmp_path / "answers.sqlite") as client:
            where = endpoint(server.url)
            for _ in range(2):
                with pytest.raises(EndpointError, match="JSON|overloaded"):
                    await client.post(where, CHAT, prompt())
            return await client.post(where, CHAT, prompt())

    assert asyncio.run(run()) == "ok"


@pytest.mark.parametrize("damage", ["garbage", "version", "table", "folder"])
def test_a_cache_that_is_none_of_ours_is_refused(tmp_path, damage):
    path = tmp_path / "answers.sqlite"
    if damage == "garbage":
        path.write_bytes(b"not a database, but long enough to be looked at" * 50)
    elif damage == "folder":
        path.mkdir()
    else:
        database = sqlite3.connect(path)
        database.execute("PRAGMA user_version=99" if damage == "version" else "CREATE TABLE notes (text)")
        database.close()
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(InputError, match="answer cache"):
        AnswerCache(path)
    assert before is None or path.read_bytes() == before


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    async def run():
        cache = AnswerCache(tmp_path / "answers.sqlite")
        try:
            await cache.put(b"k", b"first")
            await asyncio.gather(cache.put(b"k", b"second"), cache.put(b"l", b"third"))
            assert cache.get(b"k") == b"first" and len(cache) == 2
            cache._writer_connection.execute("PRAGMA query_only=1")
            with pytest.raises(InputError, match="cannot be written"):
                await cache.put(b"m", b"fourth")
        finally:
            await cache.close()

    asyncio.run(run())


KILLED = """
import asyncio, sys
from benchmarks.client import items
from swirl.endpoints.client import Client
from swirl.endpoints.endpoint import Endpoint
from swirl.judging.judges import GenerativeJudge
from swirl.endpoints.chat import ChatPolicy

async def main(url, cache):
    async with Client(cache) as client:
        judge = GenerativeJudge(ChatPolicy(Endpoint(url, concurrency=16), "judge", client, details=False))
        async def one(item):
            await judge.judge(item)
            print("used", flush=True)
        await asyncio.gather(*(one(item) for item in items(300)))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_nothing_is_paid_twice_across_kill_9(tmp_path):
    path = tmp_path / "answers.sqlite"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def rows():
        with sqlite3.connect(path) as database:
            return {key for (key,) in database.execute("SELECT key FROM answers")}

    async def start(url):
        command = [sys.executable, "-c", KILLED, url, str(path)]
        return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)

    async def run():
        async with FaultServer(latency_s=0.02) as server:
            kept = set()
            for used_before_kill in (20, 90):
                child = await start(server.url)
                used = 0
                while used < used_before_kill:
                    assert (await child.stdout.readline()).strip() == b"used"
                    used += 1
                child.kill()
                used += (await child.stdout.read()).count(b"used")
                await child.wait()
                assert kept <= rows() and len(rows()) >= used
                kept = rows()
            assert len(kept) < 300
            asked = len(server.log)
            child = await start(server.url)
            used = (await child.stdout.read()).count(b"used")
            assert await child.wait() == 0 and used == 300
            assert len(server.log) - asked == 300 - len(kept)  # what was kept was not asked again
            return len(rows())

    assert asyncio.run(run()) == 300


def flipped(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("where", ["answer", "key", "index", "page"])
def test_a_damaged_row_or_page_is_a_miss_and_is_mended(tmp_path, where, caplog):
    path = tmp_path / "answers.sqlite"
    rows = {f"key {k:04} ".encode() * 4: f"answer {k:04}".encode() * 9 for k in range(60)}

    async def use(keys):
        cache = AnswerCache(path)
        try:
            found = {key: cache.get(key) for key in keys}
            await asyncio.gather(*(cache.put(key, rows[key]) for key, answer in found.items() if answer is None))
            return found
        finally:
            await cache.close()

    assert set(asyncio.run(use(rows)).values()) == {None}
    content, key = path.read_bytes(), b"key 0030 " * 4
    places = {"answer": content.index(b"answer 0030"), "key": content.index(key)}
    places |= {"index": content.rindex(key) + 5, "page": content.index(b"answer 0030") // 4096 * 4096}
    flipped(path, places[where], 0xFF if where == "page" else 1)
    found = asyncio.run(use(rows))
    assert all(answer in (None, rows[key]) for key, answer in found.items())
    assert where not in ("answer", "page") or None in found.values()
    asyncio.run(use(rows))  # a rebuilt file may lack rows that the damage hid
    assert asyncio.run(use(rows)) == rows
