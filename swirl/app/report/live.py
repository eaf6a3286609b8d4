"""The report shown live on loopback: the same page, which asks for what has changed in the runs' folders."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from aiohttp import web

from swirl.app.report.browser import Browsed, browse
from swirl.app.report.build import entry_parts, overview_part, packed, page, read_runs, title_of
from swirl.app.report.runs import FILES
from swirl.app.run_records import DROPPED, EVALUATED, GENERATED, KEPT, LOG_PROBS, SAMPLES
from swirl.errors import ConfigError, SwirlError

ENTRIES_EVERY_S = 20.0  # trajectories are read again at most so often: a run at work needs the processor too
_OF_ENTRIES = {GENERATED, KEPT, DROPPED, SAMPLES, LOG_PROBS, *EVALUATED.values()}


class LiveReport:
    """What the page is told of the runs now. Its methods take time, and one of them runs at a time."""

    def __init__(self, paths: Sequence[Path], max_entries: int):
        self._paths, self._max_entries = paths, max_entries
        self._browsed: list[Browsed] = []
        self._evaluated: list = []
        self._stamps: tuple[object, object] = (None, None)
        self._read_at = 0.0
        self.title = ""
        self.parts: dict[str, bytes] = {}
        self.version = {"overview": 0, "entries": 0}

    def refresh(self) -> None:
        """Read again what has changed. Raises InputError where a file is not as swirl writes it."""
        stamps = self._stamp(set(FILES) - _OF_ENTRIES), self._stamp(_OF_ENTRIES)
        runs = read_runs(self._paths)
        self.title = title_of(runs)
        new_entries = stamps[1] != self._stamps[1] and time.monotonic() - self._read_at >= ENTRIES_EVERY_S
        if new_entries or not self._browsed:
            self._browsed = [browse(run, self._max_entries) for run in runs]
            self._evaluated = [(run.evaluated, run.counts) for run in runs]
            self._read_at = time.monotonic()
            self.parts = {name: packed(part) for name, part in entry_parts(self._browsed).items()}
            self.version["entries"] += 1
        else:
            stamps = stamps[0], self._stamps[1]
            for run, (evaluated, counts) in zip(runs, self._evaluated, strict=True):
                run.evaluated, run.counts = evaluated, counts
        self._stamps = stamps
        overview = packed(overview_part(runs, self._browsed))
        if overview != self.parts.get("overview"):
            self.parts["overview"] = overview
            self.version["overview"] += 1

    def _stamp(self, names: set[str]) -> tuple:
        """Changes whenever one of the files does."""
        files = [path / name for path in self._paths for name in sorted(names)]
        found = [file.stat() if file.exists() else None for file in files]
        return tuple(stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)


def app_of(report: LiveReport) -> web.Application:
    """What aiohttp runs: the page, `data/version`, and each part of the data."""
    reading = asyncio.Lock()

    async def show(request: web.Request) -> web.Response:
        return web.Response(body=page(report.title, {}, live=True), content_type="text/html", charset="utf-8")

    async def version(request: web.Request) -> web.Response:
        async with reading:
            try:
                await asyncio.to_thread(report.refresh)
            except (SwirlError, OSError) as error:  # a file that is being replaced is whole at the next look
                return web.Response(status=500, text=str(error))
        return web.json_response({**report.version, "at": time.strftime("%H:%M:%S")})

    async def part(request: web.Request) -> web.Response:
        content = report.parts.get(request.match_info["name"])
        if content is None:
            return web.Response(status=404, text="no such part of the report")
        return web.Response(
            body=content,
            content_type="application/json",
            headers={"Content-Encoding": "gzip", "Cache-Control": "no-store"},
        )

    app = web.Application(middlewares=[_from_here_alone])
    app.router.add_get("/", show)
    app.router.add_get("/data/version", version)
    app.router.add_get("/data/{name}", part)
    return app


@web.middleware
async def _from_here_alone(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """A page of elsewhere that has its name resolve to this machine is refused."""
    if request.host.rpartition(":")[0] not in ("127.0.0.1", "localhost"):
        return web.Response(status=403, text="this report is for this machine alone")
    return await handler(request)


async def serve_report(paths: Sequence[Path], port: int, max_entries: int) -> None:
    """Until it is interrupted. Raises InputError where a folder is no run's, ConfigError where the port is taken."""
    report = LiveReport(paths, max_entries)
    report.refresh()
    runner = web.AppRunner(app_of(report), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}") from None
        print(f"http://127.0.0.1:{runner.addresses[0][1]}/  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
