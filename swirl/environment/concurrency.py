"""Many coroutines at a time, few in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def as_done(coroutines: Iterable[Coroutine[Any, Any, Result]], in_flight: int) -> AsyncIterator[Result]:
    """Results as they come, at most `in_flight` running; the input is read lazily, the first failure is raised.

    Leaving early cancels what runs, and waits until it has ended.
    """
    waiting, running = iter(coroutines), set()
    try:
        while True:
            while len(running) < in_flight and (coroutine := next(waiting, None)) is not None:
                running.add(asyncio.create_task(coroutine))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
