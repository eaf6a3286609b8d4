"""What one endpoint may be asked, and when: requests in flight, requests and tokens a minute, and a circuit breaker.

The breaker opens after failures in a row: `FAILURES_TO_PAUSE`, or a quarter of what is in flight if that is more. No
request is sent for a while; then it is half open, and one request goes out as a probe. The probe's success closes the
breaker, its failure makes the next pause twice as long. Failures met while the endpoint is paused cost no request its
retries, so that an outage costs time and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque

from swirl.errors import EndpointUnusable

FAILURES_TO_PAUSE = 5  # at most Endpoint.retries, or one request alone would give up before the breaker pauses
_LONGEST_PAUSE_S = 30.0
_SLOTS_PER_MS = 5  # requests that start together stay together: spreading them took 5% off a job of 40 rounds

log = logging.getLogger("swirl.client")


class Rate:
    """At most `per_minute` units in any minute (a leaky bucket that starts with a second's worth). Pure arithmetic."""

    def __init__(self, per_minute: float):
        burst = max(1.0, per_minute / 60)
        self.per_second = (per_minute - burst if per_minute >= 60 else per_minute) / 60
        self.tolerance_s = (burst - 1) / self.per_second
        self.free_at = float("-inf")

    def reserve(self, units: float, now: float) -> float:
        """Seconds to wait before going; a cost above the burst goes at once where nothing is owed, and is
        owed then.
        """
        start = max(self.free_at, now - self.tolerance_s)
        self.free_at = start + units / self.per_second
        return max(0.0, start - now)

    def correct(self, units: float) -> None:
        """Take off (negative) or add what a reservation was wrong by."""
        self.free_at += units / self.per_second


class Limiter:
    """The state of one endpoint in one event loop."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.reached = False  # whether any HTTP answer ever came
        self.unusable: str | None = None
        self._requests = Rate(endpoint.requests_per_minute) if endpoint.requests_per_minute else None
        self._tokens = Rate(endpoint.tokens_per_minute) if endpoint.tokens_per_minute else None
        self._free_slots = min(endpoint.concurrency, _SLOTS_PER_MS)
        self._slots_to_come = endpoint.concurrency - self._free_slots
        self._growing = False
        self._queue: deque[asyncio.Future] = deque()  # who waits for a slot
        self._gate = asyncio.Event()
        self._gate.set()
        self._failures = 0
        self._pauses = 0
        self._resume: asyncio.TimerHandle | None = None
        self._probe = False  # the gate is open for one request only
        self._outage_since: float | None = None
        self._silent_since: float | None = None

    @property
    def paused(self) -> bool:
        return self._pauses > 0

    @property
    def _slots_taken(self) -> int:
        return self.endpoint.concurrency - self._slots_to_come - self._free_slots

    async def enter(self, tokens: int) -> bool:
        """Wait for a slot, the rates and the breaker; `leave` must follow. True: this request is the breaker's probe.

        Raises EndpointUnusable, having taken nothing.
        """
        await self._take_slot()
        try:
            if self._requests or self._tokens:
                await self._wait_for_rates(tokens)
            if self._slots_to_come and not self._growing:
                self._growing = True
                asyncio.get_running_loop().call_later(0.001, self._grow)
            while not self._gate.is_set():
                await self._gate.wait()
            if self.unusable:
                raise EndpointUnusable(self.endpoint.url, self.unusable)
        except BaseException:
            self._give_slot()
            raise
        if not self._probe:
            return False
        self._probe = False
        self._gate.clear()
        return True

    def leave(self, probe: bool) -> None:
        self._give_slot()
        if probe and self.paused and self._resume is None and not self.unusable:
            self._half_open()  # cancelled or timed out, it said nothing of the endpoint

    async def _wait_for_rates(self, tokens: int) -> None:
        limits = [(rate, units) for rate, units in ((self._requests, 1), (self._tokens, tokens)) if rate]
        now = asyncio.get_running_loop().time()
        wait_s = max(rate.reserve(units, now) for rate, units in limits)
        if wait_s > 0:
            try:
                await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                for rate, units in limits:
                    rate.correct(-units)
                raise

    async def _take_slot(self) -> None:
        if self._free_slots:
            self._free_slots -= 1
            return
        slot = asyncio.get_running_loop().create_future()
        self._queue.append(slot)
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self._give_slot()  # it was handed over in the same moment
            raise

    def _give_slot(self) -> None:
        while self._queue:
            slot = self._queue.popleft()
            if not slot.done():
                slot.set_result(None)
                return
        self._free_slots += 1

    def _grow(self) -> None:
        more = min(self._slots_to_come, _SLOTS_PER_MS)
        self._slots_to_come -= more
        for _ in range(more):
            self._give_slot()
        if self._slots_to_come:
            asyncio.get_running_loop().call_later(0.001, self._grow)

    def correct_tokens(self, units: int) -> None:
        if self._tokens:
            self._tokens.correct(units)

    def stayed_silent(self, since: float, reason: str) -> None:
        """A request begun at `since` (loop's time) had no answer in time. One is its own fault; when all are, for three
        times `read_s` or as long as `retry_deadline_s`, it is the endpoint's: a hung server must not use up the job's
        requests one by one.
        """
        self._silent_since = since if self._silent_since is None else min(since, self._silent_since)
        silent_s = asyncio.get_running_loop().time() - self._silent_since
        if silent_s > min(self.endpoint.retry_deadline_s, 3 * self.endpoint.read_s) and not self.unusable:
            self.give_up(f"no answer to any request for {silent_s:.0f} s ({reason})")

    def succeeded(self) -> None:
        self.reached = True
        self._failures = 0
        self._silent_since = None
        if self.paused:
            if self._pauses > 1:
                log.warning("%s: answers again", self.endpoint.url)
            self._pauses, self._outage_since, self._probe = 0, None, False
            if self._resume:
                self._resume.cancel()
                self._resume = None
            self._gate.set()

    def failed(self, reason: str, wait_s: float) -> None:
        """A connect failure, 429, 5xx or broken body; `wait_s` is the server's Retry-After, 0 where it gave
        none.
        """
        self._failures += 1
        loop = asyncio.get_running_loop()
        if self._resume or self.unusable:
            return
        if not self.paused and self._failures < max(FAILURES_TO_PAUSE, self._slots_taken // 4):
            return
        now = loop.time()
        if self._outage_since is None:
            self._outage_since = now
        if now - self._outage_since + wait_s > self.endpoint.retry_deadline_s:
            return self.give_up(f"no answer for {now - self._outage_since:.0f} s ({reason})")
        if not self.reached and self._pauses >= self.endpoint.retries:
            return self.give_up(reason)
        backoff = min(_LONGEST_PAUSE_S, self.endpoint.backoff_s * 2**self._pauses)
        pause_s = max(wait_s, backoff * random.uniform(0.5, 1.0))
        self._pauses += 1
        if (
            self._pauses > 1 and self._pauses & (self._pauses - 1) == 0
        ):  # a lone streak is no news, nor each of a hundred
            gone_s = now - self._outage_since
            log.warning(
                "%s: %s, for %.0f s; waiting, asked again in %.1f s", self.endpoint.url, reason, gone_s, pause_s
            )
        self._probe = False
        self._gate.clear()
        self._resume = loop.call_later(pause_s, self._half_open)

    def _half_open(self) -> None:
        self._resume, self._probe = None, True
        self._gate.set()

    def give_up(self, reason: str) -> None:
        """From here on every request is refused at once."""
        self.unusable = reason
        self._probe = False
        self._gate.set()
