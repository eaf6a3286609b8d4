"""A checkpoint as a policy: states of many trajectories are sampled together, and each goes on the moment its action
has ended."""

from __future__ import annotations

from swirl.model.tokenizer import Tokenizer
from swirl.rollout.policy import PolicyState
from swirl.sampling.draw import SamplingParams
from swirl.sampling.engine import MAX_CACHE_TOKENS, Engine
from swirl.trajectories.record import Step


class LocalPolicy:
    """Samples from a model in this process. `act` returns when its action has ended, whatever else is in flight.

    An action ends with one of the tokenizer's stop ids, or with the token that completes one of the state's stop texts.
    Raises whatever the engine raises, in every `act` in flight.
    """

    def __init__(self, model, tokenizer: Tokenizer, *, name: str = "local", max_cache_tokens: int = MAX_CACHE_TOKENS):
        self.name = name
        self.max_state_tokens = model.config.max_position_embeddings
        self.engine = Engine(model, decode=tokenizer.decode, max_cache_tokens=max_cache_tokens)
        self._tokenizer = tokenizer
        self.stop_ids = tokenizer.stop_ids

    async def act(self, state: PolicyState) -> Step:
        ids = self._ids_from_text(state) if state.ids is None else state.ids
        params = SamplingParams(state.max_new_tokens, state.temperature, self.stop_ids, state.stop_texts)
        return completion_action(await self.engine.generate(ids, seed=state.seed, params=params), self._tokenizer)

    def _ids_from_text(self, state: PolicyState) -> tuple[int, ...]:
        """Ids of a state that came as text alone, such as a judge's prompt."""
        ids = self._tokenizer.prompt_ids(state.prompt)
        for step in state.steps:
            ids += self._tokenizer.action_ids(step.action) + self._tokenizer.observation_ids(step.observation or "")
        return tuple(ids)


def completion_action(completion, tokenizer: Tokenizer) -> Step:
    """The engine's completion as an action: its text is without the stop token, its ids are with it. A stop text is
    part of both.
    """
    ends_with_id = completion.stopped and completion.stop_text is None
    return Step(
        action=tokenizer.decode(completion.ids[:-1] if ends_with_id else completion.ids),
        action_ids=completion.ids,
        log_probs=completion.log_probs,
        truncated=not completion.stopped,
        stop_text=completion.stop_text,
    )
