"""Builds cpp/ with CMake into swirl.kernels._cpu. A failed build leaves its reason beside the package,
which then runs on its references and says so once (swirl/kernels/cpu.py)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cpp").glob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "cpp").glob("*.h"))
ERROR_FILE = "_cpu_build_error.txt"  # swirl/kernels/cpu.py reads it


class CMakeBuild(build_ext):
    """build_ext by CMake and ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp, "cmake").resolve()
        shutil.rmtree(build, ignore_errors=True)  # its cache names the tools of a build environment now gone
        target.parent.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True)
        error_file = target.parent / ERROR_FILE
        error_file.unlink(missing_ok=True)
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        try:
            for command in (configure, ["cmake", "--build", str(build), "--target", "_cpu"]):
                self.run_logged(command)
            self.copy_file(str(build / target.name), str(target))
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)  # never leave the library of an older source
            error_file.write_text(reason_of(error) + "\n")
            self.warn(f"the C++ ops were not built, swirl will be slow: {reason_of(error)}")

    def run_logged(self, command: list[str]) -> None:
        """Run a command, show what it printed, keep it in the error it raises."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, text=True, errors="replace", **pipes)
        sys.stdout.write(done.stdout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the library, or the reason, replaces what lay beside the sources."""
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, regular = map(Path, self._get_inplace_equivalent(build_py, ext))
            inplace.unlink(missing_ok=True)
            inplace.with_name(ERROR_FILE).unlink(missing_ok=True)
            made = regular if regular.exists() else regular.with_name(ERROR_FILE)
            self.copy_file(str(made), str(inplace.with_name(made.name)))

    def get_outputs(self) -> list[str]:
        """What was really made: the library, or the reason there is none."""
        outputs = []
        for name in super().get_outputs():
            outputs.append(name if os.path.exists(name) else os.path.join(os.path.dirname(name), ERROR_FILE))
        return outputs


def reason_of(error: Exception) -> str:
    """One line: what the tools called an error first (with the lines CMake puts below), else what failed."""
    lines = (getattr(error, "output", None) or "").splitlines()
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(" ".join(lines[i : i + 8]).split())
        if re.search(r"\berror\b.*:", line):
            return line.strip()
    return str(error)


setup(
    ext_modules=[Extension("swirl.kernels._cpu", sources=SOURCES, depends=[*HEADERS, "CMakeLists.txt"])],
    cmdclass={"build_ext": CMakeBuild},
)
