"""`kill -9` at random moments, in miniature: real commands, real signals; `tests.drills.kill_drill` is the whole."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fault_server import FaultServer
from swirl.trajectories.log import TrajectoryLog
from swirl.trajectories.record import Question, Step, Trajectory, encode_trajectory
from tests.drills import kill_drill
from tests.drills.kill_drill import (
    KillDrillError,
    Model,
    broken_promises,
    compare,
    draw_moments,
    filter_job,
    generate_job,
    kept_answers,
)
from tests.process import run_module

ROOT = Path(__file__).parents[2]


def drill(folder, *flags):
    """The rows of one drill, and the folder its commands ran in."""
    rows, options = [], kill_drill.parse(list(flags))
    asyncio.run(kill_drill.drill_all(options, folder, rows.append))
    for row in rows:
        assert broken_promises(row, options.kills) == []
    return rows


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_generate_and_filter_over_the_wire(kills, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # names every module on stderr
    rows = drill(tmp_path, "--trajectories", "60", "--kills", f"{kills}", "--in-flight", "8", "--latency-ms", "20")
    assert [row["job"] for row in rows] == ["generate", "filter"]
    for row in rows:
        assert row["lines"] == 60 and row["kept"] == row["answers"] > 120
        assert any(0 < kill.kept < row["kept"] for kill in row["found"]), "no kill fell in the midst of the work"
    for name in ("generate", "filter"):
        imported = (tmp_path / f"{name}-undisturbed" / "stderr.txt").read_text()
        assert "aiohttp" in imported and "torch" not in imported


@pytest.mark.slow
def test_generate_in_this_process_one_at_a_time(tmp_path):
    (row,) = drill(tmp_path, "--local", "--trajectories", "5", "--kills", "2")
    assert row["job"] == "generate, almanac" and row["lines"] == 5 and row["requests"] == 0


def test_the_same_command_beside_one_at_work_is_refused(tmp_path):
    words = ["swirl.filter", "--data", "t.jsonl", "--mode", "none"]
    (tmp_path / "t.jsonl").write_bytes(trajectory("q0") + trajectory("q1"))
    with TrajectoryLog(tmp_path / "kept.jsonl"):
        done = run_module(*words, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: kept.jsonl: another command")
    assert run_module(*words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "kept.jsonl").read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("name, log", [("generate", "t.jsonl"), ("filter", "k.jsonl"), ("filter", "d.jsonl")])
def test_a_command_with_other_settings_beside_one_just_begun_leaves_it_its_own(name, log, tmp_path):
    """A settings file is replaced where its outputs are empty still, and so is theirs who began a moment ago."""
    flags = {
        "generate": ["--out", "t.jsonl", "--num-questions", "1", "--samples", "1", "--max-new-tokens", "4", "--seed"],
        "filter": ["--data", "data.jsonl", "--kept", "k.jsonl", "--dropped", "d.jsonl", "--votes"],
    }[name]
    (tmp_path / "data.jsonl").touch()
    beside = tmp_path / {"generate": "t.jsonl", "filter": "k.jsonl"}[name]
    beside = beside.with_name(f"{beside.name}.settings.json")
    run_module(f"swirl.{name}", *flags, "1", cwd=tmp_path)
    began = beside.read_bytes()
    for path in tmp_path.glob("?.jsonl"):
        path.write_bytes(b"")
    with TrajectoryLog(tmp_path / log):
        done = run_module(f"swirl.{name}", *flags, "2", cwd=tmp_path)
        assert done.returncode == 1 and f"error: {log}: another command is writing to it" in done.stderr
    assert beside.read_bytes() == began
    run_module(f"swirl.{name}", *flags, "2", cwd=tmp_path)
    assert beside.read_bytes() != began


def test_a_command_that_fails_is_one_clear_line(tmp_path):
    job, model = filter_job(Path("absent.jsonl"), "rule", 1), Model(1)
    with pytest.raises(KillDrillError, match="^filter: exit code 1: error: absent.jsonl: cannot be read"):
        asyncio.run(kill_drill.drill_job(job, tmp_path, 1, random.Random(0), FaultServer(model), model))


def trajectory(name):
    question = Question(id=name, task="bridge", question="Where?")
    return encode_trajectory(
        Trajectory(id=name, question=question, prompt="", steps=(Step(action="a"),), stop="invalid_action")
    )


@pytest.mark.parametrize(
    ("left", "promise"),
    [
        (lambda lines: lines[::-1], None),
        (lambda lines: lines[:2], "no line is missing (1 are: q2)"),
        (lambda lines: [*lines, lines[1]], "no line is new or changed (1 are: q1)"),
        (lambda lines: [*lines, lines[1]], "no trajectory is there twice (1 are)"),
        (lambda lines: [*lines, lines[0].replace(b'"a"', b'"b"')], "no trajectory is there twice (1 are)"),
        (lambda lines: [lines[0].replace(b'"a"', b'"b"'), *lines[1:]], "no line is new or changed (1 are: q0)"),
        (lambda lines: [*lines, lines[1][:9]], "every line is whole (1 files end in half a one)"),
    ],
)
def test_what_a_kill_could_do_to_the_lines_is_found(tmp_path, left, promise):
    job = generate_job("http://127.0.0.1:1/v1#policy", 1, 1)
    lines = [trajectory(f"q{i}") for i in range(3)]
    for name, content in (("undisturbed", lines), ("disturbed", left(lines))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trajectories.jsonl").write_bytes(b"".join(content))
    counts = {"hits": 1, "answers": 3, "answers_of_disturbed": 3, "requests_undisturbed": 3}
    row = {**counts, "used_before_kept": 0, "cached_asked_again": 0}
    row |= compare(job, tmp_path / "undisturbed", tmp_path / "disturbed")
    found = broken_promises(row, 1)
    assert promise in found if promise else not found
    for name, worse in (("used_before_kept", 1), ("cached_asked_again", 1), ("hits", 0), ("answers_of_disturbed", 2)):
        assert len(broken_promises({**row, name: worse}, 1)) == len(found) + 1


def test_moments_are_spread_over_the_job():
    moments = draw_moments(random.Random(0), 50)
    shares = [moment.share for moment in moments]
    assert len(moments) == 50 and shares.count(0.0) == 10 and shares[-5:] == [1.0] * 5
    work = [share for share in shares if 0 < share < 1]
    assert work == sorted(work) and work[0] < 0.1 and work[-1] > 0.9
    assert draw_moments(random.Random(0), 50) == moments != draw_moments(random.Random(1), 50)


_WRITER = """
import asyncio, os, signal, sys
from swirl.endpoints.cache import AnswerCache

async def main():
    cache = AnswerCache(sys.argv[1])
    for i in range(20):
        await cache.put(b"%d" % i, b'{"id": "%d"}' % i)
        print(i, flush=True)
    asyncio.create_task(cache.put(b"20", b'{"id": "20"}'))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_killed_cache_is_read_without_being_repaired(tmp_path):
    path = tmp_path / "answers.sqlite"
    words = [sys.executable, "-c", _WRITER, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL and done.stdout.split() == [str(i) for i in range(20)]
    left = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    assert len(left["answers.sqlite-wal"]) > 0
    assert kept_answers(path) == {str(i) for i in range(20)}
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == left
    empty = tmp_path / "killed before the table.sqlite"
    assert kept_answers(empty) == set()
    sqlite3.connect(empty).close()
    assert kept_answers(empty) == set()
