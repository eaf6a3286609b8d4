"""The client: every request swirl sends to a model or retrieval server goes through here.

One aiohttp session, many endpoints. Identical requests in flight are asked once. Every answer is on disk before
it is used (cache.py), but for those that cannot be read: they are not kept, and asked for anew by the next run. Each
endpoint has its limits and a breaker (limiter.py). Only connect failures, 429, 5xx and truncated bodies are retried,
with full jitter; a 429 means later, and costs no retry. An endpoint that gives no answer in time is not asked again: it
may still be working, and be paid.

Keys are read from the environment when an endpoint is first used. They are sent in a header and go nowhere
else.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from swirl.endpoints.cache import AnswerCache
from swirl.endpoints.limiter import FAILURES_TO_PAUSE, Limiter
from swirl.errors import ConfigError, EndpointError, EndpointUnusable

__all__ = ["Client", "Endpoint", "EndpointUnusable", "Paid", "Progress"]

_LARGEST_ANSWER_BYTES = 64 << 20
_LONGEST_BACKOFF_S = 30.0
# An answer makes hundreds of short-lived objects: collecting at each 700 took a quarter of all CPU time.
_OBJECTS_PER_COLLECTION = 50_000
encode_payload = msgspec.json.Encoder(order="deterministic").encode
_decoder = msgspec.json.Decoder()


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how hard.

    `url` is the base that paths are appended to, such as http://127.0.0.1:8000/v1. `key_env` names the
    environment variable that holds the key, `key_header` the header it is sent in. `patience_s` bounds
    outages and 429s. Defaults are ours. Raises ConfigError on values that cannot be meant.
    """

    url: str
    key_env: str | None = None
    key_header: Literal["Authorization", "x-goog-api-key"] = "Authorization"
    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    connect_s: float = 10.0
    read_s: float = 300.0
    total_s: float = 600.0
    retries: int = 6
    backoff_s: float = 0.5
    patience_s: float = 900.0
    batch_size: int = 32
    batch_ms: float = 3.0

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"endpoint '{_without_secrets(self.url)}': expected http://host[:port]/path or https://…")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"endpoint '{_without_secrets(self.url)}': expected no user, password, query or fragment; "
                "a key comes from the environment"
            )
        for name in (
            "concurrency",
            "connect_s",
            "read_s",
            "total_s",
            "backoff_s",
            "patience_s",
            "batch_size",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"endpoint {self.url}: {name} must be above 0, got {getattr(self, name)}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"endpoint {self.url}: {name} must be above 0, got {getattr(self, name)}")
        if self.retries < FAILURES_TO_PAUSE or self.batch_ms < 0:
            raise ConfigError(f"endpoint {self.url}: retries must be at least {FAILURES_TO_PAUSE}, batch_ms at least 0")


def _without_secrets(url: str) -> str:
    return url.partition("?")[0].partition("#")[0].rpartition("@")[2]


@dataclass
class Progress:
    """Counts since the client was made. `done` answers of which `cached` cost nothing; `failed` got none."""

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


class _Fault(NamedTuple):
    """Why an attempt failed. `again`: it may be tried again; `later`: that costs no retry (429); `silent`: there was
    no answer in time.
    """

    reason: str
    status: int | None = None
    again: bool = False
    later: bool = False
    wait_s: float = 0.0
    silent: bool = False


def as_it_is(answer: Any) -> Any:
    return answer


class Paid(NamedTuple):
    """An answer as it came, and decoded."""

    body: bytes
    answer: Any


@dataclass
class _Route:
    """What every request to one endpoint shares."""

    limiter: Limiter
    headers: CIMultiDict[str]
    key: str
    timeout: aiohttp.ClientTimeout
    urls: dict[str, URL] = field(default_factory=dict)


@dataclass
class _Flight:
    """One request on its way, and how many wait for it."""

    task: asyncio.Task
    waiters: int = 0


class Client:
    """Asks endpoints. `cache` is the file that keeps paid answers; None keeps none.

    It opens itself in the event loop that first uses it; `close` ends it cleanly, after which it can be used
    again, in another loop too. As `async with Client(...)` it closes itself.
    """

    def __init__(self, cache: str | os.PathLike | None = None):
        self.progress = Progress()
        self._cache_path = cache
        self._loop: asyncio.AbstractEventLoop | None = None
        self._session: aiohttp.ClientSession | None = None
        self._cache: AnswerCache | None = None
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
        self._routes, self._flights, self._tasks = {}, {}, set()
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
        """Cancel what is in flight, write what is paid, close the connections."""
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
    ) -> Any:
        """What `read` makes of the decoded JSON answer to `payload`, from the cache where it is there. Treat it as
        read-only: it is shared.

        `path` is appended to the endpoint's url. `draw` tells apart requests that are equal and yet to be
        asked anew. `tokens` is how many the answer may have; with a quarter of the request's bytes it is what
        the tokens-per-minute limit reserves, until the answer says what it was. `read` depends on the answer alone,
        and raises EndpointError on one that is of no use, which is then not kept. Raises EndpointError,
        EndpointUnusable, ConfigError.
        """
        body = encode_payload(payload)
        key = request_key(endpoint, path, draw, body)
        return await self.once(key, lambda: self.send(endpoint, path, body, tokens=tokens), read)

    async def once(self, key: bytes, ask: Callable[[], Awaitable[Paid]], read: Callable[[Any], Any] = as_it_is) -> Any:
        """The answer under `key`, as `read` reads it: from the cache, from the flight that is asking already, or by
        `ask`, then kept.
        """
        self._open()
        flight = self._flights.get(key)
        if flight is None:
            known = self._cache.get(key) if self._cache is not None else None
            if known is not None:
                with suppress(EndpointError):  # what an earlier swirl could read, or did not look at, is asked for anew
                    result = read(_decoder.decode(known))
                    self.progress.cached += 1
                    self.progress.done += 1
                    return result
            flight = self._flights[key] = _Flight(self.spawn(self._pay(key, ask, read)))
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

    async def _pay(self, key: bytes, ask: Callable[[], Awaitable[Paid]], read: Callable[[Any], Any]) -> Any:
        try:
            paid = await ask()
            result = read(paid.answer)
        except EndpointError:
            self.progress.failed += 1
            raise
        if self._cache is not None:
            await self._cache.put(key, paid.body)
        self.progress.done += 1
        return result

    def spawn(self, work: Coroutine) -> asyncio.Task:
        """A task that `close` ends."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def send(self, endpoint: Endpoint, path: str, body: bytes, *, tokens: int = 0) -> Paid:
        """Ask until there is an answer or the endpoint's rules say stop; neither coalesced nor cached."""
        self._open()
        route = self._routes.get(endpoint) or self._find_route(endpoint)
        limiter = route.limiter
        reserved = len(body) // 4 + tokens
        failures, first_failure = 0, None
        while True:
            trial = await limiter.enter(reserved)
            self.progress.in_flight += 1
            asked = self._loop.time()
            try:
                result = await self._attempt(route, path, body)
                if isinstance(result, Paid):
                    limiter.succeeded()
                elif result.again:
                    limiter.failed(result.reason, result.wait_s)
                elif result.status is not None:
                    limiter.succeeded()  # it refuses this request, but it is there
                elif result.silent:
                    limiter.stayed_silent(asked, result.reason)
            finally:
                self.progress.in_flight -= 1
                limiter.leave(trial)
            if isinstance(result, Paid):
                used = self._count_tokens(result.answer)
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
            backoff_s = random.uniform(0, min(_LONGEST_BACKOFF_S, endpoint.backoff_s * 2 ** min(failures, 16)))
            if failures > endpoint.retries:
                reason = f"{fault.reason}, {failures} times"
            elif now + fault.wait_s - first_failure > endpoint.patience_s:
                reason = f"{fault.reason}, for {endpoint.patience_s:g} s"
            else:
                reason = None
            if reason and (limiter.paused or not limiter.reached):
                limiter.give_up(reason)
                raise EndpointUnusable(endpoint.url, reason, status=fault.status)
            if reason:
                raise EndpointError(endpoint.url, reason, status=fault.status)
            self.progress.retried += 1
            await asyncio.sleep(fault.wait_s + backoff_s)

    async def _attempt(self, route: _Route, path: str, body: bytes) -> Paid | _Fault:
        endpoint, limiter, key = route.limiter.endpoint, route.limiter, route.key
        url = route.urls.get(path)
        if url is None:
            url = route.urls[path] = URL(endpoint.url.rstrip("/") + path)
        try:
            async with self._session.post(
                url, data=body, headers=route.headers, timeout=route.timeout, allow_redirects=False
            ) as response:
                limiter.reached = True
                status = response.status
                given = await _read(response, endpoint.total_s)
                wait_s = retry_after_s(response.headers.get("Retry-After")) if status == 429 or status >= 500 else 0.0
        except aiohttp.ConnectionTimeoutError:
            return _Fault(f"no connection within {endpoint.connect_s:g} s", again=True)
        except TimeoutError:
            return _Fault(f"no answer within {min(endpoint.read_s, endpoint.total_s):g} s", silent=True)
        except aiohttp.ClientConnectorCertificateError:
            return _Fault("its certificate is not valid")
        except aiohttp.ClientConnectorError as error:
            return _Fault(f"cannot connect ({_clean(str(error.os_error), key)})", again=True)
        except (aiohttp.ClientError, OSError) as error:
            return _Fault(f"broken answer ({type(error).__name__})", again=True)
        if given is None:
            return _Fault(f"answer above {_LARGEST_ANSWER_BYTES >> 20} MiB", status)
        if 200 <= status < 300:
            return _read_answer(given, status, key)
        said = _clean(given[:2000].decode("utf-8", "replace"), key)
        reason = f"HTTP {status}" + (f": {said}" if said else "")
        if status in (401, 403, 404) or (status == 429 and "insufficient_quota" in said):
            limiter.give_up(reason)
        return _Fault(reason, status, again=status == 429 or status >= 500, later=status == 429, wait_s=wait_s)

    def _find_route(self, endpoint: Endpoint) -> _Route:
        """Reads the key. Raises ConfigError where there is none, or none that can be sent."""
        key = ""
        headers = CIMultiDict({"Content-Type": "application/json", "Accept-Encoding": "identity"})
        if endpoint.key_env:
            key = os.environ.get(endpoint.key_env, "").strip()
            if not key:
                raise ConfigError(f"endpoint {endpoint.url}: ${endpoint.key_env} is not set")
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(f"endpoint {endpoint.url}: the key in ${endpoint.key_env} is no printable ASCII")
            headers[endpoint.key_header] = f"Bearer {key}" if endpoint.key_header == "Authorization" else key
        # No timer for the total: `_read` looks at the clock, for each timer costs as much as encoding a request.
        timeout = aiohttp.ClientTimeout(
            sock_connect=endpoint.connect_s, sock_read=min(endpoint.read_s, endpoint.total_s)
        )
        route = self._routes[endpoint] = _Route(Limiter(endpoint), headers, key, timeout)
        return route

    def _count_tokens(self, answer: Any) -> int:
        """Tokens the answer says were used, 0 where it does not; OpenAI's `usage` and Gemini's
        `usageMetadata`.
        """
        usage = (answer.get("usage") or answer.get("usageMetadata")) if isinstance(answer, dict) else None
        if not isinstance(usage, dict):
            return 0
        prompt = usage.get("prompt_tokens", usage.get("promptTokenCount"))
        completion = usage.get("completion_tokens", usage.get("candidatesTokenCount"))
        prompt, completion = (n if isinstance(n, int) else 0 for n in (prompt, completion))
        self.progress.prompt_tokens += prompt
        self.progress.completion_tokens += completion
        return prompt + completion


def request_key(endpoint: Endpoint, path: str, draw: int, body: bytes) -> bytes:
    """The address of an answer: changed by all that may change the answer, and by nothing else."""
    return hashlib.sha256(b"%s%s\n%d\n%s" % (endpoint.url.rstrip("/").encode(), path.encode(), draw, body)).digest()


async def _read(response: aiohttp.ClientResponse, total_s: float) -> bytes | None:
    """The body, or None where it is too large to be an answer. Raises TimeoutError on one that drips in."""
    deadline, given = time.monotonic() + total_s, b""
    while chunk := await response.content.readany():
        given += chunk
        if len(given) > _LARGEST_ANSWER_BYTES:
            response.close()
            return None
        if time.monotonic() > deadline:
            response.close()
            raise TimeoutError
    return given


def _read_answer(given: bytes, status: int, key: str) -> Paid | _Fault:
    if key and key.encode() in given:
        given = given.replace(key.encode(), b"***")
    try:
        answer = _decoder.decode(given)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # msgspec says so of a body that ends in the middle of a value, the empty one included.
        if "truncated" in str(error):
            return _Fault("truncated answer", status, again=True)
        return _Fault("expected JSON", status)
    if isinstance(answer, dict) and answer.get("error"):
        return _Fault(_clean(f"HTTP {status} with an error: {answer['error']}", key), status)
    return Paid(given, answer)


def _clean(text: str, key: str) -> str:
    """One line of at most 300 characters, without the key."""
    return " ".join((text.replace(key, "***") if key else text).split())[:300]


def retry_after_s(value: str | None) -> float:
    """Seconds, from a number of them or an HTTP date; 0 where there is neither."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return seconds if 0 < seconds < float("inf") else 0.0
