"""Items asked for within a few milliseconds share one request, for endpoints that take many at once: embeddings,
retrieval servers and completions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import msgspec

from swirl.endpoints.client import Client, as_it_is, encode_payload, request_key
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.response import UNREADABLE, Response
from swirl.errors import EndpointError

_LARGEST_FLOAT32 = 3.4e38


class Batcher:
    """Gathers items into requests: at most `endpoint.batch_size` of them, or those of `endpoint.batch_ms`.

    `join(items, group)` makes the payload, `split(answer)` the parts, one an item, and `read(part)` what `ask` gives.
    Items of one `group` share a request. Each item is coalesced and cached by itself, whichever items it was sent with;
    a part that `read` refuses is not kept.
    """

    def __init__(
        self,
        client: Client,
        endpoint: Endpoint,
        path: str,
        *,
        join: Callable[[list[Any], Any], Any],
        split: Callable[[Any], list[Any]],
        read: Callable[[Any], Any] = as_it_is,
        tokens: int = 0,
    ):
        self.client, self.endpoint, self.path = client, endpoint, path
        self.join, self.split, self.read, self.tokens = join, split, read, tokens
        self._waiting: dict[Any, list[tuple[Any, asyncio.Future]]] = {}

    async def ask(self, item: Any, group: Any = None, optional: Collection[str] = ()) -> Any:
        """The item's part of an answer, read; `optional` and errors as Client.post has them."""
        alone = encode_payload(self.join([item], group))
        key = request_key(self.endpoint, self.path + "#item", 0, alone)
        return await self.client.cached(key, lambda: self._part(item, group), self.read, optional)

    async def _part(self, item: Any, group: Any) -> Response:
        loop = asyncio.get_running_loop()
        part = loop.create_future()
        waiting = self._waiting.setdefault(group, [])
        waiting.append((item, part))
        if len(waiting) == self.endpoint.batch_size:
            self._start(group, waiting)
        elif len(waiting) == 1:
            loop.call_later(self.endpoint.batch_ms / 1000, self._start, group, waiting)
        answer = await part
        try:
            return Response(msgspec.json.encode(answer), answer)
        except RecursionError:
            raise EndpointError(self.endpoint.url, "an answer nested too deep", status=200) from None

    def _start(self, group: Any, batch: list[tuple[Any, asyncio.Future]]) -> None:
        if self._waiting.get(group) is not batch:
            return  # it was full, and sent, before its time was over
        del self._waiting[group]
        wanted = [(item, part) for item, part in batch if not part.done()]
        if wanted:
            self.client.spawn(self._send(group, wanted))

    async def _send(self, group: Any, batch: list[tuple[Any, asyncio.Future]]) -> None:
        body = encode_payload(self.join([item for item, _ in batch], group))
        try:
            response = await self.client.send(self.endpoint, self.path, body, tokens=self.tokens * len(batch))
            self.client.drop(response)
            parts = self._parts(response.answer, len(batch))
        except EndpointError as error:
            if error.status in (400, 413, 422) and len(batch) > 1:  # one bad item must not fail the others
                half = len(batch) // 2
                await asyncio.gather(self._send(group, batch[:half]), self._send(group, batch[half:]))
                return
            for _, part in batch:
                if not part.done():
                    part.set_exception(type(error)(error.endpoint, error.reason, status=error.status))
            return
        except BaseException as error:
            for _, part in batch:
                part.cancel() if isinstance(error, asyncio.CancelledError) or part.done() else part.set_exception(error)
            raise
        for (_, part), answer in zip(batch, parts, strict=True):
            if not part.done():
                part.set_result(answer)

    def _parts(self, answer: Any, count: int) -> list[Any]:
        try:
            parts = self.split(answer)
        except UNREADABLE:
            parts = None
        if not isinstance(parts, list) or len(parts) != count:
            raise EndpointError(self.endpoint.url, f"expected {count} parts in the answer, one an item")
        return parts


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST_FLOAT32


def embedder(client: Client, endpoint: Endpoint, model: str) -> Callable[[list[str]], Awaitable[list[list[float]]]]:
    """`await embed(texts) -> vectors` by an /embeddings endpoint, one vector a text, in order."""

    def read(vector: Any) -> list[float]:
        if not (isinstance(vector, list) and all(map(_is_finite, vector)) and any(vector)):
            raise EndpointError(endpoint.url, "expected vectors of numbers, none of them empty or zero", status=200)
        return vector

    batcher = Batcher(
        client,
        endpoint,
        "/embeddings",
        join=lambda texts, _: {"model": model, "input": texts},
        split=lambda answer: [one["embedding"] for one in sorted(answer["data"], key=lambda one: one["index"])],
        read=read,
    )

    async def embed(texts: list[str]) -> list[list[float]]:
        return list(await asyncio.gather(*(batcher.ask(text) for text in texts)))

    return embed
