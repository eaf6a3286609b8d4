"""Prints requirements of pyproject.toml, one a line: what `make test-lowest`, `make audit` and `make docs` install."""

from __future__ import annotations

import argparse
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--extra", help="those of an extra, in place of the run-time ones")
    flags.add_argument("--without", nargs="*", default=[], help="names to leave out")
    flags.add_argument("--installed", action="store_true", help="each as it is installed here: NAME==VERSION")
    asked = flags.parse_args()
    named = PROJECT["optional-dependencies"][asked.extra] if asked.extra else PROJECT["dependencies"]
    for requirement in named:
        name = re.match(r"[\w-]+", requirement)[0]
        if name not in asked.without:
            print(f"{name}=={version(name).partition('+')[0]}" if asked.installed else requirement)


if __name__ == "__main__":
    main()
