"""From the address of a server to an endpoint, with its limits and key, and the policy that asks it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from swirl.endpoints.chat import ChatPolicy
from swirl.endpoints.client import Client, Endpoint
from swirl.endpoints.completions import CompletionsPolicy
from swirl.endpoints.gemini import GeminiPolicy
from swirl.errors import ConfigError
from swirl.rollout.policy import TurnTokenizer


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
    tokenizer: TurnTokenizer | None = None,
):
    """The policy that `spec` names (see parse_spec). Raises ConfigError. Ids that a server gives are kept as they
    are; with a `tokenizer`, the model's own tokenizer, only where they are the text's.

    Without a `client` it has its own, with the file `cache`, and `close` must be awaited. Answers are kept by
    address and model name: give each checkpoint its own cache file if several are served under one name.
    """
    protocol, url, model = parse_spec(spec)
    endpoint = endpoint_for(url, protocol=protocol, key_env=key_env, limits=limits)
    owns_client, client = client is None, client or Client(cache)
    if protocol == "chat":
        return ChatPolicy(endpoint, model, client, details=details, tokenizer=tokenizer, owns_client=owns_client)
    return _PROTOCOLS[protocol](endpoint, model, client, tokenizer=tokenizer, owns_client=owns_client)
