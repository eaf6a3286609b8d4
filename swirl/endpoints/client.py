"""The client: every request swirl sends to a model or retrieval server goes through here.

Identical requests in flight share one. Every answer is on disk before it is used (cache.py), but for those that cannot
be read: they are not kept, and the next run asks anew. How requests are sent and repeated is in sender.py.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from swirl.endpoints.cache import AnswerCache
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.response import Response, decode
from swirl.endpoints.sender import Progress, Sender
from swirl.errors import EndpointError

# An answer makes hundreds of short-lived objects: collecting at each 700 took a quarter of all CPU time.
_OBJECTS_PER_COLLECTION = 50_000
encode_payload = msgspec.json.Encoder(order="deterministic").encode


def as_it_is(answer: Any) -> Any:
    return answer


@dataclass
class _Flight:
    """One request on its way, and how many wait for it."""

    task: asyncio.Task
    waiters: int = 0


class Client:
    """Asks endpoints. `cache` is the file that keeps answers; None keeps none.

    It opens itself in the event loop that first uses it; `close` ends it cleanly, after which it can be used
    again, in another loop too. As `async with Client(...)` it closes itself.
    """

    def __init__(self, cache: str | os.PathLike | None = None):
        self.progress = Progress()
        self._cache_path = cache
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sender = Sender(self.progress)
        self._cache: AnswerCache | None = None
        self._flights: dict[bytes, _Flight] = {}
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()

    def _open(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("a client belongs to one event loop at a time: close it there first")
        # What a loop that died unclosed left behind is of no use in this one.
        self._flights, self._tasks = {}, set()
        self._cache = self._cache or (AnswerCache(self._cache_path) if self._cache_path is not None else None)
        self._sender.open()
        self._loop = loop
        self._gc_threshold = gc.get_threshold()
        if 0 < self._gc_threshold[0] < _OBJECTS_PER_COLLECTION:
            gc.set_threshold(_OBJECTS_PER_COLLECTION, *self._gc_threshold[1:])

    async def close(self) -> None:
        """Cancel what is in flight, write what was answered, close the connections."""
        if self._loop is not asyncio.get_running_loop():
            return
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            if self._cache is not None:
                await self._cache.close()
        finally:
            await self._sender.close()
            gc.set_threshold(*self._gc_threshold)
            self._loop = self._cache = None

    async def post(
        self,
        endpoint: Endpoint,
        path: str,
        payload: Any,
        *,
        draw: int = 0,
        tokens: int = 0,
        read: Callable[[Any], Any] = as_it_is,
        optional: Collection[str] = (),
    ) -> Any:
        """What `read` makes of the decoded JSON answer to `payload`, from the cache where it is there. Treat it as
        read-only: it is shared.

        `path` is appended to the endpoint's url. `draw` tells apart requests that are equal and yet to be
        asked anew. `tokens` is how many the answer may have; with a quarter of the request's bytes it is what
        the tokens-per-minute limit reserves, until the answer says what it was. `read` depends on the answer alone,
        and raises EndpointError on one that is of no use, which is then not kept. `optional` are fields of the payload
        that a server may refuse by name, which is not counted as a failure. Raises EndpointError, EndpointUnusable,
        ConfigError.
        """
        body = encode_payload(payload)
        key = request_key(endpoint, path, draw, body)
        return await self.cached(key, lambda: self.send(endpoint, path, body, tokens=tokens), read, optional)

    async def cached(
        self,
        key: bytes,
        ask: Callable[[], Awaitable[Response]],
        read: Callable[[Any], Any] = as_it_is,
        optional: Collection[str] = (),
    ) -> Any:
        """The answer under `key`, as `read` reads it: from the cache, from the flight that is asking already, or by
        `ask`, then kept.
        """
        self._open()
        flight = self._flights.get(key)
        if flight is None:
            known = self._cache.get(key) if self._cache is not None else None
            if known is not None:
                try:
                    result = read(decode(known))
                except (EndpointError, ValueError):  # what an earlier swirl could read, or did not look at
                    self._cache.drop(key)
                else:
                    self.progress.cached += 1
                    self.progress.done += 1
                    return result
            flight = self._flights[key] = _Flight(self.spawn(self._fetch(key, ask, read, optional)))
        else:
            self.progress.coalesced += 1
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0:
                flight.task.cancel()  # does nothing to one that is done
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def _fetch(
        self,
        key: bytes,
        ask: Callable[[], Awaitable[Response]],
        read: Callable[[Any], Any],
        optional: Collection[str],
    ) -> Any:
        try:
            response = await ask()
        except EndpointError as error:
            self.progress.failed += not refused_fields(error, optional)
            raise
        try:
            result = read(response.answer)
            if self._cache is not None:
                await self._cache.put(key, response.body)
        except EndpointError:
            self.progress.failed += 1
            raise
        finally:
            self._sender.give_back(response)
        self.progress.done += 1
        return result

    def spawn(self, work: Coroutine) -> asyncio.Task:
        """A task that `close` ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def drop(self, response: Response) -> None:
        """Give back what a response of `send` holds of the budget for large bodies, once its body is not needed."""
        self._sender.give_back(response)

    async def send(self, endpoint: Endpoint, path: str, body: bytes, *, tokens: int = 0) -> Response:
        """Ask until there is an answer or the endpoint's rules say stop; neither coalesced nor cached. `drop` must
        follow. Raises EndpointError, EndpointUnusable, ConfigError.
        """
        self._open()
        return await self._sender.send(endpoint, path, body, tokens=tokens)


def refused_fields(error: EndpointError, optional: Collection[str]) -> set[str]:
    """Those of the `optional` fields that the server refuses by name."""
    if error.status not in (400, 422):
        return set()
    return {name for name in optional if re.search(rf"\b{name}\b", error.reason)}


def request_key(endpoint: Endpoint, path: str, draw: int, body: bytes) -> bytes:
    """The address of an answer: changed by all that may change the answer, and by nothing else."""
    return hashlib.sha256(b"%s%s\n%d\n%s" % (endpoint.url.rstrip("/").encode(), path.encode(), draw, body)).digest()
