"""What a run says of itself."""

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
