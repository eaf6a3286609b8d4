"""What is released: metadata that is whole, and packages that work where nothing else of the source is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import swirl

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = CONFIG["project"]


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert newest == swirl.__version__


def test_metadata_is_whole():
    assert {"readme", "authors", "keywords", "classifiers", "license", "requires-python"} <= PROJECT.keys()
    for requirement in PROJECT["dependencies"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+", requirement), f"{requirement}: expected a lower bound and nothing else"
    lowest = PROJECT["requires-python"].removeprefix(">=")
    named = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.fullmatch(r".*Python :: 3\.\d+", c)]
    assert named[0] == lowest and named == sorted(named)
    for version in named:
        assert any(f"cp{version.replace('.', '')}-" in build for build in CONFIG["tool"]["cibuildwheel"]["build"])


@pytest.mark.slow  # it compiles the C++
def test_a_wheel_made_from_the_sdist_goes_the_whole_way_in_an_empty_environment(tmp_path):
    """Its dependencies, torch above all, are those of the environment that runs this, behind the wheel's own files."""
    pytest.importorskip("build")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}

    def run(*words):
        done = subprocess.run([*map(str, words)], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    source = tmp_path / "source"
    run("git", "clone", "--quiet", ROOT, source)
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source)  # the sdist, and a wheel from it
    (wheel,), (sdist,) = (tmp_path / "dist").glob("*.whl"), (tmp_path / "dist").glob("*.tar.gz")
    assert sdist.name == f"swirl-{swirl.__version__}.tar.gz"
    run(sys.executable, "-m", "venv", "empty")
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = (tmp_path / "empty" / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import swirl, swirl.kernels._cpu as cpu; print(swirl.__file__, cpu.__file__)")
    assert where.count(str(site)) == 2, where  # the wheel's own, and its C++
    assert run(tmp_path / "empty" / "bin" / "swirl", "--version") == f"swirl {swirl.__version__}\n"
    flags = "--packed --smoke --updates 1 --num-questions 6 --evaluate-num-questions 4 --samples 2 --out run".split()
    run(tmp_path / "empty" / "bin" / "swirl", "train", *flags)
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").is_file()
