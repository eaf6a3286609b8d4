"""The client against a real server on loopback that fails on purpose."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import items, judge_all
from benchmarks.fault_server import FAULTS, FaultServer, verdict_of
from swirl.endpoints import response as response_module
from swirl.endpoints.chat import ChatPolicy
from swirl.endpoints.client import Client
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.limiter import Rate
from swirl.endpoints.response import retry_after_s
from swirl.endpoints.sender import Progress
from swirl.errors import ConfigError, EndpointError, EndpointUnusable
from swirl.judging.judges import GenerativeJudge

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
    error, _ = ask_once(server, retry_deadline_s=0.2)
    assert isinstance(error, EndpointUnusable) and "HTTP 500" in error.reason


def test_honours_retry_after():
    server = FaultServer(script=["429", "ok"], retry_after="0.3")
    started = time.monotonic()
    answer, _ = ask_once(server)
    assert content(answer) and time.monotonic() - started >= 0.3
    error, _ = ask_once(FaultServer(script=["429"], retry_after="3600"), retry_deadline_s=10)
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


def test_a_kept_answer_that_cannot_be_read_is_asked_for_anew(tmp_path):
    def unreadable(answer):
        raise EndpointError("e", "expected another form")

    async def run():
        async with FaultServer() as server, Client(tmp_path / "answers.sqlite") as client:
            where = endpoint(server.url)
            first = await client.post(where, CHAT, prompt())
            with pytest.raises(EndpointError, match="another form"):
                await client.post(where, CHAT, prompt(), read=unreadable)
            assert await client.post(where, CHAT, prompt(), read=content) == content(first)
            return len(server.log), client.progress

    asked, progress = asyncio.run(run())
    assert asked == 2 and (progress.done, progress.cached, progress.failed) == (2, 1, 1)


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


def test_one_client_in_two_event_loops(tmp_path):
    client, threshold = Client(tmp_path / "answers.sqlite"), gc.get_threshold()

    async def run(text):
        async with FaultServer() as server, client:
            return await client.post(endpoint(server.url), CHAT, prompt(text))

    assert asyncio.run(run("a")) and asyncio.run(run("b"))
    assert gc.get_threshold() == threshold


@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_every_fault_ends_in_a_verdict_or_a_mask(tmp_path, latency_s):
    server = FaultServer(latency_s=latency_s, faults=0.3, stall_s=3.0, retry_after="0.05", seed=int(latency_s * 100))

    async def run():
        async with server, Client(tmp_path / "answers.sqlite") as client:
            where = endpoint(server.url, read_s=1.0, concurrency=32)
            judge = GenerativeJudge(ChatPolicy(where, "judge", client, details=False))
            return await judge_all(judge, items(400), in_flight=64), client.progress

    judgements, progress = asyncio.run(run())
    assert len(judgements) == 400
    masked = sum(judgement.verdict is None for judgement in judgements)
    assert 0 < masked <= progress.failed
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
    assert "; waiting, asked again in" in caplog.text and "answers again" in caplog.text


def test_an_outage_beyond_the_retry_deadline_ends_the_job():
    async def run():
        server = FaultServer()
        async with Client() as client:
            where = endpoint(await server.start(), retry_deadline_s=0.3)
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


def test_a_server_that_hangs_is_given_up_and_one_that_is_slow_at_times_is_not():
    async def run(script, **changes):
        async with FaultServer(script=script) as server, Client() as client:
            where = endpoint(server.url, concurrency=2, read_s=0.1, retry_deadline_s=0.25, **changes)
            asked = [client.post(where, CHAT, prompt(str(k))) for k in range(40)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            return [type(answer) for answer in answers], len(server.log)

    hung, asked = asyncio.run(run(["ok"] + ["stall"] * 99))
    assert hung[0] is dict and hung[-1] is EndpointUnusable and asked <= 10
    slow, asked = asyncio.run(run(["ok", "stall"] * 20))
    assert Counter(slow) == {dict: 20, EndpointError: 20} and asked == 40


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
    monkeypatch.setattr(response_module, "LARGEST_ANSWER_BYTES", 10_000)

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
    assert progress.text() == "1 done · 0 in flight · 1 retried · 0 failed · 13 tokens" == progress.note()
    assert Progress().note() == ""


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
