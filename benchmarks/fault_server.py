"""A model server on loopback that answers in good form, and fails on purpose; it logs every request it got.

    python -m benchmarks.fault_server --latency-ms 50 --faults 0.2 --log log.json

prints its address, serves until SIGTERM, and then writes what it saw. Tests start `FaultServer` in their own
loop.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aiohttp import web

FAULTS = ("429", "500", "stall", "reset", "truncated", "not_json")
LATENCY_SLACK_S = 0.0005  # the loop's timers end up to 1 ms late: half of it keeps the mean at the latency


def verdict_answer(path: str, payload: dict) -> Any:
    """A chat answer whose verdict is drawn by the prompt's digest, so that it can be checked: 4 of 5 are
    GOOD. Where a score is asked for, so is that.
    """
    prompt = payload["messages"][0]["content"]
    said = f"SCORE: {hashlib.sha256(prompt.encode()).digest()[0] % 10}" if "SCORE" in prompt else verdict_of(prompt)
    content = f"The step is judged by its digest.\n{said}"
    return {
        "object": "chat.completion",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": 12},
    }


def verdict_of(prompt: str) -> str:
    """The same for a prompt and for its second asking, which adds a reminder."""
    digest = hashlib.sha256(prompt.partition("\n\nBe brief")[0].encode()).digest()
    return "BAD" if digest[0] % 5 == 0 else "GOOD"


class FaultServer:
    """`answer(path, payload)` makes the answers; `faults` is the share of requests that fail instead, each
    kind alike.

    `script` names what the first requests get, one each ("ok" or a kind of fault), before chance takes over.
    `log` holds (digest of path and body, "ok" or the fault) for each request, in order of arrival.
    """

    def __init__(
        self,
        answer: Callable[[str, dict], Any] = verdict_answer,
        *,
        latency_s: float = 0.0,
        faults: float = 0.0,
        kinds: Iterable[str] = FAULTS,
        script: Iterable[str] = (),
        retry_after: str = "1",
        stall_s: float = 30.0,
        seed: int = 0,
    ):
        self.answer, self.latency_s, self.faults, self.kinds = answer, latency_s, faults, tuple(kinds)
        self.retry_after, self.stall_s = retry_after, stall_s
        self.log: list[tuple[str, str]] = []
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.keep_requests = False
        self.in_flight = self.most_in_flight = 0
        self.served_s = 0.0
        self._script, self._random = iter(script), random.Random(seed)
        self._runner: web.ServerRunner | None = None

    async def start(self, port: int = 0) -> str:
        """The address to ask, without a path."""
        server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port, backlog=4096)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def __aenter__(self) -> FaultServer:
        self.url = await self.start()
        return self

    async def __aexit__(self, *_) -> None:
        await self.stop()

    def summary(self) -> dict:
        """What the log says. `answered_twice` counts requests that got more than one successful answer."""
        successes = Counter(digest for digest, what in self.log if what == "ok")
        return {
            "requests": len(self.log),
            "successes": sum(successes.values()),
            "answered_twice": sum(count > 1 for count in successes.values()),
            "faults": dict(Counter(what for _, what in self.log if what != "ok")),
            "most_in_flight": self.most_in_flight,
            "mean_latency_ms": 1000 * self.served_s / max(1, sum(successes.values())),
        }

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            body = await request.read()
            what = next(self._script, None)
            if what is None:
                what = self._random.choice(self.kinds) if self._random.random() < self.faults else "ok"
            self.log.append((hashlib.sha256(request.path.encode() + body).hexdigest(), what))
            payload = json.loads(body)
            if self.keep_requests:
                self.bodies.append(payload)
                self.headers.append(dict(request.headers))
            if what == "stall":
                await asyncio.sleep(self.stall_s)
                return web.Response(status=504)
            remaining_s = arrived + self.latency_s - LATENCY_SLACK_S - loop.time()
            if remaining_s > 0:
                await asyncio.sleep(remaining_s)
            if what == "ok":
                self.served_s += loop.time() - arrived
                return self._good(request, payload)
            return await self._fail(request, what)
        finally:
            self.in_flight -= 1

    def _good(self, request: web.BaseRequest, payload: dict) -> web.Response:
        made = self.answer(request.path, payload)
        if isinstance(made, web.Response):
            return made
        return web.Response(body=json.dumps(made).encode(), content_type="application/json")

    async def _fail(self, request: web.BaseRequest, what: str) -> web.StreamResponse:
        if what == "429":
            return web.Response(status=429, headers={"Retry-After": self.retry_after}, text="slow down")
        if what == "not_json":
            return web.Response(text="<html>It works!</html>", content_type="text/html")
        if what == "reset":
            request.transport.abort()
            return web.Response()
        if what == "truncated":
            response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
            await response.prepare(request)
            await response.write(b'{"choices": [{"index": 0, "message": {"con')
            request.transport.close()
            return response
        return web.Response(status=int(what), text="injected")


async def _serve(options: argparse.Namespace) -> None:
    server = FaultServer(
        latency_s=options.latency_ms / 1000, faults=options.faults, stall_s=options.stall_s, seed=options.seed
    )
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(await server.start(options.port), flush=True)
    await ended.wait()
    if options.log:
        options.log.write_text(json.dumps(server.summary()))
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--stall-s", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path)
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
