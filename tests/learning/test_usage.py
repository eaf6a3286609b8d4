"""What a run says of itself."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import swirl
from swirl.learning import usage


def test_the_commit_is_that_of_swirl_s_own_repository(tmp_path):
    """An installation within somebody's repository is not told by that one's commit."""
    git = ("git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    site = tmp_path / "venv" / "site-packages"
    package = Path(swirl.__file__).parent
    (site / "swirl" / "learning").mkdir(parents=True)
    for name in ("__init__.py", "learning/__init__.py", "learning/usage.py"):
        shutil.copy(package / name, site / "swirl" / name)
    (site / "swirl" / "kernels").symlink_to(package / "kernels", target_is_directory=True)
    code = "from swirl.learning import usage; print(usage.commit())"
    found = subprocess.check_output(
        [sys.executable, "-c", code], cwd=site, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    )
    assert found.decode().strip() == swirl.__version__
    root = package.resolve().parent
    if (root / ".git").exists():
        head = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"]).decode().strip()
        assert usage.commit().removesuffix("+") == head


def test_a_container_s_memory_limit_is_the_least_of_its_groups(tmp_path):
    own, mounted = tmp_path / "cgroup", tmp_path / "mounted"

    def limit(groups: str, files: dict[str, object]) -> float:
        own.write_text(groups)
        for name, value in files.items():
            (mounted / name).parent.mkdir(parents=True, exist_ok=True)
            (mounted / name).write_text(f"{value}\n")
        return usage.memory_limit(own, mounted)

    assert usage.memory_limit(tmp_path / "none", tmp_path) == math.inf
    assert limit("0::/a/b\n", {"a/b/memory.max": "max"}) == math.inf
    assert limit("0::/a/b\n", {"a/b/memory.max": 900, "a/memory.max": 700}) == 700  # a parent's holds, too
    assert limit("0::/elsewhere\n", {"memory.max": 500}) == 500  # a container sees its own group as the root
    version_1 = {"memory/c/memory.limit_in_bytes": 300, "memory/memory.limit_in_bytes": 2**63 - 4096}
    assert limit("5:cpu:/\n4:memory,x:/c\n", version_1) == 300
