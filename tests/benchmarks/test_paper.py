"""The experiments: what runs there are, how two of them are compared, and a small one of every kind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import paper, paper_blocks, paper_evidence
from benchmarks.harness import RESULTS
from benchmarks.paper_blocks import BASES, BLOCKS, Run

ALL_RUNS = {run.key: run for block in BLOCKS.values() for run in block()}


def test_a_key_is_a_run():
    assert len(set(ALL_RUNS.values())) == len(ALL_RUNS) > 100
    assert Run(BASES[0]).key == "second-0 sampled"
    assert Run(BASES[1], method="imitation", updates=200).key == "second-1 imitation updates=200"


def test_every_question_and_table_speaks_of_runs_that_some_block_makes():
    for question, ours, theirs, family in paper_evidence.QUESTIONS:
        for run in (*ours, *theirs):
            assert run.key in ALL_RUNS and family in run.evaluated_on, question


def rows_of(runs, accuracy, family="bridge-2", questions=200, seed=0):
    rng = np.random.default_rng(seed)
    letters = {run.key: "".join("01"[int(x)] for x in rng.random(questions) < accuracy) for run in runs}
    return {key: {"key": key, "families": {family: {"right": right}}} for key, right in letters.items()}


def test_a_difference_is_paired_and_its_interval_says_whether_it_is_decided():
    ours, theirs = paper_evidence.STEP, paper_evidence.BASE
    rows = rows_of(ours, 0.9) | rows_of(theirs, 0.5, seed=1)
    found = paper_evidence.difference(rows, ours, theirs, "bridge-2")
    assert found.pairs == 3 and found.low < found.mean < found.high and found.word == "Yes"
    assert found.mean == pytest.approx(40, abs=5)
    back = paper_evidence.difference(rows, theirs, ours, "bridge-2")
    assert back.word == "No, the reverse" and back.mean == pytest.approx(-found.mean)
    same = {run.key: rows[ours[0].key] for run in (*ours, *theirs)}
    assert paper_evidence.difference(same, ours, theirs, "bridge-2").word == "Not decided"
    assert paper_evidence.difference(rows_of(ours, 0.9), ours, theirs, "bridge-2") is None
    one_missing = {key: row for key, row in rows.items() if key != ours[0].key}
    assert paper_evidence.difference(one_missing, ours, theirs, "bridge-2").pairs == 2


def test_bases_that_disagree_leave_a_question_open():
    """Three bases, two up by 20 points and one down by 30: their mean is no evidence, however many the questions."""
    ours, theirs = paper_evidence.STEP, paper_evidence.BASE
    rows = rows_of(theirs, 0.5, questions=2000)
    for run, accuracy in zip(ours, (0.7, 0.7, 0.2), strict=True):
        rows |= rows_of([run], accuracy, questions=2000, seed=1)
    found = paper_evidence.difference(rows, ours, theirs, "bridge-2")
    assert found.low < -20 and found.high > 15 and found.word == "Not decided"


def test_nothing_run_is_said_to_be_not_run():
    text = paper_evidence.document({}, "")
    assert text.count("not run") >= len(BLOCKS) + len(paper_evidence.QUESTIONS) and "Yes" not in text


def test_the_evidence_is_that_of_the_rows():
    made = paper_evidence.document(paper_evidence.read(paper.ROWS), (RESULTS / "paper_cells.md").read_text())
    assert paper.EVIDENCE.read_text() == made


@pytest.mark.parametrize("arguments", [["nothing"], ["--smoke"], ["headline", "--shard", "x"]])
def test_a_bad_call_is_wrong_usage(arguments):
    with pytest.raises(SystemExit) as error:
        paper.main(arguments)
    assert error.value.code == 2


QUICK = {"base", "imitation"}


@pytest.mark.parametrize("kinds", [QUICK, pytest.param({"base", *paper.MODES}, marks=pytest.mark.slow)], ids=len)
def test_a_smoke_run_of_every_kind(kinds, tmp_path, monkeypatch):
    shrunk = paper_blocks.smoke
    monkeypatch.setattr(paper_blocks, "smoke", lambda runs: [run for run in shrunk(runs) if run.method in kinds])
    out, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    call = ["cells", "headline", "--smoke", "--out", str(out), "--cache", str(cache)]
    paper.main(call)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    methods = {row["run"]["method"] for row in rows}
    assert methods == kinds
    for row in rows:
        family = row["families"]["bridge-2"]
        assert len(family["right"]) == 10 and family["accuracy"] == family["right"].count("1") / 10
        assert 0 <= family["good_steps"] <= 1 and set(family["slips"]) == set(paper_evidence.SLIPS)
        assert row["commit"] and (row["run"]["method"] in ("base", "outcome_rl") or row["kept"] > 0)
    paper.main(call)  # all is done: nothing is run again
    assert len(out.read_text().splitlines()) == len(rows)
    monkeypatch.setattr(paper, "EVIDENCE", tmp_path / "evidence.md")
    paper.main(["--write", "--out", str(out)])
    assert "| second-0 | bridge-2 | 30 |" in (tmp_path / "evidence.md").read_text()


def test_smoke_runs_differ_and_are_small():
    small = paper_blocks.smoke(ALL_RUNS.values())
    assert len({run.key for run in small}) == len(small) < len(ALL_RUNS)
    assert all(run.updates == 2 and run.num_questions <= 6 and len(run.evaluated_on) == 1 for run in small)
