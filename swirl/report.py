"""A run's folder -> report.html: the accuracy table and the learning curves on one page, without scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from swirl.app import command
from swirl.app.report_page import write_report


@dataclass(frozen=True)
class ReportConfig:
    run: Positional[Path] = Path("run")
    """The run's folder, holding summary.json and metrics.jsonl; report.html is written into it."""


def main(config: ReportConfig) -> None:
    print(write_report(config.run))


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, ReportConfig, __doc__)


if __name__ == "__main__":
    run_command()
