"""Gemini's generateContent."""

from __future__ import annotations

from typing import Any

from swirl.endpoints.turns import chat_messages
from swirl.endpoints.wire import Wire, as_dict, as_list, seed_32, token_details
from swirl.rollout.policy import PolicyState
from swirl.trajectories.record import Step


class GeminiPolicy(Wire):
    """Gemini's generateContent. `endpoint.url` ends before /models, as in https://…/v1beta."""

    async def act(self, state: PolicyState) -> Step:
        """An empty, truncated action where the server blocked it.

        Raises EndpointError where there is no answer, or none that can be read.
        """
        roles = {"user": "user", "assistant": "model"}
        contents = [{"role": roles[m["role"]], "parts": [{"text": m["content"]}]} for m in chat_messages(state)]
        needed = {"maxOutputTokens": state.max_new_tokens, "temperature": state.temperature}
        optional: dict[str, Any] = {"seed": seed_32(state.seed)}
        if state.top_log_probs:
            optional |= {"responseLogprobs": True, "logprobs": state.top_log_probs}

        def ask(generation, draw, optional):
            payload = {"contents": contents, "generationConfig": generation}
            path = f"/models/{self.model}:generateContent"
            how = {"draw": draw, "tokens": state.max_new_tokens, "read": self._read, "optional": optional}
            return self.client.post(self.endpoint, path, payload, **how)

        choice, text = await self._ask(state, needed, optional, ask)
        given = as_dict(choice.get("logprobsResult"))
        chosen, others = as_list(given.get("chosenCandidates")), as_list(given.get("topCandidates"))
        tokens = list(zip(chosen, others, strict=True)) if len(chosen) == len(others) else [(c, {}) for c in chosen]
        ids, log_probs, top = token_details(
            tokens,
            token=lambda token: token[0]["token"],
            token_id=lambda token: token[0].get("tokenId"),
            log_prob=lambda token: token[0]["logProbability"],
            top=lambda token: [(o["token"], o["logProbability"]) for o in token[1].get("candidates") or ()],
        )
        return self._action(text, ids, log_probs, top, stopped=choice.get("finishReason", "STOP") == "STOP")

    def _read(self, answer: Any) -> tuple[dict, str]:
        """(the candidate, its text)"""
        candidates = as_dict(answer).get("candidates")
        if not candidates:
            if as_dict(answer).get("promptFeedback"):
                return {"finishReason": "SAFETY"}, ""
            raise self._unreadable("candidates[0].content")
        try:
            choice = candidates[0]
            parts = as_dict(choice.get("content")).get("parts") or []
            return choice, "".join(part.get("text", "") for part in parts if not part.get("thought"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._unreadable("candidates[0].content.parts[…].text") from None
