"""The report of runs: what it reads, what it says of a run that did not finish, and that no text of a run is markup."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import html
import json
import re

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from swirl.app.report.build import write_report
from swirl.app.report.live import LiveReport, app_of
from swirl.app.report.tokens import Pieces
from swirl.app.resolve import ALMANAC_BASE
from swirl.app.run_records import EVALUATED, LOG_PROBS, SAMPLES, STOPPED, OtherLogProbs, SampledGroup
from swirl.errors import InputError
from swirl.model.tokenizer import Tokenizer
from swirl.report import ReportConfig, main
from swirl.storage.lock import folder_lock
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Call, Question, Step, Trajectory, encode_trajectory

SUMMARY = {
    "accuracy_before": {"bridge": 0.5, "deep": 0.0},
    "accuracy_after": {"bridge": 0.75, "deep": 0.1},
    "relative_gain": {"bridge": 0.5, "deep": None},
    "good_steps_before": {"bridge": 0.8},
    "good_steps_after": {"bridge": None, "deep": 0.9},
    "updates": 3, "wall_s": 9.5, "tokens_per_s": 1234.5, "peak_rss_bytes": 1_500_000_000, "seed": 7, "commit": "ab<c",
}  # fmt: skip
UPDATE = {"update": 1, "reward": 0.25, "loss": -0.5, "grad_norm": 1.0, "tokens_per_s": 100, "kl": 0.0, "masked": 0,
          "peak_bytes": 1_250_000_000}  # fmt: skip
UPDATES = (UPDATE, {**UPDATE, "update": 2, "reward": None}, {**UPDATE, "update": 3})
HOSTILE = "</script><script>window.stolen = 1</script><img src=x onerror='stolen=1'>{{script}} \u2028 \x00 %-->"


def a_run(folder, summary=SUMMARY, lines=UPDATES, **config):
    folder.mkdir(exist_ok=True, parents=True)
    if summary is not None:
        (folder / "summary.json").write_text(summary if isinstance(summary, str) else json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(update) + "\n" for update in lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def a_trajectory(name, outcome=None, task="bridge", action="<answer>x</answer>", **changed):
    step = Step(action=action, call=Call("answer", "x"), verdict="GOOD", reason="because")
    question = Question(id=name, task=task, question=f"Who is {name}?", answer="x")
    made = {"id": name, "question": question, "prompt": "Answer.", "steps": (step,), "stop": "answer"}
    return Trajectory(**{**made, "outcome": outcome, **changed})


def parts_of(page):
    """The data that lies in a page, as JSON."""
    found = re.findall(rb'<script type="application/gzip\+base64" id="part-(.+?)">(.*?)</script>', page.read_bytes())
    return {name.decode(): json.loads(gzip.decompress(base64.b64decode(content))) for name, content in found}


def overview_of(*runs):
    return parts_of(write_report(runs))["overview"]


def test_the_page_has_table_curves_and_facts(tmp_path):
    run = a_run(tmp_path / "räksmörgås")
    page = write_report([run])
    assert page == run / "report.html" and "<title>swirl: räksmörgås</title>" in page.read_text("utf-8")
    (shown,) = parts_of(page)["overview"]["runs"]
    assert ["commit", "ab<c"] in shown["facts"] and ["peak memory", "1.50 GB"] in shown["facts"]
    assert shown["series"]["peak_bytes"] == {"x": [1, 2, 3], "y": [1.25] * 3}
    assert shown["status"]["kind"] == "finished"
    bridge, deep = shown["table"]
    assert bridge["accuracy"] == {"before": 0.5, "after": 0.75} and bridge["change"] == 0.25
    assert bridge["good_steps"] == {"before": 0.8, "after": None} and deep["relative_gain"] is None
    assert shown["series"]["reward"] == {"x": [1, 2, 3], "y": [0.25, None, 0.25]}
    assert shown["series"]["entropy"] == {"x": [], "y": []}  # not measured: the page says so
    assert shown["series"]["accuracy"][0] == {"task": "bridge", "split": "test", "x": [0, 3], "y": [50.0, 75.0]}


@pytest.mark.parametrize("missing", ["updates", "good_steps_before", "relative_gain", "commit"])
def test_a_summary_of_another_kind_is_one_line(tmp_path, missing):
    run = a_run(tmp_path / "run", {name: value for name, value in SUMMARY.items() if name != missing})
    with pytest.raises(InputError, match=f"summary.json: expected the summary of .*, '{missing}' is missing"):
        write_report([run])
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("summary", ["", "[]", "null", "{", '{"updates": "many"}', '"\\ud800"', "NaN"])
def test_what_is_no_summary_is_one_line(tmp_path, summary):
    with pytest.raises(InputError, match="expected the summary of a finished run, "):
        write_report([a_run(tmp_path / "run", summary)])


def test_metrics_of_another_kind_name_their_line(tmp_path):
    with pytest.raises(InputError, match=r"metrics.jsonl:2: expected the metrics of an update, 'loss' is missing"):
        write_report([a_run(tmp_path / "run", lines=[UPDATE, {"update": 2, "reward": 1.0}])])
    run = a_run(tmp_path / "cut")
    (run / "metrics.jsonl").write_text('{"update": 1, "rew')  # a finished run writes no more: this is damage
    with pytest.raises(InputError, match="metrics.jsonl:1: expected the metrics of an update"):
        write_report([run])
    with pytest.raises(InputError, match="cannot be read: expected the folder of a run"):
        write_report([tmp_path / "nowhere"])


def test_a_run_that_is_dead_at_work_or_stopped_says_so(tmp_path):
    run = a_run(tmp_path / "run", None, UPDATES[:1], updates=3)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"update": 2, "rew')  # killed while it wrote
    (shown,) = overview_of(run)["runs"]
    assert shown["status"]["text"] == "ended after 1 of 3 updates without a word: killed, or not begun"
    assert shown["series"]["reward"] == {"x": [1], "y": [0.25]} and shown["table"] == []
    assert "no answers of the trained policy to test questions" in shown["notes"]
    with folder_lock(run):
        assert overview_of(run)["runs"][0]["status"] == {"kind": "running", "text": "at work: 1 of 3 updates"}
    (run / STOPPED).write_text('{"why": "3 updates in a row had nothing to learn from: every reward is 1.00"}')
    assert overview_of(run)["runs"][0]["status"]["text"].endswith("nothing to learn from: every reward is 1.00")
    only_config = tmp_path / "begun"
    only_config.mkdir()
    (only_config / "config.json").write_text("{}")
    assert overview_of(only_config)["runs"][0]["facts"][4] == ["updates", "0"]


def test_answers_of_an_unfinished_run_make_its_table(tmp_path):
    run = a_run(tmp_path / "run", None, ())
    write_trajectories(run / EVALUATED["before"], [a_trajectory("a", True), a_trajectory("b", False)])
    (row,) = overview_of(run)["runs"][0]["table"]
    assert row["accuracy"] == {"before": 0.5, "after": None} and row["questions"] == 2 and row["change"] is None
    assert row["interval"]["before"] == [0.0, 1.0] and row["good_steps"]["before"] == 1.0


def test_runs_that_differ_in_their_seed_alone_have_a_mean_with_its_interval(tmp_path):
    runs = []
    for seed, rewards in enumerate(((0.2, 0.4), (0.4, 0.6), (0.6, 0.8))):
        updates = [{**UPDATE, "update": i + 1, "reward": reward} for i, reward in enumerate(rewards)]
        runs.append(a_run(tmp_path / f"seed-{seed}", lines=updates, seed=seed, mode="sampled", out=str(seed)))
    runs.append(a_run(tmp_path / "other", seed=0, mode="imitation"))
    made = overview_of(*runs)
    (group,) = made["groups"]
    assert group["runs"] == [0, 1, 2] and group["label"] == "mode sampled"
    means = group["series"]["reward"]
    np.testing.assert_allclose(means["mean"], [0.4, 0.6])
    np.testing.assert_allclose(np.subtract(means["high"], means["mean"]), 4.303 * 0.2 / np.sqrt(3))
    assert [run["settings"] for run in made["runs"]] == [{"mode": "sampled"}] * 3 + [{"mode": "imitation"}]


def test_folders_of_one_name_are_told_by_their_paths(tmp_path):
    runs = [a_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [run["name"] for run in overview_of(*runs)["runs"]] == [str(run) for run in runs]


def rows_of(parts):
    columns = parts["index"]["columns"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def test_entries_say_what_training_changed_and_what_the_filter_did(tmp_path):
    run = a_run(tmp_path / "run")
    before = [a_trajectory(name, outcome) for name, outcome in (("m", False), ("b", True), ("r", True), ("w", False))]
    after = [a_trajectory(name, outcome) for name, outcome in (("m", True), ("b", False), ("r", True), ("w", False))]
    write_trajectories(run / EVALUATED["before"], [*before, a_trajectory("gone", True)])
    write_trajectories(run / EVALUATED["after"], [*after, a_trajectory("m", True, task="deep")])
    bad = Step(action="?", verdict="BAD", invalid="no tool call and no answer")
    write_trajectories(run / "kept.jsonl", [a_trajectory("k", True)])
    write_trajectories(run / "dropped.jsonl", [a_trajectory("d", steps=(bad,), dropped="process: step 1 is BAD (no)")])
    parts = parts_of(write_report([run]))
    rows = rows_of(parts)
    assert [row["change"] for row in rows] == ["mended", "broken", "still right", "still wrong", *[None] * 4]
    assert [row["kind"] for row in rows] == ["evaluated"] * 6 + ["training data"] * 2
    assert [row.get("kept") for row in rows[-2:]] == [True, False] and rows[-1]["verdict"] == "BAD"
    assert [stage["label"] for stage in parts["overview"]["runs"][0]["funnel"]] == [
        "generated", "dropped: process, step 1 is BAD", "kept"]  # fmt: skip
    first = parts["chunk-0"][0]
    assert [answer["policy"] for answer in first["answers"]] == ["base", "trained"]
    assert first["answers"][0]["steps"][0] | {"verdict": "GOOD", "reason": "because"} == first["answers"][0]["steps"][0]


def test_a_bound_on_entries_leaves_the_evaluation_first_and_is_told(tmp_path):
    run = a_run(tmp_path / "run")
    write_trajectories(run / EVALUATED["before"], [a_trajectory("a", True)])
    write_trajectories(run / "kept.jsonl", [a_trajectory(str(i)) for i in range(5)])
    parts = parts_of(write_report([run], tmp_path / "new" / "page.html", max_entries=3))
    assert [row["id"] for row in rows_of(parts)] == ["a", "0", "1"]
    assert "the first 3 entries are here, others are left out (--trajectories)" in parts["overview"]["runs"][0]["notes"]


@pytest.mark.parametrize("bound", [0, 1, 2, 3])
def test_a_bound_on_entries_leaves_every_count_as_it_is(tmp_path, bound):
    run = a_run(tmp_path / "run")
    write_trajectories(run / EVALUATED["before"], [a_trajectory("m", False), a_trajectory("b", True)])
    write_trajectories(run / EVALUATED["after"], [a_trajectory("m", True), a_trajectory("b", False)])
    write_trajectories(run / "kept.jsonl", [a_trajectory("k", True)])
    write_trajectories(run / "dropped.jsonl", [a_trajectory("d", dropped="outcome: wrong")])
    parts = parts_of(write_report([run], max_entries=bound))
    (shown,) = parts["overview"]["runs"]
    assert parts["index"]["count"] == bound and shown["changes"] == {"mended": 1, "broken": 1}
    assert [(stage["label"], stage["count"]) for stage in shown["funnel"]] == [
        ("generated", 2), ("dropped: outcome", 1), ("kept", 1)]  # fmt: skip
    given = a_run(tmp_path / "given", data=[str(run / "kept.jsonl")])
    (shown,) = parts_of(write_report([given], max_entries=0))["overview"]["runs"]
    assert shown["funnel"][-1] == {"label": "kept", "count": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ALMANAC_BASE)


@pytest.mark.parametrize("text", ["<answer>Kelmor Velsin</answer>", "naïve 中文 🙂🙂 é", "", "a\n\nb", "\ud7ff\ufffd"])
def test_pieces_cover_an_action_as_a_browser_counts(tokenizer, text):
    ids = tokenizer.action_ids(text)
    lengths = Pieces(tokenizer).lengths(text, ids)
    assert len(lengths) == len(ids) and lengths[-1] == 0
    assert sum(lengths) == len(text.encode("utf-16-le")) // 2
    assert Pieces(tokenizer).lengths(text + "!", ids) is None and Pieces(None).lengths(text, ids) is None
    assert Pieces(tokenizer).lengths("x", [10**9]) is None


def test_log_probs_of_both_policies_and_what_was_drawn_reach_the_page(tmp_path, tokenizer):
    run = a_run(tmp_path / "run", model="almanac")
    ids = tuple(tokenizer.action_ids("<answer>x</answer>"))
    log_probs = tuple(-0.5 - i for i in range(len(ids)))
    step = Step(action="<answer>x</answer>", action_ids=ids, log_probs=log_probs, call=Call("answer", "x"))
    told = {"steps": (step,), "prompt_ids": (1,), "tokenizer": tokenizer.fingerprint}
    write_trajectories(run / EVALUATED["before"], [a_trajectory("a", True, **told)])
    write_trajectories(run / "kept.jsonl", [a_trajectory("k", True, **told)])
    other = OtherLogProbs(EVALUATED["before"], "bridge", "a", "trained", ((-0.25,) * len(ids),))
    question = a_trajectory("k").question
    drawn = [
        SampledGroup(2, question, 0, ((step,), (step,)), (0.5, None), 24, "k"),
        SampledGroup(3, Question(id="q", task="bridge", question="?"), 0, ((step, step),), (1.0,), 8),
    ]
    for name, records in ((LOG_PROBS, [other]), (SAMPLES, drawn)):
        (run / name).write_bytes(b"".join(encode_trajectory(record) for record in records))
    parts = parts_of(write_report([run]))
    first, kept, played = parts["chunk-0"]
    shown = first["answers"][0]["steps"][0]
    assert shown["log_probs"] == [round(1000 * value) for value in log_probs] and shown["other"] == [-250] * len(ids)
    assert sum(shown["pieces"]) == len(step.action)
    (group,) = kept["groups"]
    assert [attempt["advantage"] for attempt in group["attempts"]] == [0.5, None] and group["update"] == 2
    assert [row["kind"] for row in rows_of(parts)] == ["evaluated", "training data", "played"]
    assert len(played["groups"][0]["attempts"][0]["steps"]) == 2
    assert "what updates drew is here in part, 2 of 24 trees of 2 updates" in parts["overview"]["runs"][0]["notes"]


def test_data_that_a_run_was_given_is_read_as_far_as_it_is_there(tmp_path):
    data = tmp_path / "data.jsonl"
    write_trajectories(data, [a_trajectory("g", True)])
    run = a_run(tmp_path / "run", data=[str(data), "gone.jsonl"])
    parts = parts_of(write_report([run]))
    assert [row["id"] for row in rows_of(parts)] == ["g"]
    (shown,) = parts["overview"]["runs"]
    assert "the training data, gone.jsonl, is not there" in shown["notes"]
    assert shown["facts"][1] == ["trained on", f"{data} gone.jsonl"] and shown["funnel"][-1]["count"] == 1
    old = a_run(tmp_path / "old", data=str(data))  # one path, as configs had it
    assert [row["id"] for row in rows_of(parts_of(write_report([old])))] == ["g"]


def test_an_action_learned_from_as_it_was_recorded_has_its_reward(tmp_path):
    run = a_run(tmp_path / "run")
    write_trajectories(run / "kept.jsonl", [a_trajectory("k")])
    group = SampledGroup(1, a_trajectory("k").question, 0, ((Step(action="x", reward=1.0),),), (0.25,), 3, "k")
    (run / SAMPLES).write_bytes(encode_trajectory(group))
    (detail,) = parts_of(write_report([run]))["chunk-0"]
    step = detail["answers"][0]["steps"][0]
    assert (step["reward"], step["advantage"], detail["groups"]) == (1.0, 0.25, [])


def test_no_text_of_a_run_is_markup_and_nothing_comes_from_elsewhere(tmp_path):
    run = a_run(tmp_path / "<b>run", {**SUMMARY, "commit": HOSTILE}, model=HOSTILE)
    step = Step(action=HOSTILE, observation=HOSTILE, reason=HOSTILE, verdict="BAD")
    write_trajectories(run / EVALUATED["after"], [a_trajectory(HOSTILE, steps=(step,), prediction=HOSTILE)])
    page = write_report([run])
    text = page.read_text("utf-8")
    assert "stolen" not in text and "<b>" not in text and "{{script}}" not in text
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="(.*?)"', text)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    for name, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in html.unescape(policy)
    assert "default-src 'none'" in html.unescape(policy) and "connect-src 'none'" in html.unescape(policy)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\(""", text)
    assert HOSTILE in parts_of(page)["chunk-0"][0]["answers"][0]["steps"][0]["action"]


def test_the_same_run_makes_the_same_page(tmp_path):
    run = a_run(tmp_path / "run")
    write_trajectories(run / "kept.jsonl", [a_trajectory("k")])
    assert write_report([run]).read_bytes() == write_report([run], tmp_path / "b.html").read_bytes()


def test_the_command_writes_one_page_of_several_runs(tmp_path, capsys):
    runs = tuple(a_run(tmp_path / name) for name in ("a", "b"))
    main(ReportConfig(run=runs, out=tmp_path / "both.html"))
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    assert len(parts_of(tmp_path / "both.html")["overview"]["runs"]) == 2


def test_a_run_is_shown_live(tmp_path):
    run = a_run(tmp_path / "run", None, UPDATES[:1], updates=3)
    write_trajectories(run / EVALUATED["before"], [a_trajectory(HOSTILE, True)])

    async def watch():
        report = LiveReport([run], 100)
        report.refresh()
        async with TestClient(TestServer(app_of(report), host="127.0.0.1")) as client:
            page = await (await client.get("/")).text()
            assert 'data-live="yes"' in page and "stolen" not in page and "connect-src &#x27;self&#x27;" in page
            first = await (await client.get("/data/version")).json()
            assert (await (await client.get("/data/index")).json())["count"] == 1
            again = await (await client.get("/data/version")).json()
            assert {**again, "at": 0} == {**first, "at": 0}
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps({**UPDATE, "update": 2}) + "\n")
            third = await (await client.get("/data/version")).json()
            assert third["overview"] > first["overview"] and third["entries"] == first["entries"]
            overview = await (await client.get("/data/overview")).json()
            assert overview["runs"][0]["series"]["reward"]["x"] == [1, 2] and overview["runs"][0]["table"]
            assert (await client.get("/data/nothing")).status == 404
            assert (await client.get("/", headers={"Host": "elsewhere.example:80"})).status == 403
            (run / "metrics.jsonl").write_text("no JSON\n")
            broken = await client.get("/data/version")
            assert broken.status == 500 and "metrics.jsonl:1" in await broken.text()

    asyncio.run(watch())
