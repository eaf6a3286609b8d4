"""The report of a run: what it reads, and what it says of a folder that is none."""

from __future__ import annotations

import json
import re

import pytest

from swirl.app.report_page import write_report
from swirl.errors import InputError

SUMMARY = {
    "accuracy_before": {"bridge": 0.5, "deep": 0.0},
    "accuracy_after": {"bridge": 0.75, "deep": 0.1},
    "relative_gain": {"bridge": 0.5, "deep": None},
    "good_steps_before": {"bridge": 0.8},
    "good_steps_after": {"bridge": None, "deep": 0.9},
    "updates": 3, "wall_s": 9.5, "tokens_per_s": 1234.5, "peak_rss_bytes": 2**30, "seed": 7, "commit": "ab<c",
}  # fmt: skip
UPDATE = {"update": 1, "reward": 0.25, "loss": -0.5, "grad_norm": 1.0, "tokens_per_s": 100, "kl": 0.0, "masked": 0}


def a_run(folder, summary=SUMMARY, updates=(UPDATE, {**UPDATE, "reward": None}, UPDATE)):
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(update) + "\n" for update in updates))
    return folder


def test_the_page_shows_table_curves_and_facts(tmp_path):
    page = write_report(a_run(tmp_path / "räksmörgås")).read_bytes().decode("utf-8")
    assert "räksmörgås" in page and "<td>50.0%</td><td>75.0%</td><td>+50%</td>" in page and "ab&lt;c" in page
    assert page.count("<figure>") == 4 and page.count('"end">3</text>') == 4
    of_reward = re.search('points="(.*?)"', page)[1]  # its second update has none
    assert [point.split(",")[0] for point in of_reward.split()] == ["48.0", "412.0"]
    with_kl = write_report(a_run(tmp_path / "kl", updates=[{**UPDATE, "kl": 0.1, "reward": None}])).read_text("utf-8")
    assert "KL to the reference policy" in with_kl and "reward of an action" not in with_kl


@pytest.mark.parametrize("missing", ["updates", "good_steps_before", "relative_gain", "commit"])
def test_a_summary_of_another_kind_is_one_line(tmp_path, missing):
    run = a_run(tmp_path / "run", {name: value for name, value in SUMMARY.items() if name != missing})
    with pytest.raises(InputError, match=f"summary.json: expected the summary of .*, '{missing}' is missing"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("summary", ["", "[]", "null", "{", '{"updates": "many"}', '"\\ud800"', "NaN"])
def test_what_is_no_summary_is_one_line(tmp_path, summary):
    with pytest.raises(InputError, match="expected the summary of a finished run, "):
        write_report(a_run(tmp_path / "run", summary))


def test_metrics_of_another_kind_name_their_line(tmp_path):
    with pytest.raises(InputError, match=r"metrics.jsonl:2: expected the metrics of an update, 'loss' is missing"):
        write_report(a_run(tmp_path / "run", updates=[UPDATE, {"update": 2, "reward": 1.0}]))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be read .*expected the folder of a finished run"):
        write_report(tmp_path / "run")
    with pytest.raises(InputError, match=r"summary.json: cannot be read"):
        write_report(tmp_path / "nowhere")
