"""JSONL files read line by line, where they lie."""

from __future__ import annotations

import os

import pytest

from swirl.errors import InputError
from swirl.storage.digest import file_digest, seal
from swirl.trajectories import files as module
from swirl.trajectories.files import TrajectoryFiles
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Question, Step, Trajectory, encode_trajectory


def trajectory(name, text="a"):
    question = Question(id=name, task="bridge", question="Where?")
    return Trajectory(id=name, question=question, prompt="", steps=(Step(action=text),), stop="invalid_action")


def line(name, **changed):
    return encode_trajectory(trajectory(name, **changed))


@pytest.fixture(params=[1, 7, 64, 1 << 24])
def chunk(request, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_BYTES", request.param)


def test_every_line_of_every_file_in_order(tmp_path, chunk):
    lines = [line(f"q{k}", text="x" * (k * 13 % 200)) for k in range(9)]
    (tmp_path / "a.jsonl").write_bytes(b"\n \t \n" + lines[0] + b"\r\n" + b"  " + lines[1] + b"\n\n" + lines[2])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[3:])[:-1])  # no end of line at the end
    files = TrajectoryFiles(tmp_path / name for name in ("a.jsonl", "empty.jsonl", "b.jsonl"))
    assert [one.id for one in files] == [f"q{k}" for k in range(9)] and len(files) == 9
    assert [files.where(place)[1] for place in range(9)] == [3, 5, 8, 1, 2, 3, 4, 5, 6]
    assert files.where(2)[0].endswith("a.jsonl") and files.where(3)[0].endswith("b.jsonl")
    assert files.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert files.name.endswith("a.jsonl and 2 more")
    with pytest.raises(IndexError):
        files[9]


def test_the_digest_is_of_the_content_in_order(tmp_path):
    for name, count in (("a", 1), ("b", 2)):
        write_trajectories(tmp_path / name, [trajectory(f"q{k}") for k in range(count)])
    one, two = tmp_path / "a", tmp_path / "b"
    assert TrajectoryFiles([one]).digest == file_digest(one)
    assert TrajectoryFiles([one, two]).digest != TrajectoryFiles([two, one]).digest


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (seal(line("q")).replace(b"Where", b"Whose"), "x.jsonl:4: does not match its digest"),
        (line("q").replace(b'"action":"a"', b'"action":7'), r"x.jsonl:4: field 'steps\[0\].action': Expected `str`"),
        (b'{"id": \n', "x.jsonl:4: expected one JSON object a line"),
        (b"[" * 100_000 + b"\n", "x.jsonl:4: Expected `object`, got `array`"),
        (b"\0" * 50 + b"\n", "x.jsonl:4: expected one JSON object a line"),
    ],
)
def test_what_is_wrong_is_told_when_it_is_reached(tmp_path, bad, said):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line("q0") + b"\n" + line("q1") + bad + line("q3"))
    files = TrajectoryFiles([path])
    assert [files[place].id for place in (0, 1, 3)] == ["q0", "q1", "q3"]
    with pytest.raises(InputError, match=said):
        files[2]


def test_a_file_that_changes_is_refused_and_one_that_is_replaced_is_not(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line("q0") + line("q1"))
    files = TrajectoryFiles([path])
    (tmp_path / "other").write_bytes(line("other"))
    os.replace(tmp_path / "other", path)
    assert files[1].id == "q1"
    files = TrajectoryFiles([path])
    with open(path, "ab") as file:
        file.write(line("more"))
    with pytest.raises(InputError, match="was changed after it was opened"):
        files[0]


def test_nothing_to_read_is_one_line(tmp_path):
    (tmp_path / "blank.jsonl").write_bytes(b"\n  \n")
    with pytest.raises(InputError, match="blank.jsonl: expected at least one trajectory"):
        TrajectoryFiles([tmp_path / "blank.jsonl"])
    with pytest.raises(InputError, match="absent.jsonl: cannot be read"):
        TrajectoryFiles([tmp_path / "absent.jsonl"])
    with pytest.raises(InputError, match="cannot be read .Is a directory"):
        TrajectoryFiles([tmp_path])
