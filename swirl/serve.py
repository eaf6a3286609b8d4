"""Serve a checkpoint to others: OpenAI's completions, chat completions and models, by swirl's own sampler.

  python -m swirl.serve --model FOLDER                  http://127.0.0.1:8000/v1, for this machine alone
  SWIRL_SERVE_KEY=… python -m swirl.serve --model FOLDER --host 0.0.0.0

Requests of all clients are sampled together, over one cache of keys. A request names at most 16 stop texts, and gets
log-probs of the tokens drawn, not of alternatives; what is not supported is refused by name. Ctrl-C takes no new ones
and finishes those in flight; a second one ends at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import sys
from dataclasses import dataclass
from typing import Literal

from swirl.app import command
from swirl.config import MAX_CACHE_TOKENS
from swirl.errors import ConfigError


@dataclass(frozen=True)
class ServeConfig:
    model: str = "almanac"
    """`almanac` (ships with swirl), a Hugging Face folder of a Gemma, or its name on the hub."""
    name: str = ""
    """What clients call the model; default: the last part of --model. Any other name is refused."""
    host: str = "127.0.0.1"
    """Another than a loopback address needs a key."""
    port: int = 8000
    """0: any that is free; the line on stderr tells."""
    key_env: str = "SWIRL_SERVE_KEY"
    """Environment variable that holds the key; where it is set, every request must bear it."""
    device: str = "auto"
    """Where it computes: auto, cpu or cuda."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on CPUs."""
    max_cache_tokens: int = MAX_CACHE_TOKENS
    """Tokens whose keys and values are held at most, states and new ones of all requests together."""
    max_concurrency: int = 256
    """Sequences in flight at most; a request beyond is answered 429, to be asked again."""
    max_body_mb: float = 16.0
    """Size of a request at most."""

    def __post_init__(self):
        command.require_at_least(1, self, "max_cache_tokens", "max_concurrency")
        command.require_at_least(0, self, "max_body_mb")
        command.require_port(self)
        if not os.environ.get(self.key_env) and not _is_loopback(self.host):
            raise ConfigError(f"--host {self.host}: others can reach it, which needs a key in {self.key_env}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _serve(config: ServeConfig) -> None:
    from aiohttp import web

    from swirl.app import resolve
    from swirl.app.server import Server
    from swirl.sampling.engine import Engine

    dtype = resolve.dtype_for(config.dtype, config.device)
    model, tokenizer = resolve.load_model(config.model, device=config.device, dtype=dtype)
    engine = Engine(model, max_cache_tokens=config.max_cache_tokens, decode=tokenizer.decode)
    name = config.name or os.path.basename(os.path.abspath(config.model))
    server = Server(
        engine,
        tokenizer,
        name=name,
        key=os.environ.get(config.key_env) or None,
        max_concurrency=config.max_concurrency,
        max_body_bytes=int(config.max_body_mb * 2**20),
    )
    ending, loop = asyncio.Event(), asyncio.get_running_loop()

    def end():
        if ending.is_set():
            os._exit(130)
        ending.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    runner = server.runner()
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port)
        await site.start()
        host, port = runner.addresses[0][:2]
        address = f"[{host}]" if ":" in host else host
        print(f"{name}: http://{address}:{port}/v1", file=sys.stderr, flush=True)
        await ending.wait()
        print(f"finishing {server.num_in_flight} requests", file=sys.stderr, flush=True)
        await server.drain()
    finally:
        await runner.cleanup()


def main(config: ServeConfig) -> None:
    asyncio.run(_serve(config))


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, ServeConfig, __doc__)


if __name__ == "__main__":
    run_command()
