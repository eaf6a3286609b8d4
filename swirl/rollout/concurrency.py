"""Many coroutines at a time, few in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Generator, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")

_ENDED = object()


async def as_done(coroutines: Iterable[Coroutine[Any, Any, Result]], in_flight: int) -> AsyncIterator[Result]:
    """Results as they come, at most `in_flight` running; the input is read lazily, the first failure is raised.

    Leaving early cancels what runs, and waits until it has ended.
    """
    waiting = iter(coroutines)
    results: asyncio.Queue = asyncio.Queue(maxsize=in_flight)

    async def work():
        try:
            for coroutine in waiting:
                await results.put((await coroutine, None))
        except Exception as error:
            await results.put((None, error))
        await results.put(_ENDED)

    workers = [asyncio.create_task(work()) for _ in range(in_flight)]
    try:
        running = in_flight
        while running:
            item = await results.get()
            if item is _ENDED:
                running -= 1
                continue
            result, error = item
            if error is not None:
                raise error
            yield result
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        if not isinstance(coroutines, Generator):
            for coroutine in waiting:
                coroutine.close()
