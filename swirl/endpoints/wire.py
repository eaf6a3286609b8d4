"""Policies: what proposes the next action; those over the wire are here.

A policy is any object with a `name` and `async def act(self, state: PolicyState) -> Step`. A server's
policy speaks OpenAI's chat or completions, or Gemini's generateContent. Token ids and log-probs are kept
where the server gives them (vLLM, SGLang, llama.cpp), and never made up from text.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from swirl.endpoints.client import Client, refused_fields
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.response import UNREADABLE
from swirl.errors import EndpointError
from swirl.rollout.policy import PolicyState, TurnTokenizer
from swirl.trajectories.record import Step

# finish_reason of an action that is truncated; any other, or none, is the model's own end.
TRUNCATED = ("length", "content_filter")
# vLLM's name for leaving a stop text in the answer. Where a server refuses it no stop text is sent: its answers would
# lack the closing tag, and no one could tell them from a turn that ended without.
KEEP_STOP_TEXT = "include_stop_str_in_output"
_SERVER_FAILED = ("abort", "error")  # a server that shuts down, say: no answer, and none to be kept

_LONGEST_WAIT_FOR_FIRST_S = 5.0
_ROUNDING = 1e-3  # above 0, of a log-prob that means 0

log = logging.getLogger("swirl.client")


class Wire:
    """What the protocols share: client, endpoint, and the optional fields that a server turned down."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        client: Client,
        *,
        tokenizer: TurnTokenizer | None = None,
    ):
        self.name = f"{endpoint.url}#{model}"
        self.endpoint, self.model, self.client, self.tokenizer = endpoint, model, client, tokenizer
        self._refused: set[str] = set()
        self._first: dict | None = None  # what the first request asks
        self._first_is_over = asyncio.Event()

    async def _ask(self, state: PolicyState, needed: dict, optional: dict, ask) -> Any:
        """`ask(payload, draw, optional)`; an optional field that the server refuses by name is left out from then on.

        The first request goes ahead of the others, so that such a field is refused once, and not by as many as are in
        flight: a refusal comes at once, so nobody waits long for an answer.
        """
        greedy = state.temperature == 0  # draws that differ in their seed alone are one
        asked = {**needed, **optional, **({"seed": None} if greedy else {})}
        if self._first is None:
            self._first = asked
            try:
                return await self._ask_until_taken(state, needed, optional, ask)
            finally:
                self._first_is_over.set()
        if not self._first_is_over.is_set() and asked != self._first:  # its equals share its answer
            with suppress(TimeoutError):
                async with asyncio.timeout(_LONGEST_WAIT_FOR_FIRST_S):
                    await self._first_is_over.wait()
            self._first_is_over.set()
        return await self._ask_until_taken(state, needed, optional, ask)

    async def _ask_until_taken(self, state: PolicyState, needed: dict, optional: dict, ask) -> Any:
        """`draw` is 0 where the payload says by itself which draw it is.

        Without `seed` the draws of one state are equal requests, which would share one answer: there it is the seed, so
        that each has its own.
        """
        while True:
            sent = {name: value for name, value in optional.items() if name not in self._refused}
            if "max_tokens" in self._refused:  # OpenAI's newer name for it
                sent["max_completion_tokens"] = optional["max_tokens"]
            draw = 0 if "seed" in sent or state.temperature == 0 else state.seed
            try:
                return await ask({**needed, **sent}, draw, sent)
            except EndpointError as error:
                named = refused_fields(error, sent)
                if not named:
                    raise
                for name in sorted(named - self._refused):
                    log.warning("%s: refuses '%s', going on without", self.endpoint.url, name)
                self._refused |= named

    def _action(self, text: str, ids, log_probs, top, *, stopped: bool, stop_text: str | None = None) -> Step:
        """Log-probs without an id each are of no use to training, and dropped."""
        if ids is None or log_probs is None or len(ids) != len(log_probs):
            log_probs = None
        if ids is not None and self.tokenizer is not None:
            ended = stopped and stop_text is None
            ids, log_probs = _in_our_form(ids, log_probs, text, self.tokenizer, stopped=ended)
        return Step(
            action=text,
            action_ids=ids,
            log_probs=log_probs,
            truncated=not stopped,
            stop_text=stop_text,
            top_log_probs=top,
        )

    def _stopped_at(self, text: str, choice: dict, state: PolicyState, ids) -> tuple[str, str | None]:
        """(the text, the stop text that ended it or None). A server that leaves a stop text out of the text and says
        which one it was gets it back: the model wrote it. What the last token has beyond the stop text is part of
        the action where ids and tokenizer show it.
        """
        if not state.stop_texts or choice.get("finish_reason") in TRUNCATED:
            return text, None
        named = choice.get("stop_reason", choice.get("matched_stop"))
        if named in state.stop_texts and named not in text:
            text += named
        stop_text = next((stop for stop in state.stop_texts if text.endswith(stop)), None)
        if ids is None or self.tokenizer is None or stop_text is None:
            return text, stop_text
        if ids[-1] in (self.tokenizer.end_of_turn_id, self.tokenizer.eos_id):
            return text, None  # the model ended its turn by itself
        try:
            whole = self.tokenizer.decode(ids)
        except ValueError:  # ids of another vocabulary
            return text, stop_text
        return whole if whole.startswith(text) and stop_text not in self.tokenizer.decode(ids[:-1]) else text, stop_text

    def _unreadable(self, expected: str) -> EndpointError:
        return EndpointError(self.endpoint.url, f"expected {expected} in the answer", status=200)

    def _refuse_unfinished(self, choice: dict) -> None:
        reason = choice.get("finish_reason")
        if reason in _SERVER_FAILED:
            raise EndpointError(self.endpoint.url, f"the server ended the answer with '{reason}'", status=200)


def seed_32(seed: int) -> int:
    return seed % 2**31  # Gemini's is an int32, and numpy's behind other servers takes no more than 32 bits


def as_dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def given_instead(message: dict) -> str:
    """What a message without content holds, such as tool calls of the server's own making, or thoughts alone."""
    return ", ".join(sorted(name for name, value in message.items() if value and name != "role"))


def read_ids(value: Any) -> tuple[int, ...] | None:
    good = isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value)
    return tuple(value) if good else None


def id_of_name(name: Any) -> int | None:
    """vLLM and SGLang can give tokens as `token_id:123`."""
    head, _, digits = name.partition("token_id:") if isinstance(name, str) else ("", "", "")
    return int(digits) if not head and digits.isdecimal() and digits.isascii() else None


def _in_our_form(ids, log_probs, text: str, tokenizer: TurnTokenizer, *, stopped: bool):
    """(ids, log_probs) with the turn's end, as the tokenizer writes an action; None where they are not this text's.

    Servers leave the end out, or another text than the ids' own: then the text is what came back, and is what counts.
    """
    ends = (tokenizer.end_of_turn_id, tokenizer.eos_id)
    ended = ids[-1] in ends
    try:
        same = tokenizer.decode(ids[:-1] if ended else ids) == text
    except ValueError:  # ids of another vocabulary
        same = False
    if not same:
        return None, None
    return (ids, log_probs) if ended or not stopped else ((*ids, tokenizer.end_of_turn_id), None)


def token_details(
    tokens: Any,
    *,
    token: Callable[[Any], Any],
    token_id: Callable[[Any], Any],
    log_prob: Callable[[Any], Any],
    top: Callable[[Any], Any],
):
    """(ids, log_probs, top_log_probs) of an answer's tokens, each None unless every token has it.

    `top_log_probs` has the drawn token first. A log-prob that is no finite number at most 0 is none.
    """

    def read(details: Callable[[], Any]) -> Any:
        try:
            return details()
        except UNREADABLE:
            return None

    if not isinstance(tokens, list) or not tokens:
        return None, None, None
    ids = read(lambda: read_ids([token_id(one) for one in tokens]))
    log_probs = read(lambda: tuple(read_log_prob(log_prob(one)) for one in tokens))
    tops = read(lambda: tuple(tuple((str(name), read_log_prob(value)) for name, value in top(one)) for one in tokens))
    drawn = read(lambda: [str(token(one)) for one in tokens])
    if log_probs is None or drawn is None or not any(tops or ()):
        return ids, log_probs, None
    return (
        ids,
        log_probs,
        tuple(
            ((name, value), *(other for other in others if other[0] != name))
            for name, value, others in zip(drawn, log_probs, tops, strict=True)
        ),
    )


def read_log_prob(value: Any) -> float:
    """A natural log as a server gives it. Raises ValueError where it is no finite number at most 0; a hair above is 0,
    for rounding leaves certain tokens there.
    """
    if type(value) not in (int, float) or not -math.inf < value <= _ROUNDING:
        raise ValueError(f"expected a finite log-prob of at most 0, got {value}")
    return min(0.0, float(value))
