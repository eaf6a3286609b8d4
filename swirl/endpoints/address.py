"""From the address of a server to an endpoint, with its limits and key, and the policy that asks it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from swirl.endpoints.chat import ChatPolicy
from swirl.endpoints.client import Client
from swirl.endpoints.completions import CompletionsPolicy
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.gemini import GeminiPolicy
from swirl.endpoints.sender import GENERAL_KEY
from swirl.errors import ConfigError
from swirl.rollout.policy import TurnTokenizer


@dataclass(frozen=True)
class EndpointLimits:
    """How hard each server may be asked. Defaults are ours."""

    concurrency: int = 64
    """Requests in flight at each server; as many as it runs at a time, for vLLM some hundreds."""
    timeout_s: float = 300.0
    """Seconds to wait for an answer; a request without one by then has failed, and is not asked again in this run."""
    outage_s: float = 7200.0
    """Seconds that a server which has answered before may be gone: the job waits, says so, and goes on."""
    requests_per_minute: float | None = None
    """At most so many requests to each server; default: no limit but its own (429 is waited out)."""
    tokens_per_minute: float | None = None
    """At most so many tokens, of questions and answers together, to and from each server."""


_PROTOCOLS = {"chat": ChatPolicy, "completions": CompletionsPolicy, "gemini": GeminiPolicy}
_GOOGLE = "generativelanguage.googleapis.com"
_KEY_OF_HOST = {"api.openai.com": "OPENAI_API_KEY", _GOOGLE: "GEMINI_API_KEY"}


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
        protocol = "gemini" if endpoint.host == _GOOGLE else "chat"
    return protocol, endpoint.url, model


def endpoint_for(
    url: str,
    *,
    protocol: str = "chat",
    role: str | None = None,
    key_env: str | None = None,
    limits: EndpointLimits | None = None,
) -> Endpoint:
    """An endpoint with the variable that holds its key. Raises ConfigError.

    `key_env` where it is given; else SWIRL_<ROLE>_API_KEY, where set (empty: no key); else OPENAI_API_KEY or
    GEMINI_API_KEY, where set, for those companies' own hosts alone; else SWIRL_API_KEY, where set, which goes to one
    host of a client and no other. `role` is what the server does: policy, judge, outcome_judge, reward, retriever.
    """
    limits = limits or EndpointLimits()
    endpoint = Endpoint(
        url,
        key_header="x-goog-api-key" if protocol == "gemini" else "Authorization",
        concurrency=limits.concurrency,
        requests_per_minute=limits.requests_per_minute,
        tokens_per_minute=limits.tokens_per_minute,
        read_s=limits.timeout_s,
        total_s=2 * limits.timeout_s,
        retry_deadline_s=limits.outage_s,
    )
    key_env = key_env or _key_variable(endpoint.host, role)
    return replace(endpoint, key_env=key_env)


def _key_variable(host: str, role: str | None) -> str | None:
    of_role = f"SWIRL_{role.upper()}_API_KEY" if role else None
    if of_role and of_role in os.environ:
        return of_role if os.environ[of_role].strip() else None
    candidates = (_KEY_OF_HOST.get(host), GENERAL_KEY)
    return next((name for name in candidates if name and os.environ.get(name)), None)


def open_wire_policy(
    spec: str,
    *,
    client: Client,
    role: str = "policy",
    key_env: str | None = None,
    limits: EndpointLimits | None = None,
    details: bool = True,
    tokenizer: TurnTokenizer | None = None,
):
    """The policy over the wire that `spec` names (see parse_spec), asked by `client`. Raises ConfigError.

    `details` asks for ids and log-probs as well. Ids that a server gives are kept as they are; with a `tokenizer`, the
    model's own tokenizer, only where they are the text's. Answers are kept by address and model name: give each
    checkpoint its own cache file if several are served under one name.
    """
    protocol, url, model = parse_spec(spec)
    endpoint = endpoint_for(url, protocol=protocol, role=role, key_env=key_env, limits=limits)
    if protocol == "chat":
        return ChatPolicy(endpoint, model, client, details=details, tokenizer=tokenizer)
    return _PROTOCOLS[protocol](endpoint, model, client, tokenizer=tokenizer)
