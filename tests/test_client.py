"""The client against a real server on loopback that fails on purpose."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import items
from benchmarks.fault_server import FAULTS, FaultServer, verdict_of
from swirl.environment import client as client_module
from swirl.environment.batcher import Batcher, embedder, retriever
from swirl.environment.cache import AnswerCache, default_cache_path
from swirl.environment.client import Client, Endpoint, retry_after_s
from swirl.environment.judge import GenerativeJudge, judge_all
from swirl.environment.lane import Rate
from swirl.environment.policy import ChatPolicy
from swirl.errors import ConfigError, EndpointError, EndpointUnusable, InputError

CHAT = "/v1/chat/completions"


def endpoint(url: str, **changes) -> Endpoint:
    return Endpoint(url, **{"backoff_s": 0.01, "read_s": 5.0, "retries": 5, **changes})


def prompt(text: str = "hello") -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def content(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def ask_once(server: FaultServer, **changes):
    """(answer or EndpointError, client's progress) of one request."""

    async def run():
        async with server, Client() as client:
            try:
                answer = await client.post(endpoint(server.url, **changes), CHAT, prompt())
            except EndpointError as error:
                answer = error
            return answer, client.progress

    return asyncio.run(run())


@pytest.mark.parametrize("fault", ["429", "500", "reset", "truncated"])
def test_tries_again_after(fault):
    server = FaultServer(script=[fault, "ok"], retry_after="0.01")
    answer, progress = ask_once(server)
    assert content(answer).endswith(verdict_of("hello"))
    assert [what for _, what in server.log] == [fault, "ok"]
    assert (progress.done, progress.retried, progress.failed, progress.in_flight) == (1, 1, 0, 0)


@pytest.mark.parametrize("fault, status", [("stall", None), ("not_json", 200), ("418", 418)])
def test_does_not_try_again_after(fault, status):
    server = FaultServer(script=[fault])
    error, progress = ask_once(server, read_s=0.2)
    assert isinstance(error, EndpointError) and not isinstance(error, EndpointUnusable)
    assert error.status == status and error.endpoint == server.url and "\n" not in str(error)
    assert len(server.log) == 1 and progress.failed == 1 and progress.retried == 0


def test_gives_up_after_the_retries():
    server = FaultServer(faults=1.0, kinds=["500"])
    answered = FaultServer(script=["ok"] + ["500"] * 5 + ["ok"] * 9)

    async def run():
        async with answered, Client() as client:
            where = endpoint(answered.url)
            await client.post(where, CHAT, prompt("first"))
            return await client.post(where, CHAT, prompt("second"))

    assert content(asyncio.run(run())).endswith(verdict_of("second"))
    error, _ = ask_once(server, patience_s=0.2)
    assert isinstance(error, EndpointUnusable) and "HTTP 500" in error.reason


def test_honours_retry_after():
    server = FaultServer(script=["429", "ok"], retry_after="0.3")
    started = time.monotonic()
    answer, _ = ask_once(server)
    assert content(answer) and time.monotonic() - started >= 0.3
    error, _ = ask_once(FaultServer(script=["429"], retry_after="3600"), patience_s=10)
    assert isinstance(error, EndpointError) and error.status == 429


def test_retry_after_forms():
    assert retry_after_s("2") == 2 and retry_after_s("0.5") == 0.5
    assert 50 < retry_after_s(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))) <= 60
    for nothing in (None, "", "soon", "-5", "nan", "inf", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Foo"):
        assert retry_after_s(nothing) == 0


def test_many_429_cost_no_retries():
    server = FaultServer(script=["ok"] + ["429"] * 12, retry_after="0.01")

    async def run():
        async with server, Client() as client:
            where = endpoint(server.url)
            return [await client.post(where, CHAT, prompt(str(k))) for k in range(2)]

    assert len(asyncio.run(run())) == 2 and len(server.log) == 14


def test_identical_requests_in_flight_are_asked_once():
    server = FaultServer(latency_s=0.05)

    async def run():
        async with server, Client() as client:
            where = endpoint(server.url)
            answers = await asyncio.gather(*(client.post(where, CHAT, prompt()) for _ in range(10)))
            await client.post(where, CHAT, prompt(), draw=1)
            return answers, client.progress.coalesced

    answers, coalesced = asyncio.run(run())
    assert len(server.log) == 2 and coalesced == 9 and all(answer == answers[0] for answer in answers)


def test_cancelling_one_of_two_waiters_leaves_the_other_its_answer():
    server = FaultServer(latency_s=0.1)

    async def run():
        async with server, Client() as client:
            first, second = (asyncio.create_task(client.post(endpoint(server.url), CHAT, prompt())) for _ in "ab")
            await asyncio.sleep(0.03)
            first.cancel()
            answer = await second
            assert first.cancelled()
            return answer

    assert content(asyncio.run(run())) and len(server.log) == 1


def test_cancellation_is_clean():
    server = FaultServer(latency_s=30.0)

    async def run():
        async with server:
            async with Client() as client:
                where = endpoint(server.url, concurrency=4)
                tasks = [asyncio.create_task(client.post(where, CHAT, prompt(str(k)))) for k in range(10)]
                await asyncio.sleep(0.1)
                for task in tasks:
                    task.cancel()
                assert all(
                    isinstance(r, asyncio.CancelledError) for r in await asyncio.gather(*tasks, return_exceptions=True)
                )
                await asyncio.sleep(0.05)
                assert client.progress.in_flight == 0 and server.in_flight == 0
                server.latency_s = 0.0
                assert await client.post(where, CHAT, prompt("0"))  # its slots are free again
                server.latency_s = 30.0
                asyncio.create_task(client.post(where, CHAT, prompt("closed over")))
                await asyncio.sleep(0.05)
            assert client.progress.in_flight == 0
        await asyncio.sleep(0.05)
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert asyncio.run(run()) == []


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


def test_one_client_in_two_event_loops(tmp_path):
    client, threshold = Client(tmp_path / "answers.sqlite"), gc.get_threshold()

    async def run(text):
        async with FaultServer() as server, client:
            return await client.post(endpoint(server.url), CHAT, prompt(text))

    assert asyncio.run(run("a")) and asyncio.run(run("b"))
    assert gc.get_threshold() == threshold


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


def test_default_cache_path(monkeypatch, tmp_path):
    monkeypatch.setenv("SWIRL_CACHE", str(tmp_path / "mine"))
    assert default_cache_path() == tmp_path / "mine"
    monkeypatch.delenv("SWIRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_path() == tmp_path / "swirl" / "answers.sqlite"


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
from swirl.environment.client import Client, Endpoint
from swirl.environment.judge import GenerativeJudge
from swirl.environment.policy import ChatPolicy

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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

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


@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_every_fault_ends_in_a_verdict_or_a_mask(tmp_path, latency_s):
    server = FaultServer(latency_s=latency_s, faults=0.3, stall_s=3.0, retry_after="0.05", seed=int(latency_s * 100))

    async def run():
        async with server, Client(tmp_path / "answers.sqlite") as client:
            where = endpoint(server.url, read_s=1.0, concurrency=32)
            judge = GenerativeJudge(ChatPolicy(where, "judge", client, details=False))
            return await judge_all(judge, items(400), concurrency=64), judge.masked, client.progress

    judgements, masked, progress = asyncio.run(run())
    assert len(judgements) == 400
    assert sum(judgement.verdict is None for judgement in judgements) == masked > 0
    seen = server.summary()
    assert set(seen["faults"]) == set(FAULTS) and seen["answered_twice"] == 0
    assert seen["successes"] == progress.done == 400 - masked and seen["most_in_flight"] <= 32 + seen["faults"]["stall"]


def test_concurrency_is_held():
    server = FaultServer(latency_s=0.02)

    async def run():
        async with server, Client() as client:
            where = endpoint(server.url, concurrency=17)
            await asyncio.gather(*(client.post(where, CHAT, prompt(str(k))) for k in range(120)))

    asyncio.run(run())
    assert server.most_in_flight == 17 and len(server.log) == 120


@given(
    st.floats(0.5, 10_000),
    st.lists(st.tuples(st.floats(0, 20), st.floats(0.01, 3)), min_size=1, max_size=200),
)
def test_no_minute_has_more_than_its_limit(per_minute, arrivals):
    rate, now, gone = Rate(per_minute), 100.0, []
    for gap_s, units in arrivals:
        now += gap_s
        gone.append((now + rate.reserve(units, now), units))
    gone.sort()
    for k, (start, _) in enumerate(gone):
        # one request may begin while nothing is owed and pay afterwards: hence the last one's units
        inside = [units for when, units in gone[k:] if when < start + 60 - 1e-6]
        assert sum(inside[:-1]) <= per_minute * (1 + 1e-6) + max(1.0, max(inside))


def test_rate_is_used_up_to_its_limit():
    rate = Rate(600)
    waits = [rate.reserve(1, 0.0) for _ in range(20)]
    assert waits[:10] == [0.0] * 10
    assert waits[10:] == pytest.approx([(k + 1) / rate.per_second for k in range(10)])
    rate.correct(-5)
    assert rate.reserve(1, 0.0) == pytest.approx(waits[-1] - 4 / rate.per_second)
    assert Rate(1).reserve(1, 0.0) == 0.0


def test_requests_and_tokens_a_minute_are_waited_for():
    server = FaultServer()

    async def run(**limits):
        async with server, Client() as client:
            where = endpoint(server.url, **limits)
            started = time.monotonic()
            await asyncio.gather(*(client.post(where, CHAT, prompt(str(k)), tokens=100) for k in range(5)))
            return time.monotonic() - started

    # 120 a minute: two at once, then one each 0.508 s; the fifth waits for three of those
    assert asyncio.run(run(requests_per_minute=120)) > 1.4
    # each reserves some 117 tokens: 333 at once, then 328 a second
    assert asyncio.run(run(tokens_per_minute=20_000)) > 0.3


def test_an_outage_costs_time_and_no_request(caplog):
    port = None

    async def run():
        nonlocal port
        server = FaultServer()
        async with Client() as client:
            url = await server.start()
            port = server.port
            where = endpoint(url, concurrency=8, connect_s=1.0)
            await client.post(where, CHAT, prompt("before"))
            await server.stop()
            tasks = [asyncio.create_task(client.post(where, CHAT, prompt(str(k)))) for k in range(30)]
            await asyncio.sleep(1.5)  # all five retries take less
            assert not any(task.done() for task in tasks)
            await server.start(port)
            answers = await asyncio.gather(*tasks)
            await server.stop()
            return answers

    with caplog.at_level(logging.WARNING, "swirl.client"):
        assert len(asyncio.run(run())) == 30
    assert "pausing" in caplog.text and "answers again" in caplog.text


def test_an_outage_beyond_patience_ends_the_job():
    async def run():
        server = FaultServer()
        async with Client() as client:
            where = endpoint(await server.start(), patience_s=0.3)
            await client.post(where, CHAT, prompt("before"))
            await server.stop()
            asked = [client.post(where, CHAT, prompt(str(k))) for k in range(20)]
            return await asyncio.gather(*asked, return_exceptions=True)

    errors = asyncio.run(run())
    assert all(isinstance(error, EndpointError) for error in errors)
    assert sum(isinstance(error, EndpointUnusable) for error in errors) >= 15


def test_a_server_that_never_answered_is_given_up_soon():
    async def run():
        server = FaultServer()
        url = await server.start()
        await server.stop()
        async with Client() as client:
            asked = [client.post(endpoint(url), CHAT, prompt(str(k))) for k in range(50)]
            return await asyncio.gather(*asked, return_exceptions=True)

    errors = asyncio.run(run())
    assert all(isinstance(error, EndpointUnusable) and "cannot connect" in error.reason for error in errors)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_or_model_ends_the_job(status):
    server = FaultServer(script=[str(status)] * 9)

    async def run():
        async with server, Client() as client:
            where = endpoint(server.url, concurrency=1)
            asked = [client.post(where, CHAT, prompt(str(k))) for k in range(5)]
            return await asyncio.gather(*asked, return_exceptions=True)

    errors = asyncio.run(run())
    assert all(isinstance(error, EndpointUnusable) and f"HTTP {status}" in error.reason for error in errors)
    assert len(server.log) == 1


def test_keys_reach_the_server_and_nothing_else(tmp_path, monkeypatch, caplog):
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("TEST_KEY", secret)

    def echo(path, payload):
        text = payload["messages"][0]["content"]
        if text == "bad":
            return web.Response(status=400, text=f"your key {secret} may not do that")
        return {"choices": [], "echo": secret}

    server, path = FaultServer(echo), tmp_path / "answers.sqlite"
    server.keep_requests = True

    async def run():
        async with server, Client(path) as client:
            where = endpoint(server.url, key_env="TEST_KEY")
            google = endpoint(server.url, key_env="TEST_KEY", key_header="x-goog-api-key")
            answers = [
                await client.post(where, CHAT, prompt("fine")),
                await client.post(google, CHAT, prompt("too")),
            ]
            with pytest.raises(EndpointError) as caught:
                await client.post(where, CHAT, prompt("bad"))
            return answers, caught.value, repr(where)

    with caplog.at_level(logging.DEBUG):
        answers, error, shown = asyncio.run(run())
    assert server.headers[0]["Authorization"] == f"Bearer {secret}"
    assert server.headers[1]["x-goog-api-key"] == secret and "Authorization" not in server.headers[1]
    kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for text in (
        str(answers),
        str(error),
        repr(error.__dict__),
        repr(error.__context__),
        shown,
        caplog.text,
        str(kept),
    ):
        assert secret not in text
    assert "***" in str(error)


def test_a_missing_key_is_one_clear_line(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)

    async def run(**key):
        async with Client() as client:
            await client.post(endpoint("http://127.0.0.1:9", **key), CHAT, prompt())

    with pytest.raises(ConfigError, match=r"\$NO_SUCH_KEY is not set"):
        asyncio.run(run(key_env="NO_SUCH_KEY"))
    monkeypatch.setenv("BAD_KEY", "two\nlines-of-secret")
    with pytest.raises(ConfigError) as caught:
        asyncio.run(run(key_env="BAD_KEY"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "ftp://host",
        "http://",
        "http://user:pass@host/v1",
        "https://host/v1?key=s3cret",
        "http://h:99999/v1",
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError) as caught:
        Endpoint(url)
    assert "s3cret" not in str(caught.value) and "pass@" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [{"concurrency": 0}, {"read_s": 0}, {"retries": 1}, {"requests_per_minute": 0}, {"batch_ms": -1}],
)
def test_endpoint_values_that_cannot_be_meant(change):
    with pytest.raises(ConfigError):
        Endpoint("http://host/v1", **change)


def test_an_endless_answer_is_cut(monkeypatch):
    monkeypatch.setattr(client_module, "_LARGEST_ANSWER_BYTES", 10_000)

    def flood(path, payload):
        return web.Response(body=b"[" + b"1," * 100_000)

    error, _ = ask_once(FaultServer(flood))
    assert isinstance(error, EndpointError) and error.reason.startswith("answer above")


def test_redirects_are_not_followed():
    def elsewhere(path, payload):
        return web.Response(status=307, headers={"Location": "http://127.0.0.1:9/"})

    error, _ = ask_once(FaultServer(elsewhere))
    assert isinstance(error, EndpointError) and error.status == 307


def test_progress_in_one_line():
    _, progress = ask_once(FaultServer(script=["500", "ok"]))
    assert (progress.prompt_tokens, progress.completion_tokens) == (1, 12)
    assert progress.text() == "1 done · 0 in flight · 1 retried · 0 failed · 13 tokens"
    assert progress.text(1).endswith("0:00 left") and progress.text(1).startswith("1/1 done")
    assert progress.eta_s(101) > progress.eta_s(2) > 0


def embeddings(path, payload):
    texts = payload["input"]
    if "bad" in texts:
        return web.Response(status=400, text="an item is bad")
    data = [{"index": k, "embedding": [float(len(text)), 1.0]} for k, text in enumerate(texts)]
    return {"data": data[::-1]}


def test_micro_batches(tmp_path):
    server = FaultServer(embeddings)
    server.keep_requests = True

    async def run():
        async with server, Client(tmp_path / "answers.sqlite") as client:
            embed = embedder(client, endpoint(server.url, batch_size=16), "model")
            texts = ["x" * k for k in range(1, 51)]
            assert await embed(texts) == [[float(k), 1.0] for k in range(1, 51)]
            assert [len(body["input"]) for body in server.bodies] == [16, 16, 16, 2]
            assert await embed(texts[::-1] + ["new"]) == [[float(k), 1.0] for k in range(50, 0, -1)] + [[3.0, 1.0]]
            assert server.bodies[4:] == [{"model": "model", "input": ["new"]}]
            answers = await asyncio.gather(*(embed([text]) for text in ("good", "bad", "fine")), return_exceptions=True)
            assert answers[0] == [[4.0, 1.0]] and answers[2] == answers[0]
            assert isinstance(answers[1], EndpointError) and answers[1].status == 400
            cancelled = asyncio.create_task(embed(["never sent"]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.sleep(0.05)
            assert not any("never sent" in body["input"] for body in server.bodies)

    asyncio.run(run())


def test_retrieval_queries_share_a_request():
    def found(path, payload):
        return {"result": [[f"{query} {payload['topk']}"] for query in payload["queries"]]}

    server = FaultServer(found)

    async def run():
        async with server, Client() as client:
            post_json = retriever(client, endpoint(f"{server.url}/retrieve"))
            asked = [{"queries": [f"q{k}"], "topk": 1 + k % 2} for k in range(10)]
            answers = await asyncio.gather(*(post_json(f"{server.url}/retrieve", payload) for payload in asked))
            assert answers == [{"result": [[f"q{k} {1 + k % 2}"]]} for k in range(10)]
            with pytest.raises(ConfigError):
                await post_json("http://elsewhere/", asked[0])

    asyncio.run(run())
    assert len(server.log) == 2


def test_an_answer_with_too_few_parts_is_refused():
    async def run():
        async with FaultServer(lambda path, payload: {"parts": [1]}) as server, Client() as client:
            batcher = Batcher(
                client,
                endpoint(server.url),
                "",
                join=lambda all_of, _: all_of,
                split=lambda answer: answer["parts"],
            )
            return await asyncio.gather(*(batcher.ask(k) for k in range(3)), return_exceptions=True)

    errors = asyncio.run(run())
    assert all(isinstance(error, EndpointError) and "expected 3 parts" in error.reason for error in errors)


def test_an_answer_that_drips_in_is_cut_at_the_total_deadline():
    async def run():
        async def drip(request):
            await request.read()
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(100):
                await response.write(b"[")
                await asyncio.sleep(0.05)
            return response

        runner = web.ServerRunner(web.Server(drip), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0]
        async with Client() as client:
            with pytest.raises(EndpointError, match="no answer within 0.3 s"):
                await client.post(endpoint(f"http://{host}:{port}", total_s=0.3), CHAT, prompt())
        await runner.cleanup()

    asyncio.run(run())
