"""Settings beside an output: they refuse others, and their own damage is told."""

from dataclasses import replace

import pytest

from swirl.app import command
from swirl.errors import ConfigError
from swirl.generate import GenerateConfig


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
