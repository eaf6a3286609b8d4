"""A config mistake is one line on stderr and exit code 2: in every command, be it a flag, a key or a name."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from swirl.app import command
from swirl.config import TrainConfig
from swirl.errors import ConfigError
from swirl.evaluate import EvaluateConfig
from swirl.filter import FilterConfig
from swirl.generate import GenerateConfig
from tests.process import run_ranks

ROOT = Path(__file__).parents[2]
HOTPOTQA = ("--task", "hotpotqa", "--questions", ROOT / "tests" / "fixtures" / "hotpotqa.json")
MISTAKES = {
    "generate": [
        ("--samples", 0),
        ("--samples", "many"),
        ("--samples",),
        ("--no-such-flag",),
        ("--max-steps", 0),
        ("--temperature", -1),
        ("--task", "nonsense"),
        ("--tool", "nonsense"),
        ("--task", "bridge", "--questions", "q.json"),
        ("--out", "."),
        ("--cache", "."),
        ("--policy", "http://127.0.0.1:9/v1"),
        ("--tokenizer", "folder"),
        ("--device", "nonsense"),
        ("--config", "absent.json"),
        ("--config", "unknown.json"),
        ("--config", "torn.json"),
    ],
    "filter": [
        ("--votes", 0),
        ("--judge", "nonsense"),
        ("--outcome-judge", "nonsense"),
        ("--reward-judge", "nonsense"),
        ("--judge", "almanac_judge.py:absent"),
        ("--kept", "trajectories.jsonl"),
        ("--kept", "."),
        ("--dropped", "."),
        ("--data", "."),
        ("--config", "unknown.json"),
    ],
    "evaluate": [
        ("--samples", 2),
        ("--task", "nonsense"),
        ("--out", "."),
        (*HOTPOTQA, "--judge", "rule"),
        ("--judge", "nonsense"),
        ("--config", "unknown.json"),
    ],
    "train": [
        ("--updates", 0),
        ("--learning-rate", "nan"),
        ("--task", "nonsense"),
        ("--evaluate-on", "nonsense"),
        ("--judge", "nonsense"),
        ("--reward", "nonsense"),
        ("--tool", "nonsense"),
        ("--mode", "imitation", "--reward", "rule"),
        ("--task", "hotpotqa"),
        (*HOTPOTQA, "--judge", "rule", "--reward", "http://127.0.0.1:9/v1#m"),
        ("--device", "nonsense"),
        ("--out", "torn.json"),
        ("--tool", "absent.py:tool"),
        ("--task", "absent.py:task"),
        ("--attention", "fast"),
        ("--config", "unknown.json"),
    ],
    "report": [("--no-such-flag",), ("--out", "."), ("--serve", "--port", "99999"), ("--config", "unknown.json")],
    "plan": [("--no-such-flag",), ("--tokens", "0"), ("--gpus", "-1"), ("--memory-gb", "0"), ("--lora", "-1")],
    "export": [("--no-such-flag",), ("--config", "unknown.json")],
    "serve": [("--port", "99999"), ("--dtype", "nonsense"), ("--device", "nonsense"), ("--config", "unknown.json")],
}


@pytest.mark.parametrize(
    "name, flags", [(name, flags) for name, each in MISTAKES.items() for flags in each], ids=lambda x: str(x)[:60]
)
def test_a_config_mistake_is_one_line_and_exit_code_2(name, flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("trajectories.jsonl").touch()
    Path("unknown.json").write_text('{"learning_rat": 1}')
    Path("torn.json").write_text('{"updates": ')
    before = sorted(Path().iterdir())
    monkeypatch.setattr(sys, "argv", [f"swirl {name}", *map(str, flags)])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"swirl.{name}").run_command()
    said = capfd.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2 and len(errors) == 1 and "Traceback" not in said.err and said.out == "", said.err
    assert not (Path("run") / "config.json").exists() and set(before) <= set(Path().iterdir())


@pytest.mark.parametrize("name", ["train", "generate", "evaluate"])
@pytest.mark.parametrize(
    "task, said",
    [
        (["nonsense"], "task 'nonsense' is unknown: "),
        (["bridge", "nonsense"], "task 'nonsense' is unknown: "),
        (["absent.py:task"], "--task absent.py:task: no such file"),
        (["gsm8k"], "task 'gsm8k' needs --questions"),
    ],
    ids=str,
)
def test_a_wrong_task_is_told_as_that_by_every_command(name, task, said, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"swirl {name}", "--task", *task])
    with pytest.raises(SystemExit):
        importlib.import_module(f"swirl.{name}").run_command()
    assert capfd.readouterr().err.startswith(f"error: {said}")


def test_a_flag_that_is_misspelt_is_answered_with_the_one_that_was_meant(tmp_path):
    with pytest.raises(ConfigError) as error:
        command.parse(TrainConfig, "", ["--attentoin", "tree"])
    assert str(error.value) == "Unrecognized options: --attentoin, tree; perhaps --attention was meant"
    with pytest.raises(ConfigError, match="^invalid choice 'fast' for argument '--attention'. Expected one of .*[.]$"):
        command.parse(TrainConfig, "", ["--attention", "fast"])


def test_every_rank_says_the_same_line_and_exits_2(tmp_path):
    for done in run_ranks(2, "swirl.train", "--task", "hotpotqa", cwd=tmp_path):
        assert (done.returncode, done.stdout) == (2, "")
        said = "error: task 'hotpotqa' needs --questions or --evaluate-questions, files of the data set\n"
        assert done.stderr == said


@pytest.mark.parametrize("kind", [TrainConfig, FilterConfig, GenerateConfig, EvaluateConfig])
def test_flags_come_in_groups_with_a_sentence_and_stay_flat_in_files(kind, tmp_path, capsys):
    """Every field is shown once, with its group's sentence above and its own text beside; a file has flat keys."""
    with pytest.raises(SystemExit):
        command.parse(kind, "", ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group in kind.__mro__[1:-1]:
        assert " ".join(group.__doc__.split())[:50] in shown
    assert not [field.name for field in fields(kind) if f"--{field.name.replace('_', '-')}" not in shown]
    (tmp_path / "c.json").write_bytes(command.config_to_json(kind(in_flight=7)))
    assert {"in_flight", "device", "dtype"} <= json.loads((tmp_path / "c.json").read_text()).keys()
    made = command.parse(kind, "", ["--config", str(tmp_path / "c.json"), "--endpoint.concurrency", "3"])
    assert (made.in_flight, made.endpoint.concurrency) == (7, 3)
    assert asdict(made) | {"in_flight": 0, "endpoint": 0} == asdict(kind()) | {"in_flight": 0, "endpoint": 0}


def test_the_config_of_an_earlier_run_still_serves(tmp_path):
    (tmp_path / "config.json").write_text('{"updates": 3, "recompute": true, "task": ["deep"]}')
    made = command.parse(TrainConfig, "", ["--config", str(tmp_path / "config.json")])
    assert made == TrainConfig(updates=3, activation_checkpointing="layers", task=("deep",))
