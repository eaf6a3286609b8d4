"""A checkpoint as a policy: states waiting at the same time are sampled in one batch."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from swirl.model.tokenizer import Tokenizer
from swirl.rollout.policy import PolicyState
from swirl.sampling.engine import Engine
from swirl.trajectories.record import Step


class LocalPolicy:
    """Samples from a model in this process. `act` returns when the batch that holds its state is done.

    A batch is whatever has gathered while the last one ran, so tools and sampling overlap without a timer.
    Raises whatever the engine raises, in every `act` of the batch at fault.
    """

    def __init__(self, model, tokenizer: Tokenizer, *, name: str = "local"):
        self.name = name
        self.max_state_tokens = model.config.max_position_embeddings
        self.engine = Engine(model)
        self._tokenizer = tokenizer
        self.stop_ids = tokenizer.stop_ids
        self._waiting: list[tuple[PolicyState, asyncio.Future]] = []
        self._worker: asyncio.Task | None = None

    async def act(self, state: PolicyState) -> Step:
        if state.ids is None:
            state = replace(state, ids=self._ids_from_text(state))
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((state, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def _ids_from_text(self, state: PolicyState) -> tuple[int, ...]:
        """Ids of a state that came as text alone, such as a judge's prompt."""
        ids = self._tokenizer.prompt_ids(state.prompt)
        for step in state.steps:
            ids += self._tokenizer.action_ids(step.action) + self._tokenizer.observation_ids(step.observation or "")
        return tuple(ids)

    async def _gather(self) -> None:
        """Let every trajectory that can reach its next state do so: wait until a whole turn of the loop adds none."""
        count = -1
        while count != len(self._waiting):
            count = len(self._waiting)
            for _ in range(4):
                await asyncio.sleep(0)

    async def _work(self) -> None:
        while True:
            await self._gather()
            batch = [pair for pair in self._waiting if not pair[1].cancelled()]
            self._waiting.clear()
            if not batch:
                return
            try:
                actions = await asyncio.to_thread(self._sample, [state for state, _ in batch])
            except BaseException as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                if isinstance(error, asyncio.CancelledError):
                    raise
                continue
            for (_, future), action in zip(batch, actions, strict=True):
                if not future.done():
                    future.set_result(action)

    def _sample(self, states: list[PolicyState]) -> list[Step]:
        """One engine call a (temperature, length) pair; a batch nearly always holds one."""
        actions: list[Step | None] = [None] * len(states)
        kinds: dict[tuple[float, int], list[int]] = {}
        for index, state in enumerate(states):
            kinds.setdefault((state.temperature, state.max_new_tokens), []).append(index)
        for (temperature, max_new_tokens), members in kinds.items():
            completions = self.engine.sample(
                [list(states[i].ids) for i in members],
                seeds=[states[i].seed for i in members],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop_ids=self.stop_ids,
            )
            for i, completion in zip(members, completions, strict=True):
                actions[i] = completion_action(completion, self._tokenizer)
        return actions


def completion_action(completion, tokenizer: Tokenizer) -> Step:
    """The engine's completion as an action: its text is without the stop token, its ids are with it."""
    ids = completion.ids[:-1] if completion.stopped else completion.ids
    return Step(
        action=tokenizer.decode(ids),
        action_ids=completion.ids,
        log_probs=completion.log_probs,
        truncated=not completion.stopped,
    )
