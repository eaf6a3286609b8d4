"""Search by servers: embeddings, and a retrieval server."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from benchmarks.fault_server import FaultServer
from swirl.trajectories.log import read_trajectories
from tests.endpoints.loopback import (
    generate,
    model,
    run,
)

PAGES = [
    {"title": "Norland", "text": "The capital of Norland is Vik."},
    {"title": "Sudland", "text": "The capital of Sudland is Tor."},
    {"title": "Herring", "text": "A fish of cold seas."},
]


@pytest.fixture
def own_questions(tmp_path):
    questions = [{"question": f"What is the capital of {land}?", "answer": "Vik"} for land in ("Norland", "Sudland")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, PAGES)))
    return ("--task", "own", "--questions", "q.jsonl", "--samples", 1)


def observations(path):
    return sorted(t.steps[0].observation for t in read_trajectories(path))


def test_search_by_meaning_indexes_once_beside_the_pages(tmp_path, own_questions):
    flags = (*own_questions, "--corpus", "pages.jsonl")

    async def all_of_it():
        async with FaultServer(model) as server:
            server.keep_requests = True
            dense = ("--retriever", f"dense+{server.url}/v1#org/tiny")
            await generate(tmp_path, server.url, *flags, *dense)
            assert (tmp_path / "pages.jsonl.dense-org-tiny").is_dir()
            asked = len(server.bodies)
            await generate(tmp_path, server.url, *flags, *dense, "--out", "again.jsonl")
            assert not any("Herring" in str(body.get("input")) for body in server.bodies[asked:])
            evaluated = ("--policy", f"{server.url}/v1#policy", "--task", "own", *flags[2:4], *flags[6:])
            score = (await run(tmp_path, "evaluate", *evaluated, *dense)).result
            assert (score["accuracy"], score["good_steps"]) == (1.0, None)  # Almanac's judge was not asked
            (tmp_path / "pages.jsonl").write_text(json.dumps(PAGES[0]))
            return await generate(tmp_path, server.url, *flags, *dense, "--out", "new.jsonl", code=1)

    changed = asyncio.run(all_of_it())
    assert "dense-org-tiny: expected an index of pages.jsonl as it is now" in changed.errors[0]
    found = [f"{page['title']}: {page['text']}" for page in PAGES[:2]]
    assert [said.partition(" -> ")[2] for said in observations(tmp_path / "trajectories.jsonl")] == found
    assert observations(tmp_path / "again.jsonl") == observations(tmp_path / "trajectories.jsonl")


def test_search_by_a_retrieval_server(tmp_path, own_questions):
    async def all_of_it():
        async with FaultServer(model) as server:
            server.keep_requests = True
            flags = ("--retriever", f"{server.url}/retrieve", "--top-k", 2)
            await generate(tmp_path, server.url, *own_questions, *flags, SWIRL_API_KEY="for-the-model")
            asked = [k for k, body in enumerate(server.bodies) if "queries" in body]
            assert sum(len(server.bodies[k]["queries"]) for k in asked) == 2
            assert all(server.bodies[k]["topk"] == 2 and "Authorization" not in server.headers[k] for k in asked)
            wrong = [
                await generate(tmp_path, server.url, "--retriever", name, "--out", "x.jsonl", *task, code=2)
                for name, task in (
                    ("bm26", own_questions),
                    (f"dense+{server.url}/v1", own_questions),
                    (f"dense+{server.url}/v1#m", ()),
                    (f"{server.url}/retrieve", ("--task", "arithmetic")),
                )
            ]
            return [done.errors[0] for done in wrong]

    errors = asyncio.run(all_of_it())
    assert all("Vik" in said for said in observations(tmp_path / "trajectories.jsonl"))
    said = ("expected bm25, dense+", "names no model", "no file of pages", "--retriever: means nothing to task")
    assert all(part in error for part, error in zip(said, errors, strict=True)), errors
    assert not (tmp_path / "x.jsonl").exists()


def test_a_search_that_got_no_answer_is_not_what_the_policy_reads(tmp_path, own_questions):
    failures = [web.Response(status=422, text="no such query"), web.Response(text="busy")]

    def failing(path, payload):
        return failures.pop() if path == "/retrieve" and failures else model(path, payload)

    async def all_of_it():
        async with FaultServer(failing) as server:
            flags = (*own_questions, "--retriever", f"{server.url}/retrieve", "--num-questions", 1, "--out", "t.jsonl")
            first = await generate(tmp_path, server.url, *flags, code=1)
            await generate(tmp_path, server.url, *flags)
            await generate(tmp_path, server.url, *own_questions, "--retriever", f"{server.url}/retrieve")
            return first

    assert "expected JSON" in asyncio.run(all_of_it()).errors[0]
    (refused,) = observations(tmp_path / "t.jsonl")
    assert "search failed: HTTP 422: no such query" in refused
    assert not any("search failed" in said for said in observations(tmp_path / "trajectories.jsonl"))
