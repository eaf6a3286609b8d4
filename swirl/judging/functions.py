"""A function as a judge: of (question, steps so far, step) to a reward, one at a time or in batches."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from swirl.errors import ConfigError
from swirl.judging.judges import Judgement, StepToJudge
from swirl.trajectories.record import Judged

log = logging.getLogger("swirl.judging")


def batched(size: int = 64) -> Callable[[Callable], Callable]:
    """Decorator of a reward function that takes lists, of at most `size` questions, of their steps so far and of their
    steps, and gives a list of rewards.
    """

    def mark(function: Callable) -> Callable:
        function.batch_size = size
        return function

    return mark


class FunctionJudge:
    """Asks a plain or an async function; a batched one (see `batched`) gets what waits at the same time.

    The function gives a number from 0 to 1, True or False, "GOOD" or "BAD", or None for no opinion. From 0.5 on a step
    is GOOD. Anything else, NaN included, masks the step, and is named once. An exception of the function's own ends the
    run: ConfigError with the place it came from.
    """

    def __init__(self, function: Callable[..., Any], name: str):
        self.function, self.name = function, name
        self.batch_size = getattr(function, "batch_size", 0)
        self._waiting: list[tuple[StepToJudge, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None
        self._told = False

    async def judge(self, item: StepToJudge) -> Judgement:
        """Raises ConfigError where the function fails. It is never asked about an action that the environment refuses:
        that is BAD, with reward 0.
        """
        if item.step.call is None:
            return Judgement(verdict="BAD", reason=f"not an action: {item.step.invalid}", reward=0.0)
        if not self.batch_size:
            return self._judgement(await self._ask(item.question, item.steps, item.step))
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        await asyncio.sleep(0)  # let all that can ask at this moment do so
        while self._waiting:
            batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            items = [item for item, _ in batch]
            try:
                values = await self._ask(
                    [item.question for item in items], [item.steps for item in items], [item.step for item in items]
                )
                values = list(values) if hasattr(values, "__iter__") else []
                if len(values) != len(items):
                    raise ConfigError(f"{self.name}: expected {len(items)} rewards, got {len(values)}")
                for (_, future), value in zip(batch, values, strict=True):
                    if not future.done():
                        future.set_result(self._judgement(value))
            except BaseException as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    async def _ask(self, *arguments: Any) -> Any:
        try:
            value = self.function(*arguments)
            return await value if inspect.isawaitable(value) else value
        except Exception as error:
            traceback = error.__traceback__
            while traceback.tb_next:
                traceback = traceback.tb_next
            place = f"{traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
            raise ConfigError(f"{self.name}: {place}: {type(error).__name__}: {error}") from error

    def _judgement(self, value: Any) -> Judgement:
        if value is None:
            return Judgement(verdict=None, reason="no opinion", judged=Judged.UNREADABLE)
        if value in ("GOOD", "BAD"):
            return Judgement(verdict=value, reason=self.name)
        try:
            reward = float(value)
        except (TypeError, ValueError):
            reward = math.nan
        if not 0 <= reward <= 1:
            if not self._told:
                log.warning("%s: expected a number from 0 to 1, got %r: such steps are masked", self.name, value)
                self._told = True
            reason = f"expected a number from 0 to 1, got {value!r}"
            return Judgement(verdict=None, reason=reason, judged=Judged.UNREADABLE)
        return Judgement(verdict="GOOD" if reward >= 0.5 else "BAD", reason=self.name, reward=reward)
