"""Every command of the README runs as printed: the blocks marked ```sh, line by line, in one folder.

A tiny checkpoint is put there for the model that a user would have.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The commands in order; lines that end in a backslash go on."""
    text = "".join(BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))).replace("\\\n", " ")
    return [
        " ".join(shlex.split(line, comments=True)) for line in text.splitlines() if shlex.split(line, comments=True)
    ]


def test_the_commands_of_the_readme(tmp_path, tiny_folder):
    """One after another: later ones read what earlier ones wrote."""
    shutil.copytree(tiny_folder, tmp_path / "gemma-3-270m-it")
    programs = {"python": [sys.executable], "swirl": [sys.executable, "-m", "swirl"]}
    programs["torchrun"] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert len(commands()) >= 5
    for command in commands():
        program, *words = shlex.split(command)
        done = subprocess.run(
            [*programs[program], *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
