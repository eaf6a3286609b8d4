"""Policies: what proposes the next action; those over the wire are here.

A policy is any object with a `name` and `async def act(self, state: PolicyState) -> PolicyAction`. A server's
policy speaks OpenAI's chat or completions, or Gemini's generateContent. Token ids and log-probs are kept
where the server gives them (vLLM, SGLang, llama.cpp), and never made up from text.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import msgspec

from swirl.environment.batcher import Batcher
from swirl.environment.client import Client, Endpoint
from swirl.errors import ConfigError, EndpointError
from swirl.trajectory import Step

TopLogProbs = tuple[tuple[tuple[str, float], ...], ...]

# Of finish_reason; any other, or none, is the model's own end.
_CUT_OFF = ("length", "content_filter")
_SERVER_FAILED = ("abort", "error")  # a server that shuts down, say: no answer, and none to be kept

log = logging.getLogger("swirl.client")


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """State s_k: the prompt and the steps before k, each with its observation.

    `ids` are the state's token ids where they are known. `seed` makes the draw repeatable; `temperature` 0 is
    greedy; `max_new_tokens` bounds the action. `top_log_probs` asks for that many alternatives at each token.
    """

    prompt: str
    steps: tuple[Step, ...] = ()
    ids: tuple[int, ...] | None = None
    seed: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256
    top_log_probs: int = 0


class PolicyAction(msgspec.Struct, frozen=True, kw_only=True):
    """Action a_k. `ids` and `log_probs` (natural log, one per id) are None where the endpoint gives none.

    `stopped` is False where `max_new_tokens`, or a server's safety filter, cut the action off.
    `top_log_probs` holds (token, log-prob) alternatives for each token of the text where they were asked for
    and given.
    """

    text: str
    ids: tuple[int, ...] | None = None
    log_probs: tuple[float, ...] | None = None
    stopped: bool = True
    top_log_probs: TopLogProbs | None = None


class TokenCoder(Protocol):
    """How turns become token ids; swirl.model.tokenizer.Tokenizer is one."""

    fingerprint: str
    end_of_turn_id: int
    eos_id: int

    def prompt_ids(self, prompt: str) -> list[int]: ...
    def action_ids(self, action: str) -> list[int]: ...
    def observation_ids(self, observation: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class _Wire:
    """What the protocols share: client, endpoint, and the optional fields that a server turned down."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        client: Client,
        *,
        coder: TokenCoder | None = None,
        owns_client: bool = False,
    ):
        self.name = f"{endpoint.url}#{model}"
        self.endpoint, self.model, self.client, self.coder = endpoint, model, client, coder
        self._owns_client = owns_client
        self._refused: set[str] = set()

    async def close(self) -> None:
        """Close the client, where it was opened for this policy alone."""
        if self._owns_client:
            await self.client.close()

    async def _ask(self, state: PolicyState, needed: dict, optional: dict, ask) -> Any:
        """`ask(payload, draw)`; an optional field that the server refuses by name is left out from then on.

        `draw` is 0 where the payload says by itself which draw it is. Without `seed` the draws of one state are equal
        requests, which would share one answer: there it is the seed, so that each has its own, found again.
        """
        while True:
            sent = {name: value for name, value in optional.items() if name not in self._refused}
            if "max_tokens" in self._refused:  # OpenAI's newer name for it
                sent["max_completion_tokens"] = optional["max_tokens"]
            draw = 0 if "seed" in sent or state.temperature == 0 else state.seed
            try:
                return await ask({**needed, **sent}, draw)
            except EndpointError as error:
                refused = error.status in (400, 422)
                named = {name for name in sent if refused and re.search(rf"\b{name}\b", error.reason)}
                if not named:
                    raise
                for name in sorted(named - self._refused):
                    log.warning("%s: refuses '%s', going on without", self.endpoint.url, name)
                self._refused |= named

    def _action(self, text: str, ids, log_probs, top, *, stopped: bool) -> PolicyAction:
        """Log-probs without an id each are of no use to training, and dropped."""
        if ids is None or log_probs is None or len(ids) != len(log_probs):
            log_probs = None
        if ids is not None and self.coder is not None:
            ids, log_probs = _in_our_form(ids, log_probs, text, self.coder, stopped=stopped)
        return PolicyAction(text=text, ids=ids, log_probs=log_probs, stopped=stopped, top_log_probs=top)

    def _unreadable(self, expected: str) -> EndpointError:
        return EndpointError(self.endpoint.url, f"expected {expected} in the answer", status=200)

    def _refuse_unfinished(self, choice: dict) -> None:
        reason = choice.get("finish_reason")
        if reason in _SERVER_FAILED:
            raise EndpointError(self.endpoint.url, f"the server ended the answer with '{reason}'", status=200)


class ChatPolicy(_Wire):
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
        coder: TokenCoder | None = None,
        owns_client: bool = False,
    ):
        super().__init__(endpoint, model, client, coder=coder, owns_client=owns_client)
        self.details = details

    async def act(self, state: PolicyState) -> PolicyAction:
        """Raises EndpointError where there is no answer, or none that can be read."""
        needed = {
            "model": self.model,
            "messages": chat_messages(state),
            "temperature": state.temperature,
        }
        optional: dict[str, Any] = {"max_tokens": state.max_new_tokens, "seed": _seed_32(state.seed)}
        if self.details or state.top_log_probs:
            optional["logprobs"] = True
        if self.details:
            optional["return_token_ids"] = True
        if state.top_log_probs:
            optional["top_logprobs"] = state.top_log_probs

        def ask(payload, draw):
            return self.client.post(
                self.endpoint,
                "/chat/completions",
                payload,
                draw=draw,
                tokens=state.max_new_tokens,
                read=self._read,
            )

        choice, text = await self._ask(state, needed, optional, ask)
        tokens = _dict(choice.get("logprobs")).get("content")
        tokens = tokens if isinstance(tokens, list) else []
        ids, log_probs, top = _token_details(
            tokens,
            token_id=lambda token: token.get("id", _id_of_name(token.get("token"))),
            log_prob=lambda token: token["logprob"],
            top=lambda token: [(other["token"], other["logprob"]) for other in token.get("top_logprobs") or ()],
        )
        return self._action(
            text,
            _ids(choice.get("token_ids")) or ids,
            log_probs,
            top,
            stopped=choice.get("finish_reason") not in _CUT_OFF,
        )

    def _read(self, answer: Any) -> tuple[dict, str]:
        """(the choice, its text)"""
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content")
            if text is None:
                given = _given_instead(choice["message"])
                if given and choice.get("finish_reason") not in _CUT_OFF:
                    raise self._unreadable(f"text in choices[0].message.content, not {given}")
                text = ""
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._unreadable("choices[0].message.content") from None
        self._refuse_unfinished(choice)
        return choice, text


class CompletionsPolicy(_Wire):
    """OpenAI's /completions. The state goes out as its token ids where they are known, else as Gemma's turns
    in text.

    Draws that share seed, temperature and length share a request, as all greedy ones do.
    """

    @cached_property
    def _batcher(self) -> Batcher:
        return Batcher(
            self.client, self.endpoint, "/completions", join=self._join, split=_choices, read=self._read
        )

    async def act(self, state: PolicyState) -> PolicyAction:
        """Raises EndpointError where there is no answer, or none that can be read."""
        prompt = list(state.ids) if state.ids else gemma_turns(state)
        needed = {
            "max_tokens": state.max_new_tokens,
            "temperature": state.temperature,
            "stop": ["<end_of_turn>"],
        }
        optional: dict[str, Any] = {"logprobs": max(1, state.top_log_probs), "return_token_ids": True}
        if state.temperature > 0:
            optional["seed"] = _seed_32(state.seed)

        async def ask(payload, draw):
            group = msgspec.json.encode(payload)
            if not draw:
                return await self._batcher.ask(prompt, group)
            body = self._join([prompt], group)
            return await self.client.post(
                self.endpoint,
                "/completions",
                body,
                draw=draw,
                tokens=state.max_new_tokens,
                read=self._read_only_choice,
            )

        choice = await self._ask(state, needed, optional, ask)
        given = _dict(choice.get("logprobs"))
        names, values, tops = (given.get(name) or [] for name in ("tokens", "token_logprobs", "top_logprobs"))
        tokens = zip(names, values, tops if len(tops) == len(names) else [None] * len(names), strict=False)
        ids, log_probs, top = _token_details(
            list(tokens),
            token_id=lambda token: _id_of_name(token[0]),
            log_prob=lambda token: token[1],
            top=lambda token: list(_dict(token[2]).items()),
        )
        return self._action(
            choice["text"],
            _ids(choice.get("token_ids")) or ids,
            log_probs,
            top,
            stopped=choice.get("finish_reason") not in _CUT_OFF,
        )

    def _read(self, choice: Any) -> dict:
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise self._unreadable("choices[…].text")
        self._refuse_unfinished(choice)
        return choice

    def _read_only_choice(self, answer: Any) -> dict:
        try:
            (choice,) = _choices(answer)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._unreadable("choices[0]") from None
        return self._read(choice)

    def _join(self, prompts: list, group: bytes) -> dict:
        prompt = prompts[0] if len(prompts) == 1 else prompts
        return {"model": self.model, "prompt": prompt, **msgspec.json.decode(group)}


class GeminiPolicy(_Wire):
    """Gemini's generateContent. `endpoint.url` ends before /models, as in https://…/v1beta."""

    async def act(self, state: PolicyState) -> PolicyAction:
        """Raises EndpointError where there is no answer, or none that can be read; gives
        an empty, unstopped action where the server blocked it."""
        roles = {"user": "user", "assistant": "model"}
        contents = [{"role": roles[m["role"]], "parts": [{"text": m["content"]}]} for m in chat_messages(state)]
        needed = {"maxOutputTokens": state.max_new_tokens, "temperature": state.temperature}
        optional: dict[str, Any] = {"seed": _seed_32(state.seed)}
        if state.top_log_probs:
            optional |= {"responseLogprobs": True, "logprobs": state.top_log_probs}

        def ask(generation, draw):
            payload = {"contents": contents, "generationConfig": generation}
            path = f"/models/{self.model}:generateContent"
            return self.client.post(
                self.endpoint, path, payload, draw=draw, tokens=state.max_new_tokens, read=self._read
            )

        choice, text = await self._ask(state, needed, optional, ask)
        given = _dict(choice.get("logprobsResult"))
        chosen, others = given.get("chosenCandidates") or [], given.get("topCandidates") or []
        tokens = list(zip(chosen, others, strict=True)) if len(chosen) == len(others) else [(c, {}) for c in chosen]
        ids, log_probs, top = _token_details(
            tokens,
            token_id=lambda token: token[0].get("tokenId"),
            log_prob=lambda token: token[0]["logProbability"],
            top=lambda token: [(o["token"], o["logProbability"]) for o in token[1].get("candidates") or ()],
        )
        return self._action(text, ids, log_probs, top, stopped=choice.get("finishReason", "STOP") == "STOP")

    def _read(self, answer: Any) -> tuple[dict, str]:
        """(the candidate, its text)"""
        candidates = _dict(answer).get("candidates")
        if not candidates:
            if _dict(answer).get("promptFeedback"):
                return {"finishReason": "SAFETY"}, ""
            raise self._unreadable("candidates[0].content")
        try:
            choice = candidates[0]
            parts = _dict(choice.get("content")).get("parts") or []
            return choice, "".join(part.get("text", "") for part in parts if not part.get("thought"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._unreadable("candidates[0].content.parts[…].text") from None


def chat_messages(state: PolicyState) -> list[dict[str, str]]:
    """The state as user and assistant turns in turn: prompt, action, observation, action, …"""
    messages = [{"role": "user", "content": state.prompt}]
    for step in state.steps:
        messages.append({"role": "assistant", "content": step.action})
        messages.append({"role": "user", "content": step.observation or ""})
    return messages


def gemma_turns(state: PolicyState) -> str:
    """The state as Gemma 2 was trained to read it, without <bos>, which servers add, up to where the model
    speaks.
    """
    names = {"user": "user", "assistant": "model"}
    turns = (f"<start_of_turn>{names[m['role']]}\n{m['content']}<end_of_turn>\n" for m in chat_messages(state))
    return "".join(turns) + "<start_of_turn>model\n"


def _seed_32(seed: int) -> int:
    return seed % 2**31  # Gemini's is an int32, and numpy's behind other servers takes no more than 32 bits


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _given_instead(message: dict) -> str:
    """What a message without content holds, such as tool calls of the server's own making, or thoughts alone."""
    return ", ".join(sorted(name for name, value in message.items() if value and name != "role"))


def _choices(answer: Any) -> list[Any]:
    return sorted(answer["choices"], key=lambda choice: choice["index"])


def _ids(value: Any) -> tuple[int, ...] | None:
    good = isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value)
    return tuple(value) if good else None


def _id_of_name(name: Any) -> int | None:
    """vLLM and SGLang can give tokens as `token_id:123`."""
    head, _, digits = name.partition("token_id:") if isinstance(name, str) else ("", "", "")
    return int(digits) if not head and digits.isdecimal() and digits.isascii() else None


def _in_our_form(ids, log_probs, text: str, coder: TokenCoder, *, stopped: bool):
    """(ids, log_probs) with the turn's end, as the tokenizer writes an action; None where they are not this text's.

    Servers leave the end out, or another text than the ids' own: then the text is what came back, and is what counts.
    """
    ends = (coder.end_of_turn_id, coder.eos_id)
    ended = ids[-1] in ends
    try:
        same = coder.decode(ids[:-1] if ended else ids) == text
    except ValueError:  # ids of another vocabulary
        same = False
    if not same:
        return None, None
    return (ids, log_probs) if ended or not stopped else ((*ids, coder.end_of_turn_id), None)


def _token_details(tokens: list, *, token_id, log_prob, top):
    """(ids, log_probs, top_log_probs) of an answer's tokens, each None unless every token has it."""
    if not tokens:
        return None, None, None
    try:
        ids = _ids([token_id(token) for token in tokens])
        log_probs = tuple(float(log_prob(token)) for token in tokens) or None
        tops = tuple(tuple((str(name), float(value)) for name, value in top(token)) for token in tokens)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None, None, None
    return ids, log_probs, tops if any(tops) else None


@dataclass(frozen=True)
class EndpointLimits:
    """How hard each server may be asked. Defaults are ours."""

    concurrency: int = 64
    """Requests in flight at each server; as many as it runs at a time, for vLLM some hundreds."""
    timeout_s: float = 300.0
    """Seconds to wait for an answer; a request without one by then has failed, and is not asked again in this run."""
    requests_per_minute: float | None = None
    """At most so many requests to each server; default: no limit but its own (429 is waited out)."""
    tokens_per_minute: float | None = None
    """At most so many tokens, of questions and answers together, to and from each server."""


_PROTOCOLS = {"chat": ChatPolicy, "completions": CompletionsPolicy, "gemini": GeminiPolicy}
_KEY_VARIABLES = {
    "api.openai.com": ("OPENAI_API_KEY",),
    "generativelanguage.googleapis.com": ("GEMINI_API_KEY",),
}


def parse_spec(spec: str) -> tuple[str, str, str]:
    """(protocol, url, model) of `[chat+|completions+|gemini+]http[s]://host/v1#model`. Raises ConfigError.

    Without a protocol it is gemini for Google's host and chat for any other.
    """
    address, _, model = spec.partition("#")
    protocol, plus, url = address.partition("+") if address.partition("+")[0] in _PROTOCOLS else ("", "", address)
    endpoint = Endpoint(url.rstrip("/"))  # refuses what is no address
    if not model:
        raise ConfigError(f"'{endpoint.url}' names no model: expected {endpoint.url}#MODEL")
    if not protocol:
        protocol = "gemini" if _host(url) == "generativelanguage.googleapis.com" else "chat"
    return protocol, endpoint.url, model


def endpoint_for(
    url: str, *, protocol: str = "chat", key_env: str | None = None, limits: EndpointLimits | None = None
) -> Endpoint:
    """An endpoint with the key variable that belongs to it.

    `key_env` where it is given; else OPENAI_API_KEY or GEMINI_API_KEY, where set, for those companies' own hosts, and
    for no other: a key must not reach a server it was not made for; else SWIRL_API_KEY, where set.
    """
    limits = limits or EndpointLimits()
    if key_env is None:
        names = (*_KEY_VARIABLES.get(_host(url), ()), "SWIRL_API_KEY")
        key_env = next((name for name in names if os.environ.get(name)), None)
    return Endpoint(
        url,
        key_env=key_env,
        key_header="x-goog-api-key" if protocol == "gemini" else "Authorization",
        concurrency=limits.concurrency,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        read_s=limits.timeout_s,
        total_s=2 * limits.timeout_s,
    )


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0].partition(":")[0].lower()


def open_policy(
    spec: str,
    *,
    client: Client | None = None,
    cache: str | os.PathLike | None = None,
    key_env: str | None = None,
    limits: EndpointLimits | None = None,
    details: bool = True,
    coder: TokenCoder | None = None,
):
    """The policy that `spec` names (see parse_spec). Raises ConfigError. Ids that a server gives are kept as they
    are; with a `coder`, the model's own tokenizer, only where they are the text's.

    Without a `client` it has its own, with the file `cache`, and `close` must be awaited. Answers are kept by
    address and model name: give each checkpoint its own cache file if several are served under one name.
    """
    protocol, url, model = parse_spec(spec)
    endpoint = endpoint_for(url, protocol=protocol, key_env=key_env, limits=limits)
    owns_client, client = client is None, client or Client(cache)
    if protocol == "chat":
        return ChatPolicy(endpoint, model, client, details=details, coder=coder, owns_client=owns_client)
    return _PROTOCOLS[protocol](endpoint, model, client, coder=coder, owns_client=owns_client)
