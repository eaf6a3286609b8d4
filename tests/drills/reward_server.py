"""A reward model on loopback, a process of its own that can be killed and come back, and the requests that it got."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

from benchmarks.fault_server import FaultServer
from tests.drills.kill_drill import request_name


class RewardServer:
    """Serves while the body runs; a score is a function of its request alone. `url` names the model, too."""

    def __init__(self, folder: Path):
        self._log = folder / "asked.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1#reward"

    def __enter__(self) -> RewardServer:
        self._log.write_text("")
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def asked(self) -> list[str]:
        """The names of all requests so far, in order."""
        return self._log.read_text().split()

    def start(self) -> None:
        self._process = os.fork()
        if not self._process:
            try:
                os.setpgid(0, 0)
                os.closerange(3, 4096)  # among them the lock of a run that is at work
                asyncio.run(self._serve())
            finally:
                os._exit(1)

    def stop(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)

    async def _serve(self) -> None:
        with self._log.open("a", buffering=1) as log:

            def answer(path: str, payload: dict) -> dict:
                name = request_name(payload)
                log.write(f"{name}\n")
                message = {"role": "assistant", "content": f"SCORE: {int(name, 16) % 10}"}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                return {"id": name, "object": "chat.completion", "choices": [choice]}

            await FaultServer(answer).start(self._port)
            await asyncio.Event().wait()
