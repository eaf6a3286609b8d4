"""OpenAI's /completions, as vLLM, SGLang and llama.cpp speak it: the one protocol that takes token ids."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import msgspec

from swirl.endpoints.batcher import Batcher
from swirl.endpoints.response import UNREADABLE
from swirl.endpoints.turns import gemma_turns
from swirl.endpoints.wire import (
    KEEP_STOP_TEXT,
    TRUNCATED,
    Wire,
    as_dict,
    as_list,
    id_of_name,
    read_ids,
    seed_32,
    token_details,
)
from swirl.rollout.policy import PolicyState
from swirl.trajectories.record import Step


class CompletionsPolicy(Wire):
    """OpenAI's /completions. The state goes out as its token ids where they are known, else as Gemma's turns in text.

    Draws that share seed, temperature and length share a request, as all greedy ones do.
    """

    @cached_property
    def _batcher(self) -> Batcher:
        return Batcher(self.client, self.endpoint, "/completions", join=self._join, split=_choices, read=self._read)

    async def act(self, state: PolicyState) -> Step:
        """Raises EndpointError where there is no answer, or none that can be read."""
        prompt = list(state.ids) if state.ids else gemma_turns(state)
        needed = {
            "max_tokens": state.max_new_tokens,
            "temperature": state.temperature,
            "stop": ["<end_of_turn>", *state.stop_texts],
        }
        optional: dict[str, Any] = {"logprobs": max(1, state.top_log_probs), "return_token_ids": True}
        if state.temperature > 0:
            optional["seed"] = seed_32(state.seed)
        if state.stop_texts:
            optional[KEEP_STOP_TEXT] = True

        async def ask(payload, draw, optional):
            if KEEP_STOP_TEXT not in payload:
                payload["stop"] = ["<end_of_turn>"]
            group = msgspec.json.encode(payload)
            if not draw:
                return await self._batcher.ask(prompt, group, optional)
            body = self._join([prompt], group)
            return await self.client.post(
                self.endpoint,
                "/completions",
                body,
                draw=draw,
                tokens=state.max_new_tokens,
                read=self._read_only_choice,
                optional=optional,
            )

        choice = await self._ask(state, needed, optional, ask)
        given = as_dict(choice.get("logprobs"))
        names, values, tops = (as_list(given.get(name)) for name in ("tokens", "token_logprobs", "top_logprobs"))
        tokens = zip(names, values, tops if len(tops) == len(names) else [None] * len(names), strict=False)
        ids, log_probs, top = token_details(
            list(tokens),
            token=lambda token: token[0],
            token_id=lambda token: id_of_name(token[0]),
            log_prob=lambda token: token[1],
            top=lambda token: list(as_dict(token[2]).items()),
        )
        ids = read_ids(choice.get("token_ids")) or ids
        text, stop_text = self._stopped_at(choice["text"], choice, state, ids)
        stopped = choice.get("finish_reason") not in TRUNCATED
        return self._action(text, ids, log_probs, top, stopped=stopped, stop_text=stop_text)

    def _read(self, choice: Any) -> dict:
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise self._unreadable("choices[…].text")
        self._refuse_unfinished(choice)
        return choice

    def _read_only_choice(self, answer: Any) -> dict:
        try:
            (choice,) = _choices(answer)
        except UNREADABLE:
            raise self._unreadable("choices[0]") from None
        return self._read(choice)

    def _join(self, prompts: list, group: bytes) -> dict:
        prompt = prompts[0] if len(prompts) == 1 else prompts
        return {"model": self.model, "prompt": prompt, **msgspec.json.decode(group)}


def _choices(answer: Any) -> list[Any]:
    """One a prompt, in their order. Raises one of UNREADABLE."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(len(choices))):
        raise ValueError("expected one choice a prompt")
    return choices
