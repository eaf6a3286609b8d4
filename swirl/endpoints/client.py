"""The client: every request swirl sends to a model or retrieval server goes through here.

One aiohttp session, many endpoints. Identical requests in flight share one. Every answer is on disk before it is used
(cache.py), but for those that cannot be read: they are not kept, and the next run asks anew. Each endpoint has its
limits and a breaker (limiter.py). Only connect failures, 429, 5xx and truncated bodies are retried, with full jitter; a
429 means later, and costs no retry. An attempt that gives no answer in time is not repeated: the server may still be
working on it, and charge for it. What comes back is taken for hostile (response.py).

Keys are read from the environment when an endpoint is first used. They are sent in a header and go nowhere else; the
general key goes to one host alone.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import re
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from swirl.endpoints.cache import AnswerCache
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.limiter import Limiter
from swirl.endpoints.response import (
    LARGEST_ANSWER_BYTES,
    ByteBudget,
    Fault,
    Response,
    Secret,
    count_tokens,
    decode,
    read_answer,
    read_body,
    retry_after_s,
)
from swirl.errors import ConfigError, EndpointError, EndpointUnusable

GENERAL_KEY = "SWIRL_API_KEY"
_LONGEST_BACKOFF_S = 30.0
# An answer makes hundreds of short-lived objects: collecting at each 700 took a quarter of all CPU time.
_OBJECTS_PER_COLLECTION = 50_000
encode_payload = msgspec.json.Encoder(order="deterministic").encode


@dataclass
class Progress:
    """Counts since the client was made. `done` answers of which `cached` cost nothing; `failed` got none.

    A request refused for an optional field's sake is in neither: it is asked again without.
    """

    done: int = 0
    cached: int = 0
    coalesced: int = 0
    in_flight: int = 0
    retried: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def note(self) -> str:
        """`text()`, or nothing where nothing was asked."""
        return self.text() if self.done or self.in_flight or self.failed else ""

    def text(self) -> str:
        """One line, such as `1200 done · 256 in flight · 3 retried · 0 failed · 412k tokens`."""
        tokens = self.prompt_tokens + self.completion_tokens
        return " · ".join(
            [
                f"{self.done} done",
                *([f"{self.cached} cached"] if self.cached else []),
                f"{self.in_flight} in flight",
                f"{self.retried} retried",
                f"{self.failed} failed",
                f"{tokens // 1000}k tokens" if tokens >= 1000 else f"{tokens} tokens",
            ]
        )


def as_it_is(answer: Any) -> Any:
    return answer


@dataclass
class _Route:
    """What every request to one endpoint shares."""

    limiter: Limiter
    headers: CIMultiDict[str]
    secret: Secret
    timeout: aiohttp.ClientTimeout
    urls: dict[str, URL] = field(default_factory=dict)


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
        self._session: aiohttp.ClientSession | None = None
        self._cache: AnswerCache | None = None
        self._budget = ByteBudget()
        self._host_of_general_key: str | None = None
        self._routes: dict[Endpoint, _Route] = {}
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
        self._routes, self._flights, self._tasks, self._budget = {}, {}, set(), ByteBudget()
        self._cache = self._cache or (AnswerCache(self._cache_path) if self._cache_path is not None else None)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the limiters hold the limits
            cookie_jar=aiohttp.DummyCookieJar(),
        )
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
            await self._session.close()
            gc.set_threshold(*self._gc_threshold)
            self._loop = self._session = self._cache = None

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
            self._budget.give(response.held_bytes)
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
        self._budget.give(response.held_bytes)

    async def send(self, endpoint: Endpoint, path: str, body: bytes, *, tokens: int = 0) -> Response:
        """Ask until there is an answer or the endpoint's rules say stop; neither coalesced nor cached. `drop` must
        follow.
        """
        self._open()
        route = self._routes.get(endpoint) or self._find_route(endpoint)
        limiter = route.limiter
        reserved = len(body) // 4 + tokens
        failures, first_failure = 0, None
        while True:
            probe = await limiter.enter(reserved)
            self.progress.in_flight += 1
            asked = self._loop.time()
            try:
                result = await self._attempt(route, path, body)
                _tell(limiter, result, asked)
            finally:
                self.progress.in_flight -= 1
                limiter.leave(probe)
            if isinstance(result, Response):
                used = self._count_tokens(result, len(body), tokens)
                limiter.correct_tokens(used - reserved if used else 0)
                return result
            fault, now = result, self._loop.time()
            if limiter.unusable:
                raise EndpointUnusable(endpoint.url, limiter.unusable, status=fault.status)
            if not fault.again:
                raise EndpointError(endpoint.url, fault.reason, status=fault.status)
            first_failure = first_failure or now
            if not fault.later and not (limiter.paused and limiter.reached):
                failures += 1
            if reason := _why_no_retry(endpoint, fault, failures, now - first_failure):
                if limiter.paused or not limiter.reached:
                    limiter.give_up(reason)
                    raise EndpointUnusable(endpoint.url, reason, status=fault.status)
                raise EndpointError(endpoint.url, reason, status=fault.status)
            self.progress.retried += 1
            backoff_s = random.uniform(0, min(_LONGEST_BACKOFF_S, endpoint.backoff_s * 2 ** min(failures, 16)))
            await asyncio.sleep(fault.wait_s + backoff_s)

    async def _attempt(self, route: _Route, path: str, body: bytes) -> Response | Fault:
        endpoint, limiter, secret = route.limiter.endpoint, route.limiter, route.secret
        url = route.urls.get(path)
        if url is None:
            url = route.urls[path] = URL(endpoint.url.rstrip("/") + path)
        try:
            # From the connect to the last byte: aiohttp's own timeouts begin anew with every byte of the headers.
            async with (
                asyncio.timeout(endpoint.total_s),
                self._session.post(
                    url, data=body, headers=route.headers, timeout=route.timeout, allow_redirects=False
                ) as response,
            ):
                limiter.reached = True
                status = response.status
                given = await read_body(response, self._budget)
                wait_s = retry_after_s(response.headers.get("Retry-After")) if status == 429 or status >= 500 else 0.0
        except aiohttp.ConnectionTimeoutError:
            return Fault(f"no connection within {endpoint.connect_s:g} s", again=True)
        except TimeoutError:
            return Fault(f"no answer within {min(endpoint.read_s, endpoint.total_s):g} s", silent=True)
        except aiohttp.ClientConnectorCertificateError:
            return Fault("its certificate is not valid")
        except aiohttp.ClientConnectorError as error:
            return Fault(f"cannot connect ({secret.one_line(str(error.os_error))})", again=True)
        except (aiohttp.ClientError, OSError) as error:
            return Fault(f"broken answer ({type(error).__name__})", again=True)
        if given is None:
            return Fault(f"answer above {LARGEST_ANSWER_BYTES >> 20} MiB", status)
        answer_body, held = given
        if 200 <= status < 300:
            result = read_answer(answer_body, status, secret)
            if isinstance(result, Response):
                return result._replace(held_bytes=held)
            self._budget.give(held)
            return result
        self._budget.give(held)
        said = secret.one_line(answer_body.decode("utf-8", "replace"))
        reason = f"HTTP {status}" + (f": {said}" if said else "")
        if status in (401, 403, 404) or (status == 429 and "insufficient_quota" in said):
            limiter.give_up(reason)
        return Fault(reason, status, again=status == 429 or status >= 500, later=status == 429, wait_s=wait_s)

    def _find_route(self, endpoint: Endpoint) -> _Route:
        key = self._key_of(endpoint)
        headers = CIMultiDict({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        if key:
            headers[endpoint.key_header] = f"Bearer {key}" if endpoint.key_header == "Authorization" else key
        timeout = aiohttp.ClientTimeout(sock_connect=endpoint.connect_s, sock_read=endpoint.read_s)
        route = self._routes[endpoint] = _Route(Limiter(endpoint), headers, Secret(key), timeout)
        return route

    def _key_of(self, endpoint: Endpoint) -> str:
        """Raises ConfigError where there is none, none that can be sent, or one that went to another host."""
        if not endpoint.key_env:
            return ""
        key = os.environ.get(endpoint.key_env, "").strip()
        if not key:
            raise ConfigError(f"endpoint {endpoint.url}: ${endpoint.key_env} is not set")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"endpoint {endpoint.url}: the key in ${endpoint.key_env} is no printable ASCII")
        if endpoint.key_env == GENERAL_KEY:
            self._host_of_general_key = self._host_of_general_key or endpoint.host
            if endpoint.host != self._host_of_general_key:
                raise ConfigError(
                    f"endpoint {endpoint.url}: ${GENERAL_KEY} is sent to {self._host_of_general_key}, and to no other "
                    "host: give each role its own, such as SWIRL_POLICY_API_KEY or SWIRL_JUDGE_API_KEY (empty: no key)"
                )
        return key

    def _count_tokens(self, response: Response, request_bytes: int, asked_for: int) -> int:
        prompt, completion = count_tokens(
            response.answer, request_bytes=request_bytes, answer_bytes=len(response.body), asked_for=asked_for
        )
        self.progress.prompt_tokens += prompt
        self.progress.completion_tokens += completion
        return prompt + completion


def _tell(limiter: Limiter, result: Response | Fault, asked: float) -> None:
    """What an attempt begun at `asked` (loop's time) says of its endpoint."""
    if isinstance(result, Response):
        limiter.succeeded()
    elif result.again:
        limiter.failed(result.reason, result.wait_s)
    elif result.status is not None:
        limiter.succeeded()  # it refuses this request, but it is there
    elif result.silent:
        limiter.stayed_silent(asked, result.reason)


def _why_no_retry(endpoint: Endpoint, fault: Fault, failures: int, failing_s: float) -> str | None:
    """None: the attempt may be repeated."""
    if failures > endpoint.retries:
        return f"{fault.reason}, {failures} times"
    if failing_s + fault.wait_s > endpoint.retry_deadline_s:
        return f"{fault.reason}, for {endpoint.retry_deadline_s:g} s"
    return None


def refused_fields(error: EndpointError, optional: Collection[str]) -> set[str]:
    """Those of the `optional` fields that the server refuses by name."""
    if error.status not in (400, 422):
        return set()
    return {name for name in optional if re.search(rf"\b{name}\b", error.reason)}


def request_key(endpoint: Endpoint, path: str, draw: int, body: bytes) -> bytes:
    """The address of an answer: changed by all that may change the answer, and by nothing else."""
    return hashlib.sha256(b"%s%s\n%d\n%s" % (endpoint.url.rstrip("/").encode(), path.encode(), draw, body)).digest()
