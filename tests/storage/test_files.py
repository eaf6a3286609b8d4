"""Files are whole or not there, and a lock is one process's."""

import os
import stat
import subprocess
import sys

import pytest

from swirl.storage.files import replace_file, replacing, sync_files
from swirl.storage.lock import folder_lock, take_lock


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, b"one")
    with replacing(path) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a.json"]
    sync_files(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "a.json"
    replace_file(path, b"one")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"two")
        raise error
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["a.json"]


def test_the_mode_is_the_one_asked_for(tmp_path):
    before = os.umask(0o022)
    try:
        replace_file(tmp_path / "open", b"")
        replace_file(tmp_path / "answers", b"", mode=0o600)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("open", "answers")]
    assert modes == [0o644, 0o600]


def test_links_are_not_written_through(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "00000000")
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / ".a.json.00000000.partial").symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(tmp_path / "a.json", b"theirs")
    assert victim.read_bytes() == b"mine" and not (tmp_path / "a.json").exists()


def test_two_writers_never_mix(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as one, replacing(path) as other:
        one.write(b"one" * 1000)
        other.write(b"other")
    assert path.read_bytes() == b"one" * 1000  # the outer one ended last


def test_a_folder_s_lock_keeps_another_process_out(tmp_path):
    code = "import sys; from swirl.storage.lock import folder_lock\nwith folder_lock(sys.argv[1]) as mine: print(mine)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with folder_lock(tmp_path) as mine:
        assert mine and subprocess.check_output(words) == b"False\n"
    assert subprocess.check_output(words) == b"True\n"
    with open(tmp_path / "log", "wb") as file:
        assert take_lock(file)
