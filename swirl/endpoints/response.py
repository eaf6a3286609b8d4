"""What comes back from a server, taken for hostile: bounded, decoded safely, and without the key.

A body is read in time linear in its length. Bodies above `_SMALL_BYTES` share one budget, so that many large answers
at once wait for one another and memory stays flat.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import aiohttp
import msgspec

LARGEST_ANSWER_BYTES = 32 << 20
_SMALL_BYTES = 256 << 10
_BUDGET_BYTES = 2 * LARGEST_ANSWER_BYTES
_TEMPLATE_TOKENS = 4096  # what a server may add of its own to a prompt
# What a field that is missing, of another type, or absurdly large or deep raises where it is read.
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
_decoder = msgspec.json.Decoder()


class Response(NamedTuple):
    """An answer as it came, and decoded. `held_bytes` of the budget are given back once it is on disk or dropped."""

    body: bytes
    answer: Any
    held_bytes: int = 0


class Fault(NamedTuple):
    """Why an attempt failed. `again`: it may be tried again; `later`: that costs no retry (429); `silent`: there was
    no answer in time.
    """

    reason: str
    status: int | None = None
    again: bool = False
    later: bool = False
    wait_s: float = 0.0
    silent: bool = False


class ByteBudget:
    """Bytes of large bodies held at a time, of one client. A body takes all it may need at once, or waits in line, so
    those that are being read always come to their end.
    """

    def __init__(self, num_bytes: int = _BUDGET_BYTES):
        self.free = num_bytes
        self._queue: deque[tuple[int, asyncio.Future]] = deque()

    async def take(self, num_bytes: int) -> None:
        if not self._queue and self.free >= num_bytes:
            self.free -= num_bytes
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free += num_bytes  # it was given in the same moment
            self._let_in()
            raise

    def give(self, num_bytes: int) -> None:
        self.free += num_bytes
        self._let_in()

    def _let_in(self) -> None:
        while self._queue:
            num_bytes, turn = self._queue[0]
            if turn.done():
                self._queue.popleft()  # cancelled while it waited
            elif self.free >= num_bytes:
                self._queue.popleft()
                self.free -= num_bytes
                turn.set_result(None)
            else:
                return


async def read_body(response: aiohttp.ClientResponse, budget: ByteBudget) -> tuple[bytes, int] | None:
    """(the body, bytes held of the budget), or None where it is too large to be an answer."""
    announced = response.content_length
    chunks: list[bytes] = []
    length, held = 0, 0
    try:
        while chunk := await response.content.readany():
            chunks.append(chunk)
            length += len(chunk)
            if length > LARGEST_ANSWER_BYTES or (announced or 0) > LARGEST_ANSWER_BYTES:
                response.close()
                budget.give(held)
                return None
            if length > _SMALL_BYTES and not held:
                most = announced or LARGEST_ANSWER_BYTES
                await budget.take(most)
                held = most
        body = b"".join(chunks)
    except BaseException:
        budget.give(held)
        raise
    budget.give(held - len(body) if held else 0)
    return body, len(body) if held else 0


def decode(body: bytes) -> Any:
    """JSON. Raises ValueError on anything else, one nested too deep included."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_answer(body: bytes, status: int, secret: Secret) -> Response | Fault:
    """The answer of a request that succeeded by its status."""
    body = secret.redact_bytes(body)
    try:
        answer = decode(body)
    except ValueError as error:
        # msgspec says so of a body that ends in the middle of a value, the empty one included.
        if "truncated" in str(error):
            return Fault("truncated answer", status, again=True)
        return Fault("expected JSON", status)
    if isinstance(answer, dict) and answer.get("error"):
        try:
            said = secret.one_line(f"HTTP {status} with an error: {answer['error']}")
        except RecursionError:
            said = f"HTTP {status} with an error nested too deep"
        return Fault(said, status)
    return Response(body, answer)


class Secret:
    """A key, and how it is kept out of what is written: as it is, or with any of its characters escaped as JSON does,
    however often.
    """

    def __init__(self, key: str):
        self._key = key.encode()
        characters = (rf"(?:{re.escape(c)}|\\+(?:{re.escape(c)}|u00(?i:{ord(c):02x})))" for c in key)
        self._pattern = re.compile("".join(characters).encode()) if key else None
        self._may_be_escaped = any(c in '"\\/' for c in key)

    def redact_bytes(self, body: bytes) -> bytes:
        """The body with `***` in place of the key."""
        if self._pattern is None or not (self._may_be_escaped or self._key in body or b"\\u00" in body):
            return body
        return self._pattern.sub(b"***", body)

    def one_line(self, text: str) -> str:
        """At most 300 characters of the text in one line. What is cut off is cut after the key is out."""
        redacted = self.redact_bytes(text.encode("utf-8", "replace")).decode()
        return " ".join(redacted[:4000].split())[:300]


def count_tokens(answer: Any, *, request_bytes: int, answer_bytes: int, asked_for: int) -> tuple[int, int]:
    """(prompt, completion) tokens as the answer counts them, 0 where it does not; OpenAI's `usage` and Gemini's
    `usageMetadata`.

    Counts are believed up to a token a byte, beside what a server may add to a prompt and hide of a completion: a
    limiter must not wait for tokens that cannot have been.
    """
    usage = (answer.get("usage") or answer.get("usageMetadata")) if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return 0, 0
    prompt = usage.get("prompt_tokens", usage.get("promptTokenCount"))
    completion = usage.get("completion_tokens", usage.get("candidatesTokenCount"))
    return (
        _clamp(prompt, request_bytes + _TEMPLATE_TOKENS),
        _clamp(completion, max(asked_for, answer_bytes)),
    )


def _clamp(count: Any, most: int) -> int:
    return min(max(count, 0), most) if type(count) is int else 0


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
