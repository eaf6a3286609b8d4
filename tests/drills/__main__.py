"""Attacks at length: every module here with `drill(seed) -> list[Row]`, or those named; one table of what came out.

    python -m tests.drills [NAME ...] [--seed 0]

Exits 1 where anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

from tests.drills.table import Row


def drills() -> dict:
    """Module name to module, of those with a `drill`."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("_", "test_")))
    modules = {name: importlib.import_module(f"tests.drills.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "drill")}


def line(row: Row) -> str:
    return f"{row.name:<52} {row.attempts:>9,} {row.failures:>9,}  {row.note}".rstrip()


def main() -> int:
    found = drills()
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(found)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.names) - found.keys():
        parser.error(f"no drill '{sorted(unknown)[0]}': expected one of {', '.join(found)}")
    print(f"{'drill':<52} {'attempts':>9} {'failures':>9}")
    failures = 0
    for name in options.names or found:
        started = time.monotonic()
        for row in found[name].drill(options.seed):
            print(line(row), flush=True)
            failures += row.failures
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
