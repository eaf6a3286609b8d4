"""OpenAI's /chat/completions, as vLLM, SGLang, llama.cpp and `transformers serve` speak it."""

from __future__ import annotations

from typing import Any

from swirl.endpoints.client import Client
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.turns import chat_messages
from swirl.endpoints.wire import (
    KEEP_STOP_TEXT,
    TRUNCATED,
    Wire,
    as_dict,
    given_instead,
    id_of_name,
    read_ids,
    seed_32,
    token_details,
)
from swirl.rollout.policy import PolicyState, TurnTokenizer
from swirl.trajectories.record import Step


class ChatPolicy(Wire):
    """OpenAI's /chat/completions, as vLLM, SGLang, llama.cpp and `transformers serve` speak it.

    `endpoint.url` ends before /chat/completions. `details` asks for token ids and log-probs as well.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        client: Client,
        *,
        details: bool = True,
        tokenizer: TurnTokenizer | None = None,
    ):
        super().__init__(endpoint, model, client, tokenizer=tokenizer)
        self.details = details

    async def act(self, state: PolicyState) -> Step:
        """Raises EndpointError where there is no answer, or none that can be read."""
        needed = {
            "model": self.model,
            "messages": chat_messages(state),
            "temperature": state.temperature,
        }
        optional: dict[str, Any] = {"max_tokens": state.max_new_tokens, "seed": seed_32(state.seed)}
        if self.details or state.top_log_probs:
            optional["logprobs"] = True
        if self.details:
            optional["return_token_ids"] = True
        if state.top_log_probs:
            optional["top_logprobs"] = state.top_log_probs
        if state.stop_texts:
            optional |= {"stop": list(state.stop_texts), KEEP_STOP_TEXT: True}

        def ask(payload, draw, optional):
            if KEEP_STOP_TEXT not in payload:
                payload.pop("stop", None)
            return self.client.post(
                self.endpoint,
                "/chat/completions",
                payload,
                draw=draw,
                tokens=state.max_new_tokens,
                read=self._read,
                optional=optional,
            )

        choice, text = await self._ask(state, needed, optional, ask)
        tokens = as_dict(choice.get("logprobs")).get("content")
        ids, log_probs, top = token_details(
            tokens,
            token=lambda token: token["token"],
            token_id=lambda token: token.get("id", id_of_name(token.get("token"))),
            log_prob=lambda token: token["logprob"],
            top=lambda token: [(other["token"], other["logprob"]) for other in token.get("top_logprobs") or ()],
        )
        ids = read_ids(choice.get("token_ids")) or ids
        text, stop_text = self._stopped_at(text, choice, state, ids)
        stopped = choice.get("finish_reason") not in TRUNCATED
        return self._action(text, ids, log_probs, top, stopped=stopped, stop_text=stop_text)

    def _read(self, answer: Any) -> tuple[dict, str]:
        """(the choice, its text)"""
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content")
            if text is None:
                given = given_instead(choice["message"])
                if given and choice.get("finish_reason") not in TRUNCATED:
                    raise self._unreadable(f"text in choices[0].message.content, not {given}")
                text = ""
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._unreadable("choices[0].message.content") from None
        self._refuse_unfinished(choice)
        return choice, text
