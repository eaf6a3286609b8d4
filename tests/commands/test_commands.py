"""The commands as a user runs them: exit codes, one line for an error, nothing lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from swirl.app import progress
from swirl.app import resolve as opening
from swirl.errors import ConfigError
from swirl.storage.digest import unseal
from swirl.trajectories.actions import Call
from swirl.trajectories.log import iter_trajectories, read_trajectories
from swirl.trajectories.record import encode_trajectory
from tests.process import begin_module, run_module, run_ranks

ROOT = Path(__file__).parents[2]


def command(name, *flags, cwd, check=None, **environment):
    done = run_module(f"swirl.{name}", *flags, cwd=cwd, **environment)
    if check is not None:
        assert done.returncode == check, done.stderr
    return done


def one_line(done, code=1):
    """The one line of an error: of data or a server (exit code 1), or of wrong usage (2)."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def sorted_lines(*paths):
    return sorted(line for path in paths for line in path.read_bytes().splitlines())


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("data")
    flags = ("--policy", tiny_folder, "--num-questions", 6, "--samples", 2, "--max-new-tokens", 8)
    done = command("generate", "--out", "t.jsonl", *flags, cwd=folder, check=0)
    assert json.loads(done.stdout)["trajectories"] == 12
    return folder / "t.jsonl"


@pytest.mark.parametrize("name", ["generate", "filter", "train", "evaluate", "report"])
def test_help_is_for_strangers_and_wrong_usage_exits_2(name, tmp_path):
    assert "usage" in command(name, "--help", cwd=tmp_path, check=0).stdout
    assert command(name, "--no-such-flag", cwd=tmp_path).returncode == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, flag, value",
    [
        ("generate", "--in-flight", 0),
        ("generate", "--samples", 0),
        ("evaluate", "--num-questions", 0),
        ("filter", "--votes", 0),
    ],
)
def test_numbers_that_cannot_be_meant_are_wrong_usage(name, flag, value, tmp_path):
    said = one_line(command(name, flag, value, cwd=tmp_path), 2)
    assert said == f"error: {flag} {value}: expected at least 1" and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    assert "file" in one_line(command("generate", "--num-questions", 1, "--out", "file/t.jsonl", cwd=tmp_path))


def test_progress_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    with progress.progress("count", 5, completed=2, note=lambda: "one in flight") as advance:
        advance(2)
        advance(note="as told")
    shown = capsys.readouterr()
    middle, told = shown.err.splitlines()
    assert shown.out == "" and middle.split()[:2] == ["count", "4/5"] and middle.endswith("left  one in flight")
    assert told.split()[1] == "5/5" and "left" not in told and told.endswith("as told")
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 60.0)
    with progress.progress("count", 9, note=lambda: "as asked") as advance:
        for _ in range(3):
            advance()
        advance(note="an update")  # each that says something has its line, and the last is not said twice
        advance(note="another")
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["4/9", "5/9"]
    with progress.progress("count", None) as advance:
        advance(3)
    assert capsys.readouterr().err.splitlines()[-1].split() == ["count", "3", "0:00:00"]
    with progress.progress("count", 5, show=False) as advance:
        advance(5)
    assert capsys.readouterr().err == ""


def test_filter_help_loads_no_torch(tmp_path):
    script = "import sys, swirl.filter; assert 'torch' not in sys.modules and 'numba' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )


def test_generate_again_adds_nothing_and_other_settings_are_refused(trajectories, tiny_folder):
    before = trajectories.read_bytes()
    flags = ("--policy", tiny_folder, "--num-questions", 6, "--samples", 2, "--max-new-tokens", 8)
    done = command("generate", "--out", trajectories, *flags, cwd=trajectories.parent, check=0)
    assert json.loads(done.stdout)["new"] == 0 and trajectories.read_bytes() == before
    done = command("generate", "--out", trajectories, *flags, "--seed", 1, cwd=trajectories.parent)
    assert "--seed" in one_line(done, 2) and trajectories.read_bytes() == before


def test_generate_killed_at_any_moment_resumes_to_the_same_file(trajectories, tiny_folder, tmp_path):
    flags = [
        "--policy",
        str(tiny_folder),
        "--num-questions",
        "6",
        "--samples",
        "2",
        "--max-new-tokens",
        "8",
        "--in-flight",
        "1",
    ]
    out = tmp_path / "t.jsonl"
    process = begin_module("swirl.generate", "--out", out, *flags, cwd=tmp_path)
    while process.is_alive() and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.join()
    with open(out, "ab") as file:
        file.write(b'{"id": "half a li')
    command("generate", "--out", out, *flags, cwd=tmp_path, check=0)

    def without_log_probs(path):  # their last bits depend on what is sampled in the same batch
        made = sorted(read_trajectories(path), key=lambda t: t.id)
        return [replace(t, steps=tuple(replace(step, log_probs=None) for step in t.steps)) for t in made]

    assert without_log_probs(out) == without_log_probs(trajectories)


def test_filter_keeps_and_drops_all_with_reasons_and_resumes(trajectories, tmp_path):
    for mode in ("none", "process", "outcome", "both"):
        flags = ("--data", trajectories, "--kept", f"{mode}.k", "--dropped", f"{mode}.d", "--mode", mode)
        result = json.loads(command("filter", *flags, cwd=tmp_path, check=0).stdout)
        kept, dropped = (
            list(iter_trajectories(tmp_path / f"{mode}.k")),
            list(iter_trajectories(tmp_path / f"{mode}.d")),
        )
        assert len(kept) == result["kept"] and len(dropped) == result["dropped"] and len(kept) + len(dropped) == 12
        assert all(t.dropped for t in dropped) and not any(t.dropped for t in kept)
        assert mode != "none" or len(kept) == 12
        whole = sorted_lines(tmp_path / f"{mode}.k", tmp_path / f"{mode}.d")
        part = (tmp_path / f"{mode}.d").read_bytes()
        (tmp_path / f"{mode}.d").write_bytes(part[: len(part) // 2])
        command("filter", *flags, cwd=tmp_path, check=0)
        assert sorted_lines(tmp_path / f"{mode}.k", tmp_path / f"{mode}.d") == whole
        other = command("filter", *flags[:-1], "both" if mode == "none" else "none", cwd=tmp_path)
        assert f"was begun with --mode {mode}" in one_line(other, 2)
        assert sorted_lines(tmp_path / f"{mode}.k", tmp_path / f"{mode}.d") == whole


def test_bad_input_is_one_line_and_loses_nothing(trajectories, tmp_path, tiny_folder):
    lines = trajectories.read_bytes().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(lines[0] + lines[1].replace(b'"steps"', b'"stairs"'))
    assert "bad.jsonl:2: does not match its digest" in one_line(command("filter", "--data", bad, cwd=tmp_path))
    bad.write_bytes(lines[0] + unseal(lines[1]).replace(b'"steps"', b'"stairs"'))  # as one edits it
    named = "bad.jsonl:2: Object missing required field `steps`"
    assert named in one_line(command("filter", "--data", bad, cwd=tmp_path))
    assert named in one_line(command("train", "--data", bad, "--model", tiny_folder, cwd=tmp_path))
    assert "no such file" in one_line(command("filter", "--data", "absent.jsonl", cwd=tmp_path))
    (tmp_path / "empty.jsonl").touch()
    assert "at least one" in one_line(command("train", "--data", "empty.jsonl", "--model", tiny_folder, cwd=tmp_path))
    assert "no such model folder" in one_line(command("train", "--model", tmp_path / "nowhere", cwd=tmp_path))
    assert "--updates 0: expected at least 1" in one_line(command("train", "--updates", "0", cwd=tmp_path), 2)
    (tmp_path / "c.json").write_text('{"updates": 0}')
    assert "--updates 0" in one_line(command("train", "--config", "c.json", cwd=tmp_path), 2)
    assert "expected" in one_line(command("evaluate", "--task", "trivia", cwd=tmp_path), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, device", [("train", "cuda:99"), ("generate", "foo"), ("evaluate", "meta")])
def test_a_device_that_is_not_there_is_one_line(name, device, tmp_path):
    assert f"--device {device}: " in one_line(command(name, "--device", device, cwd=tmp_path), 2)
    assert not (tmp_path / "run").exists() and not (tmp_path / "trajectories.jsonl").exists()


@pytest.mark.parametrize("device", ["", "foo", "cuda:", "cuda:-1", "cuda:x", "cuda:99", "cpu:0", "mps"])
def test_devices_that_there_are_none_of(device):
    with pytest.raises(ConfigError, match=f"--device {device}: "):
        opening.device_for(device)
    assert opening.device_for("auto") in ("cpu", "cuda")


def test_cuda_on_a_machine_without_it_is_one_line(tmp_path):
    done = command("train", "--device", "cuda", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert "--device cuda: torch " in one_line(done, 2) and "finds 0 CUDA devices here" in done.stderr


def test_an_unknown_config_key_is_named(tmp_path):
    (tmp_path / "c.json").write_text('{"updates": 2, "learning_rat": 1}')
    assert "learning_rat" in one_line(command("train", "--config", "c.json", cwd=tmp_path), 2)
    (tmp_path / "c.json").write_text('{"updates": "many"}')
    assert "updates" in one_line(command("train", "--config", "c.json", cwd=tmp_path), 2)
    (tmp_path / "c.json").write_text('{"num_questions": 2, "endpoint": {"concurency": 1}}')
    assert "endpoint.concurency" in one_line(command("generate", "--config=c.json", cwd=tmp_path), 2)
    (tmp_path / "c.json").write_text('{"num_questions": "many"}')
    assert "key 'num_questions'" in one_line(command("generate", "--config=c.json", cwd=tmp_path), 2)
    (tmp_path / "c.json").write_text('{"samples": 2}')
    assert "--samples 2: all the same" in one_line(command("evaluate", "--config", "c.json", cwd=tmp_path), 2)


def test_a_truncated_checkpoint_and_a_foreign_tokenizer_are_refused(tiny_folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert weights.name in one_line(command("train", "--smoke", "--model", broken, cwd=tmp_path))
    foreign = tmp_path / "foreign"
    shutil.copytree(tiny_folder, foreign)
    config = json.loads((foreign / "config.json").read_text())
    from benchmarks.almanac_base import learn_tokenizer

    learn_tokenizer(("bridge",), 900, seed=1, num=200).save_pretrained(foreign)
    assert config["vocab_size"] == 512
    assert "token" in one_line(command("train", "--smoke", "--model", foreign, cwd=tmp_path))


def test_a_folder_that_is_no_run_is_never_written_into(tmp_path, tiny_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    done = command("train", "--smoke", "--model", tiny_folder, cwd=tmp_path)
    assert "is no run" in one_line(done, 2)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def recorded(trajectories, path):
    """The fixture's trajectories with rewards, as a user's own data would carry them: actions that do something."""
    did = {"call": Call("answer", "something"), "invalid": None, "truncated": False}
    with open(path, "wb") as file:
        for number, t in enumerate(read_trajectories(trajectories)):
            steps = tuple(replace(step, reward=float((number + k) % 2), **did) for k, step in enumerate(t.steps))
            file.write(encode_trajectory(replace(t, steps=steps)))
    return path


SMALL = ("--updates", 2, "--evaluate-num-questions", 4, "--trajectories-per-update", 4, "--max-new-tokens", 8)


def test_train_on_recorded_actions_alone_and_on_two_ranks(trajectories, tiny_folder, tmp_path):
    import torch
    from safetensors.torch import load_file

    data = recorded(trajectories, tmp_path / "data.jsonl")
    flags = ("--data", data, "--model", tiny_folder, "--mode", "recorded", *SMALL)
    done = command("train", "--packed", "--out", "one", "--track", "tensorboard", *flags, cwd=tmp_path, check=0)
    assert "bridge" in done.stdout and max(map(len, done.stdout.splitlines()[:-1])) <= 80
    updates = [line.split()[:2] for line in done.stderr.splitlines() if line.startswith("train ")]
    assert updates == [["train", "1/2"], ["train", "2/2"]]  # off a terminal one line an update
    assert any((tmp_path / "one" / "tensorboard").iterdir())
    assert "| updates | 2 of 2 |" in (tmp_path / "one" / "checkpoint" / "README.md").read_text()
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    wanted = (
        "accuracy_before accuracy_after relative_gain good_steps_before good_steps_after updates tokens_per_s wall_s "
        "peak_rss_bytes seed commit"
    )
    assert set(wanted.split()) <= set(summary) and summary["updates"] == 2
    assert (tmp_path / "one" / "report.html").read_text().startswith("<!doctype html>")
    assert len((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()) == 2

    command("train", "--no-packed", "--out", "separate", *flags, cwd=tmp_path, check=0)
    ranks = run_ranks(2, "swirl.train", "--packed", "--out", "two", *flags, cwd=tmp_path)
    assert [done.returncode for done in ranks] == [0, 0], ranks[0].stderr[-3000:]
    assert [done.stdout.count("GOOD steps") for done in ranks] == [1, 0]
    one = load_file(tmp_path / "one" / "checkpoint" / "model.safetensors")
    start = load_file(tiny_folder / "model.safetensors")
    assert any(not torch.equal(one[name], start[name]) for name in one)
    for other in ("separate", "two"):
        weights = load_file(tmp_path / other / "checkpoint" / "model.safetensors")
        for name, weight in one.items():
            # Adam's first steps divide by the gradient's own size: where it is rounding noise, so is the step
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=2e-5)


def test_an_earlier_run_is_set_aside_whole(trajectories, tiny_folder, tmp_path):
    data = recorded(trajectories, tmp_path / "data.jsonl")
    flags = ("--data", data, "--model", tiny_folder, "--mode", "recorded", *SMALL)
    command("train", *flags, cwd=tmp_path, check=0)
    first = (tmp_path / "run" / "summary.json").read_text()
    done = command("train", *flags, "--config", tmp_path / "run" / "config.json", cwd=tmp_path, check=0)
    assert "set aside" in done.stderr and (tmp_path / "run.1" / "summary.json").read_text() == first
    command("report", "run.1", cwd=tmp_path, check=0)


def test_a_reward_that_is_none_is_refused_before_the_run(trajectories, tiny_folder, tmp_path):
    data = recorded(trajectories, tmp_path / "data.jsonl")
    data.write_bytes(data.read_bytes().replace(b'"reward":1.0', b'"reward":1e300'))
    flags = ("--data", data, "--model", tiny_folder, "--mode", "recorded", *SMALL)
    assert "field 'steps[0].reward'" in one_line(command("train", *flags, cwd=tmp_path))
    assert not (tmp_path / "run").exists()


def test_the_whole_way_in_miniature(tmp_path):
    done = command("train", "--packed", "--smoke", cwd=tmp_path, check=0)
    for family in ("bridge", "deep", "counterfactual", "mixed", "arithmetic"):
        assert family in done.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {
        "config.json",
        "trajectories.jsonl",
        "kept.jsonl",
        "metrics.jsonl",
        "summary.json",
        "report.html",
    } <= names
    done = command(
        "evaluate", "--policy", "run/checkpoint", "--num-questions", 5, "--task", "bridge", cwd=tmp_path, check=0
    )
    assert json.loads(done.stdout)["task"] == "bridge"


def test_evaluate_makes_the_folder_it_writes_into(tiny_folder, tmp_path):
    flags = ("--policy", tiny_folder, "--task", "bridge", "--num-questions", 3, "--max-new-tokens", 4)
    done = command("evaluate", *flags, "--out", "new/folder/t.jsonl", cwd=tmp_path, check=0)
    assert json.loads(done.stdout)["questions"] == 3
    assert len(read_trajectories(tmp_path / "new" / "folder" / "t.jsonl")) == 3
    refused = command("evaluate", *flags, "--out", "new", cwd=tmp_path)
    assert "is a folder" in one_line(refused, 2) and refused.stdout == ""


def test_evaluate_shows_the_scores_where_the_trajectories_cannot_be_written(tiny_folder, tmp_path):
    out = "t" * 244 + ".jsonl"  # a name with no room for that of the file which is written aside
    flags = ("--policy", tiny_folder, "--task", "bridge", "--num-questions", 3, "--max-new-tokens", 4)
    done = command("evaluate", *flags, "--out", out, "--cache", "answers.sqlite", cwd=tmp_path)
    assert "t.jsonl" in one_line(done) and json.loads(done.stdout)["questions"] == 3


def test_the_converter_of_gsm8k_feeds_the_trainer(tmp_path):
    source = ROOT / "tests" / "fixtures" / "gsm8k.jsonl"
    assert run_module("swirl.tasks.gsm8k", source, "g.jsonl", cwd=tmp_path).returncode == 0
    done = command("train", "--packed", "--data", "g.jsonl", *SMALL, cwd=tmp_path, check=0)
    assert "mode recorded, reward recorded" in done.stderr
