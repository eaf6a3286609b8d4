"""The event loop beside the main thread."""

import asyncio
import threading
import time

import pytest

from swirl.app.background import BackgroundLoop


def test_what_a_coroutine_returns_or_raises_comes_back():
    prepared = []

    async def fails(error):
        raise error

    with BackgroundLoop(lambda: prepared.append(threading.current_thread().name)) as loop:
        assert loop.run(asyncio.sleep(0, "done")) == "done"
        for error in (ValueError("no"), SystemExit(3), KeyboardInterrupt()):
            with pytest.raises(type(error)) as raised:
                loop.run(fails(error))
            assert raised.value is error
        assert loop.run(asyncio.sleep(0, "still there")) == "still there"
    assert prepared == ["swirl-events"]


def test_tasks_go_on_while_the_main_thread_is_busy_and_end_with_the_body():
    count, ended = [], []

    async def tick():
        try:
            while True:
                await asyncio.sleep(0.001)
                count.append(1)
        finally:
            ended.append(True)

    async def leave_behind():
        return asyncio.create_task(tick())

    with BackgroundLoop() as loop:
        task = loop.run(leave_behind())
        time.sleep(0.05)
        assert len(count) > 2 and not ended
    assert ended == [True] and task.cancelled()


def test_an_exception_in_the_main_thread_cancels_what_it_waits_for(monkeypatch):
    cancelled = threading.Event()

    async def waits():
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with BackgroundLoop() as loop:
        begin = asyncio.run_coroutine_threadsafe

        def interrupted(*arguments):
            future = begin(*arguments)
            time.sleep(0.02)  # it has begun
            monkeypatch.setattr(future, "result", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
            return future

        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loop.run(waits())
        assert cancelled.wait(5)
