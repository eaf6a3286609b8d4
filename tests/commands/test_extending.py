"""docs/extending.md as printed: every block of Python is a file, every command runs beside it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from swirl.trajectories.log import read_trajectories
from tests.process import run_module

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.M)[1:]
FILES = {text.splitlines()[0][2:]: text for text in re.findall(r"^```python\n(.+?)^```", PAGE, flags=re.M | re.S)}


def run(words, folder):
    done = run_module(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_every_file_is_short_enough_to_be_read():
    assert set(FILES) == {"cities.py", "glossary.py", "brevity.py", "strict.py"}
    assert all(len(text.splitlines()) - 1 <= 40 for text in FILES.values())


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_the_page_runs_as_printed(section, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    commands = [
        line for block in re.findall(r"^```sh\n(.+?)^```", section, flags=re.M | re.S) for line in block.splitlines()
    ]
    for line in commands:
        run(shlex.split(line), tmp_path)
    for file in tmp_path.glob("*kept.jsonl"):
        assert all(step.call or step.invalid for t in read_trajectories(file) for step in t.steps)
