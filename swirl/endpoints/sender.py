"""One request after another to many endpoints: keys, limits, attempts, and what became of each.

Each endpoint has its limits and a breaker (limiter.py). Only connect failures, 429, 5xx and truncated bodies are
retried, with full jitter; a 429 means later, and costs no retry. An attempt that gives no answer in time is not
repeated: the server may still be working on it, and charge for it. What comes back is taken for hostile (response.py).

Keys are read from the environment when an endpoint is first used. They are sent in a header and go nowhere else; the
general key goes to one host alone.
"""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass, field

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.limiter import Limiter
from swirl.endpoints.response import (
    LARGEST_ANSWER_BYTES,
    ByteBudget,
    Fault,
    Response,
    Secret,
    count_tokens,
    read_answer,
    read_body,
    retry_after_s,
)
from swirl.errors import ConfigError, EndpointError, EndpointUnusable

GENERAL_KEY = "SWIRL_API_KEY"
_LONGEST_BACKOFF_S = 30.0


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


@dataclass
class _Route:
    """What every request to one endpoint shares."""

    limiter: Limiter
    headers: CIMultiDict[str]
    secret: Secret
    timeout: aiohttp.ClientTimeout
    urls: dict[str, URL] = field(default_factory=dict)


class Sender:
    """Sends requests through one aiohttp session, from `open` to `close` in one event loop, and again in another."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self._host_of_general_key: str | None = None
        self._routes: dict[Endpoint, _Route] = {}

    def open(self) -> None:
        """Limits and budgets begin anew."""
        self._routes = {}
        self._budget = ByteBudget()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the limiters hold the limits
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        await self._session.close()

    def give_back(self, response: Response) -> None:
        """What a response holds of the budget for large bodies, once its body is not needed."""
        self._budget.give(response.held_bytes)

    async def send(self, endpoint: Endpoint, path: str, body: bytes, *, tokens: int = 0) -> Response:
        """Ask until there is an answer or the endpoint's rules say stop; `give_back` must follow.

        Raises EndpointError, EndpointUnusable, ConfigError.
        """
        route = self._routes.get(endpoint) or self._find_route(endpoint)
        limiter, loop = route.limiter, asyncio.get_running_loop()
        reserved = len(body) // 4 + tokens
        failures, first_failure = 0, None
        while True:
            probe = await limiter.enter(reserved)
            self.progress.in_flight += 1
            asked = loop.time()
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
            fault, now = result, loop.time()
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
