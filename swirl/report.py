"""Runs' folders -> one page: what training mended and broke, learning curves, every trajectory step by step.

  python -m swirl.report run                   run/report.html: one file, which loads nothing from elsewhere
  python -m swirl.report run-a run-b --out ab.html      side by side; runs that differ in their seed alone as a mean too
  python -m swirl.report run --serve           the same page on this machine's loopback, while the run goes on

A run may be finished, at work, or dead: what its folder lacks is said.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from swirl.app import command
from swirl.app.report.build import MAX_ENTRIES, write_report
from swirl.errors import ConfigError


@dataclass(frozen=True)
class ReportConfig:
    run: Positional[tuple[Path, ...]] = (Path("run"),)
    """Folders of runs."""
    out: Path | None = None
    """The page to write; default: report.html in the first run's folder."""
    trajectories: int = MAX_ENTRIES
    """Questions and trajectories of a run to browse at most; those of the evaluation come first."""
    serve: bool = False
    """Show the page live on loopback, instead of writing it."""
    port: int = 8001
    """Of --serve; 0: any that is free, the line on stderr tells."""

    def __post_init__(self):
        command.require_at_least(0, self, "trajectories")
        command.require_port(self)
        command.require_no_folder(self, "out")
        if not self.run:
            raise ConfigError("expected the folder of a run")


def main(config: ReportConfig) -> None:
    if config.serve:
        from swirl.app.report.live import serve_report

        asyncio.run(serve_report(config.run, config.port, config.trajectories))
    else:
        print(write_report(config.run, config.out, max_entries=config.trajectories))


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, ReportConfig, __doc__)


if __name__ == "__main__":
    run_command()
