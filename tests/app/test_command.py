"""Settings beside an output: they refuse others, and their own damage is told. And what `--help` says of a command."""

from dataclasses import replace

import pytest

from swirl.__main__ import COMMANDS
from swirl.app import command
from swirl.errors import ConfigError
from swirl.generate import GenerateConfig
from tests.process import run_module


def check(config: GenerateConfig) -> None:
    command.refuse_other_settings(config, [config.out], may_change=("out",), known_as={})


def test_a_settings_file_cut_anywhere_is_told(tmp_path):
    config = GenerateConfig(out=tmp_path / "t.jsonl")
    check(config)
    config.out.write_text("{}\n")
    with pytest.raises(ConfigError, match="begun with --seed"):
        check(replace(config, seed=config.seed + 1))
    beside = tmp_path / "t.jsonl.settings.json"
    whole = beside.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        beside.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="settings.json: (expected a JSON object|does not match)"):
            check(config)


@pytest.mark.parametrize("module", [*(f"swirl.{name}" for name in COMMANDS), "swirl.app.formats"])
def test_help_names_the_module_and_leaves_each_example_on_its_line(module, tmp_path):
    done = run_module(module, "--help", cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    usage, *about = done.stdout.partition("╭")[0].splitlines()
    assert usage.startswith(f"usage: python -m {module} ")
    examples = [line for line in about if "python -m swirl" in line]
    assert all(line.startswith("  ") and line.count("python -m swirl") == 1 for line in examples)
