"""Micro-batches, against a real server on loopback."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from benchmarks.fault_server import FaultServer
from swirl.endpoints.batcher import Batcher, embedder
from swirl.endpoints.client import Client
from swirl.endpoints.endpoint import Endpoint
from swirl.errors import ConfigError, EndpointError
from swirl.tools.retrieval import retriever


def endpoint(url: str, **changes) -> Endpoint:
    return Endpoint(url, **{"backoff_s": 0.01, "read_s": 5.0, **changes})


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


@pytest.mark.parametrize("answer", [{"data": []}, {}, [], {"data": [{"index": 0}]}, {"data": [{"embedding": [1.0]}]}])
def test_embeddings_of_another_form_are_refused(answer):
    async def run():
        async with FaultServer(lambda path, payload: answer) as server, Client() as client:
            with pytest.raises(EndpointError, match="expected 1 parts"):
                await embedder(client, endpoint(server.url), "model")(["a"])

    asyncio.run(run())


@pytest.mark.parametrize("bad", [[], [0.0, 0.0], ["a"], None, 3.0])
def test_an_embedding_that_is_none_is_not_kept_and_spoils_no_other(bad, tmp_path):
    bad_ones = iter([bad])

    def answer(path, payload):
        vectors = [next(bad_ones, [2.0]) if text == "b" else [1.0] for text in payload["input"]]
        return {"data": [{"index": k, "embedding": vector} for k, vector in enumerate(vectors)]}

    async def run():
        async with FaultServer(answer) as server, Client(tmp_path / "answers.sqlite") as client:
            embed = embedder(client, endpoint(server.url), "model")
            first = await asyncio.gather(embed(["a"]), embed(["b"]), return_exceptions=True)
            assert first[0] == [[1.0]] and isinstance(first[1], EndpointError)
            assert await embed(["a", "b"]) == [[1.0], [2.0]]
            return len(server.log)

    assert asyncio.run(run()) == 2


def test_pages_that_cannot_be_read_are_not_kept(tmp_path):
    found = iter([[{"document": {"body": "x"}}], ["text"], 3])

    def answer(path, payload):
        return {"result": [next(found, [{"contents": "T\nx"}])]}

    async def run():
        async with FaultServer(answer) as server, Client(tmp_path / "answers.sqlite") as client:
            post_json = retriever(client, endpoint(server.url))
            for _ in range(3):
                with pytest.raises(EndpointError, match="expected"):
                    await post_json(server.url, {"queries": ["q"]})
            for _ in range(2):
                assert await post_json(server.url, {"queries": ["q"]}) == {"result": [[{"contents": "T\nx"}]]}
            return len(server.log)

    assert asyncio.run(run()) == 4


def test_retrieval_queries_share_a_request():
    def found(path, payload):
        return {"result": [[{"contents": f"{query} {payload['topk']}"}] for query in payload["queries"]]}

    server = FaultServer(found)

    async def run():
        async with server, Client() as client:
            post_json = retriever(client, endpoint(f"{server.url}/retrieve"))
            asked = [{"queries": [f"q{k}"], "topk": 1 + k % 2} for k in range(10)]
            answers = await asyncio.gather(*(post_json(f"{server.url}/retrieve", payload) for payload in asked))
            assert answers == [{"result": [[{"contents": f"q{k} {1 + k % 2}"}]]} for k in range(10)]
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
