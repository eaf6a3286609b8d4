"""A server that answers with whatever may hurt: every request ends as an answer or an error, in time and in memory.

Its answers are mutations of good ones: parts replaced by other types and absurd numbers, bodies nested, flooded, torn,
dripped, in other encodings, with mad headers. They are asked for through the policies and the judges.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter

from aiohttp import web

from benchmarks.fault_server import FaultServer
from swirl.endpoints.chat import ChatPolicy
from swirl.endpoints.client import Client
from swirl.endpoints.completions import CompletionsPolicy
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.gemini import GeminiPolicy
from swirl.errors import EndpointError
from swirl.judging.judges import GenerativeJudge, GenerativeRewardModel, StepToJudge
from swirl.rollout.policy import PolicyState
from swirl.trajectories.record import Judged, Question, Step
from tests.drills.table import Row

LONGEST_S = 30.0  # of one request; the deadline of one attempt is 2 s
SCALARS = (
    None,
    True,
    -1,
    0,
    1e308,
    -1e-308,
    10**30,
    "NaN",
    "",
    "x" * 100_000,
    "<end_of_turn>",
    "\ud7ff\0",
    [],
    {},
    [[]],
)
TOKENS = [{"token": "SC", "logprob": -0.1, "id": 5, "top_logprobs": [{"token": "a", "logprob": -2}]}]
GOOD = {
    "chat": {
        "choices": [{"message": {"content": "SCORE: 5"}, "logprobs": {"content": TOKENS}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    },
    "completions": {
        "choices": [
            {
                "index": 0,
                "text": "GOOD",
                "token_ids": [1, 2],
                "logprobs": {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"a": -1}]},
            }
        ]
    },
    "gemini": {
        "candidates": [
            {
                "content": {"parts": [{"text": "GOOD"}]},
                "logprobsResult": {"chosenCandidates": [{"token": "a", "logProbability": -1}], "topCandidates": [{}]},
            }
        ],
        "usageMetadata": {"promptTokenCount": 3},
    },
}
POLICIES = {"chat": ChatPolicy, "completions": CompletionsPolicy, "gemini": GeminiPolicy}
QUESTION = Question(id="q", task="mine", question="Who?")


def mutated(value, draw: random.Random):
    """A copy with one part replaced, repeated or left out."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(list(value))
        if draw.random() < 0.1:
            return {other: part for other, part in value.items() if other != name}
        return {**value, name: mutated(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        k = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value * draw.choice((2, 1000 if len(str(value)) < 10_000 else 3))
        return [*value[:k], mutated(value[k], draw), *value[k + 1 :]]
    return draw.choice(SCALARS)


def hostile_body(kind: str, draw: random.Random) -> bytes:
    answer = GOOD[kind]
    for _ in range(draw.choice((0, 1, 1, 2))):
        answer = mutated(answer, draw)
    body = json.dumps(answer).encode()
    match draw.randrange(10):
        case 0:
            return draw.choice((b"[", b'{"a":')) * draw.choice((500, 100_000))
        case 1:
            return body[: draw.randrange(len(body))]
        case 2:
            flipped = bytearray(body)
            flipped[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
            return bytes(flipped)
        case 3:
            return body.replace(b"1", b"9" * 4000)
        case 4:
            return draw.randbytes(1000)
        case _:
            return body


def answering(kind: str, draw: random.Random):
    """How the server answers one request."""

    async def drip(request):
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b" ")
                await asyncio.sleep(0.2)
        except ConnectionError:
            return response

    async def answer(request):
        await request.read()
        if draw.random() < 0.02:
            return await drip(request)
        status = draw.choice((200,) * 8 + (204, 302, 400, 418))
        headers = {"Retry-After": draw.choice(("-1", "1e309", "nan", "x" * 5000, "Thu, 99 Foo"))}
        headers |= {"Content-Type": draw.choice(("application/json", "text/html; charset=utf-7", "x/y"))}
        return web.Response(body=hostile_body(kind, draw), status=status, headers=headers)

    return answer


async def _use(kind: str, count: int, draw: random.Random) -> Counter:
    outcomes: Counter[str] = Counter()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/{path:.*}", answering(kind, draw))
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    limits = {"backoff_s": 0.001, "read_s": 2.0, "total_s": 2.0, "retry_deadline_s": 10.0, "batch_ms": 0.0}
    where = Endpoint(f"http://127.0.0.1:{port}", tokens_per_minute=10_000_000, concurrency=8, **limits)
    for first in range(0, count, 8):  # a client each: one that has given up asks nothing more
        async with Client() as client:
            policy = POLICIES[kind](where, "m", client)
            group = range(first, min(first + 8, count))
            outcomes.update(await asyncio.gather(*(_outcome(policy, k, draw) for k in group)))
    await runner.cleanup()
    return outcomes


async def _outcome(policy, k: int, draw: random.Random) -> str:
    try:
        return await asyncio.wait_for(_ask(policy, k, draw), LONGEST_S)
    except EndpointError:
        return "an error"
    except Exception as error:  # noqa: BLE001, any is a failure
        return f"failed: {type(error).__name__}: {error}"[:200]


async def _ask(policy, k: int, draw: random.Random) -> str:
    if k % 3 == 0:
        step = await policy.act(PolicyState(prompt=f"{k}", seed=k, top_log_probs=draw.choice((0, 5))))
        sound = isinstance(step.action, str) and all(log_prob <= 0 for log_prob in step.log_probs or ())
        return "an action" if sound else "failed: an action of another type"
    judge = GenerativeJudge(policy) if k % 3 == 1 else GenerativeRewardModel(policy, votes=2)
    item = StepToJudge(question=QUESTION, steps=(), step=Step(action=f"{k}"), tools=("search",))
    judgement = await judge.judge(item)
    given = judgement.verdict is not None
    sound = given == (judgement.judged is Judged.ANSWERED) and 0 <= (judgement.reward or 0) <= 1
    return f"judged: {judgement.judged.value}" if sound else "failed: a judgement that does not agree with itself"


async def _flood(num_answers: int, num_bytes: int) -> Row:
    """Answers of many MiB at once: all are read, and the memory that they take together is bounded."""
    body = b'{"choices": ["' + b"x" * num_bytes + b'"]}'
    before = _resident_bytes()
    peak, read, started = before, 0, time.monotonic()

    async def watch():
        nonlocal peak
        while True:
            peak = max(peak, _resident_bytes())
            await asyncio.sleep(0.02)

    async def ask(client, where, k):
        nonlocal read
        answer = await client.post(where, "/v1", {"k": k})
        read += len(answer["choices"][0]) == num_bytes

    async with FaultServer(lambda path, payload: web.Response(body=body)) as server, Client() as client:
        where = Endpoint(server.url, read_s=60.0)
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(ask(client, where, k) for k in range(num_answers)))
        watching.cancel()
    note = f"{(peak - before) >> 20} MiB at most, server included, in {time.monotonic() - started:.1f} s"
    return Row(f"{num_answers} answers of {num_bytes >> 20} MiB at once", num_answers, num_answers - read, note)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def drill(seed: int, count: int = 3000) -> list[Row]:
    logging.getLogger("swirl.client").setLevel(logging.ERROR)
    rows = []
    for kind in POLICIES:
        outcomes = asyncio.run(_use(kind, count // 3, random.Random(f"{seed} {kind}")))
        failures = sum(times for outcome, times in outcomes.items() if outcome.startswith("failed"))
        note = "; ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common())
        rows.append(Row(f"answers of a hostile server, {kind}", sum(outcomes.values()), failures, note))
    large = count >= 1000
    return [*rows, asyncio.run(_flood(52 if large else 6, (10 if large else 1) << 20))]
