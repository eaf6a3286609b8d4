"""Where to ask, and how hard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from swirl.endpoints.limiter import FAILURES_TO_PAUSE
from swirl.errors import ConfigError

_ABOVE_ZERO = ("concurrency", "connect_s", "read_s", "total_s", "backoff_s", "retry_deadline_s", "batch_size")


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, and how hard.

    `url` is the base that paths are appended to, such as http://127.0.0.1:8000/v1. `key_env` names the environment
    variable that holds the key, `key_header` the header it is sent in. `connect_s` bounds connecting, `read_s` the
    silence between two bytes, `total_s` one attempt from the connect to the last byte, `retry_deadline_s` outages and
    429s. Defaults are ours. Raises ConfigError on values that cannot be meant.
    """

    url: str
    key_env: str | None = None
    key_header: Literal["Authorization", "x-goog-api-key"] = "Authorization"
    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    connect_s: float = 10.0
    read_s: float = 300.0
    total_s: float = 600.0
    retries: int = 6
    backoff_s: float = 0.5
    retry_deadline_s: float = 900.0
    batch_size: int = 32
    batch_ms: float = 3.0

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"endpoint '{_without_secrets(self.url)}': expected http://host[:port]/path or https://…")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigError(
                f"endpoint '{_without_secrets(self.url)}': expected no user, password, query or fragment; "
                "a key comes from the environment"
            )
        for name in _ABOVE_ZERO:
            if not getattr(self, name) > 0:
                raise ConfigError(f"endpoint {self.url}: {name} must be above 0, got {getattr(self, name)}")
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"endpoint {self.url}: {name} must be above 0, got {getattr(self, name)}")
        if self.retries < FAILURES_TO_PAUSE or self.batch_ms < 0:
            raise ConfigError(f"endpoint {self.url}: retries must be at least {FAILURES_TO_PAUSE}, batch_ms at least 0")

    @property
    def host(self) -> str:
        """In lower case, without the port."""
        return urlsplit(self.url).hostname or ""


def _without_secrets(url: str) -> str:
    return url.partition("?")[0].partition("#")[0].rpartition("@")[2]
