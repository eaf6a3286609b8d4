"""python -m benchmarks: what can be measured, one line each."""

from __future__ import annotations

import ast
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Module name -> first line of its docstring, of all files here that can be run."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_text()
        if path.stem != "__main__" and "__main__" in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return found


if __name__ == "__main__":
    for name, line in benchmarks().items():
        print(f"python -m benchmarks.{name:16} {line}")
