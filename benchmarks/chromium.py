"""Headless Chromium, driven over its DevTools protocol: what a page shows, and what it says on its console."""

from __future__ import annotations

import asyncio
import base64
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """The path of a Chromium on this machine, None where there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """One page. `complaints` are its console's errors and warnings, exceptions and refused requests, as they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self._socket, self._sent, self._waiting = socket, 0, {}
        self.complaints: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            said = message.json()
            if (future := self._waiting.pop(said.get("id"), None)) is not None:
                future.set_result(said)
            method, params = said.get("method"), said.get("params", {})
            if method == "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(params["entry"]))

    async def send(self, method: str, **params) -> dict:
        """The result of a call. Raises RuntimeError where Chromium refuses it."""
        self._sent += 1
        self._waiting[self._sent] = future = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._sent, "method": method, "params": params})
        said = await asyncio.wait_for(future, 60)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']}")
        return said["result"]

    async def run(self, expression: str):
        """The value of a JavaScript expression, awaited where it is a promise. Raises RuntimeError as it throws."""
        said = await self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in said:
            raise RuntimeError(str(said["exceptionDetails"]))
        return said["result"].get("value")

    async def wait_for(self, condition: str, timeout_s: float = 30.0) -> None:
        """Until the expression is true. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not await self.run(f"Boolean({condition})"):
                await asyncio.sleep(0.02)

    async def open(self, url: str) -> None:
        """Start loading; what must be there is waited for by `wait_for`."""
        await self.send("Page.navigate", url=url)

    async def key(self, key: str) -> None:
        """Press and release; a single character is typed."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        await self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        await self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def look(self, *, width: int, height: int, dark: bool = False) -> None:
        """The size of the window in CSS pixels, and what the system prefers."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        """What is in sight, as PNG."""
        made = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(made["data"]))


@asynccontextmanager
async def open_tab(program: str | None = None) -> AsyncIterator[Tab]:
    """A new Chromium with an empty page, which ends with the block. Raises FileNotFoundError where there is none."""
    program = program or chromium()
    if program is None:
        raise FileNotFoundError("no chromium on this machine")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
                 "--hide-scrollbars", "--disable-dev-shm-usage", "--disable-background-networking",
                 f"--user-data-dir={profile}")  # fmt: skip
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(program, *flags, "about:blank", stdout=quiet, stderr=quiet)
        try:
            port = await _port_of(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    pages = [one for one in await response.json() if one["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await tab.send(f"{domain}.enable")
                    await tab.send("Emulation.setFocusEmulationEnabled", enabled=True)
                    yield tab
        finally:
            if process.returncode is None:
                process.kill()  # its profile is thrown away
            await process.wait()


async def _port_of(file: Path, process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(60):
        while not (file.exists() and file.read_text().strip()):
            if process.returncode is not None:
                raise RuntimeError(f"chromium ended with exit code {process.returncode}")
            await asyncio.sleep(0.05)
    return int(file.read_text().split()[0])
