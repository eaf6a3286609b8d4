"""Every command of the README runs as printed: the blocks marked ```sh, line by line, in one folder.

A tiny checkpoint is put there for the model that a user would have. The quick tests read the flags of all, and run two.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swirl.app import command
from swirl.evaluate import EvaluateConfig
from swirl.export import ExportConfig
from swirl.filter import FilterConfig
from swirl.generate import GenerateConfig
from swirl.plan import PlanConfig
from swirl.report import ReportConfig
from swirl.train import TrainConfig
from tests.process import run_module

KINDS = {
    "train": TrainConfig,
    "generate": GenerateConfig,
    "filter": FilterConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "plan": PlanConfig,
}
ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands in order; lines that end in a backslash go on."""
    text = "".join(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [
        " ".join(shlex.split(line, comments=True)) for line in text.splitlines() if shlex.split(line, comments=True)
    ]


def name_and_flags(line: str) -> tuple[str, list[str]]:
    """The command of swirl that a line starts, by whatever program, and its flags."""
    words = shlex.split(line)
    at = next(at for at, word in enumerate(words) if word == "swirl" or word.startswith("swirl."))
    if words[at] == "swirl":
        return words[at + 1], words[at + 2 :]
    return words[at].removeprefix("swirl."), words[at + 1 :]


def run(line: str, folder: Path, *, from_nothing: bool) -> None:
    """One line in that folder: as a user starts it, or in a process that has the imports behind it."""
    if from_nothing:
        program, *words = shlex.split(line)
        programs = {"python": [sys.executable], "swirl": [sys.executable, "-m", "swirl"]}
        programs["torchrun"] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*programs[program], *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
    else:
        name, flags = name_and_flags(line)
        done = run_module("swirl", name, *flags, cwd=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"


def test_every_flag_of_the_readme_is_one():
    assert len(commands()) >= 5
    for line in commands():
        name, flags = name_and_flags(line)
        command.parse(KINDS[name], "", flags)


def test_generate_and_filter_of_the_readme(tmp_path):
    lines = {name_and_flags(line)[0]: line for line in commands()}
    run(lines["generate"], tmp_path, from_nothing=False)
    run(lines["filter"], tmp_path, from_nothing=True)


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path, tiny_folder):
    """One after another: later ones read what earlier ones wrote."""
    shutil.copytree(tiny_folder, tmp_path / "gemma-3-270m-it")
    for line in commands():
        run(line, tmp_path, from_nothing=not line.startswith("swirl"))
