"""An event loop beside the main thread: requests that are under way there go on while the main thread computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class BackgroundLoop:
    """Runs coroutines in a thread of its own; tasks that they leave behind go on there until the body ends.

    `prepare` is called first in that thread, for what a thread has of its own, such as its CUDA device.
    """

    def __init__(self, prepare: Callable[[], object] = lambda: None):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, args=(prepare,), name="swirl-events", daemon=True)

    def _work(self, prepare: Callable[[], object]) -> None:
        prepare()
        self._loop.run_forever()

    def __enter__(self) -> BackgroundLoop:
        self._thread.start()
        return self

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """What it returns or raises. A signal's exception in the main thread cancels it."""

        async def outcome():
            try:
                return await coroutine, None
            except BaseException as error:  # SystemExit, too, is the caller's: it would end the loop
                return None, error

        future = asyncio.run_coroutine_threadsafe(outcome(), self._loop)
        try:
            value, error = future.result()
        except BaseException:
            future.cancel()
            raise
        if error is not None:
            raise error
        return value

    def __exit__(self, *_: object) -> None:
        self.run(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
