"""A run's folder is one run's; nothing that is not a run's is ever moved; a run goes on only as it was begun."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from swirl.app import run_folder
from swirl.app.run_folder import RunFolder, open_run, settings_of
from swirl.config import TrainConfig, settled, sized
from swirl.errors import CheckpointError, ConfigError
from swirl.export import ExportConfig, export
from swirl.learning.checkpoints import open_checkpoint, snapshot_of
from swirl.storage.digest import unseal
from tests.learning.test_checkpoints import made, step

STATELESS = SimpleNamespace(state_tensors=dict)  # an objective without a proximal policy


def opened(config):
    with open_run(config, settings_of(config)) as run:
        return run


@pytest.fixture
def config(tmp_path):
    return sized(settled(TrainConfig(out=tmp_path / "run", updates=9), None), 0)


def save(config, run, updates):
    """Checkpoints after each of these updates, with a line of metrics for each update so far."""
    model, optimizer = made()
    for update in range(1, max(updates) + 1):
        step(model, optimizer, update)
        run.append("metrics.jsonl", {"update": update})
        if update in updates:
            state = {"settings": settings_of(config), "logs": {name: list(lines) for name, lines in run.logs.items()}}
            run._save_now(snapshot_of(model, optimizer, STATELESS, None, update, state))


def test_an_earlier_run_is_set_aside_whole(config, capsys):
    opened(config).append("metrics.jsonl", {"update": 1})
    opened(config)
    opened(config)
    aside = [config.out.with_name(f"run.{number}") for number in (1, 2)]
    assert (aside[0] / "metrics.jsonl").exists() and not (config.out / "metrics.jsonl").exists()
    assert f"set aside as {aside[1]}" in capsys.readouterr().err
    assert json.loads((config.out / "config.json").read_text())["updates"] == 9


def test_what_is_no_run_is_not_moved(config):
    config.out.mkdir()
    for name, text in (("notes.txt", "mine"), ("config.json", '{"model_type": "gemma2"}')):
        (config.out / name).write_text(text)
        for resume in (None, "auto"):
            with pytest.raises(ConfigError, match="is no run of swirl; name another folder"):
                opened(replace(config, resume=resume))
    assert sorted(os.listdir(config.out)) == ["config.json", "notes.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        opened(replace(config, out=config.out / "notes.txt"))


def test_what_this_run_needs_is_not_set_aside(config, monkeypatch):
    opened(config)
    (config.out / "kept.jsonl").touch()
    (config.out / "checkpoint").mkdir()
    for flags, what in (
        ({"data": config.out / "kept.jsonl"}, "--data"),
        ({"model": str(config.out / "checkpoint")}, "--model"),
    ):
        with pytest.raises(ConfigError, match=f"{what} .* lies in it"):
            opened(replace(config, **flags))
    for folder, out in ((config.out, "."), (config.out / "checkpoint", "..")):
        monkeypatch.chdir(folder)
        with pytest.raises(ConfigError, match="the folder that this command runs in lies in it"):
            opened(replace(config, out=type(config.out)(out)))
    assert sorted(os.listdir(config.out)) == ["checkpoint", "config.json", "kept.jsonl"]


def test_a_link_is_followed_and_not_renamed(config, tmp_path):
    opened(config)
    link = tmp_path / "link"
    link.symlink_to(config.out)
    opened(replace(config, out=link))
    assert link.is_symlink() and (tmp_path / "run.1").is_dir() and (config.out / "config.json").exists()


def test_of_two_trainers_in_one_folder_one_is_refused(config):
    """However their steps interleave: both begin at once, many times."""
    for _ in range(30):
        outcomes, barrier, both = [], threading.Barrier(2), threading.Barrier(2)

        def work(name, barrier=barrier, both=both, outcomes=outcomes):
            barrier.wait()
            try:
                with open_run(replace(config, seed=name), {}) as run:
                    outcomes.append(name)
                    run.append("metrics.jsonl", {"seed": name})
                    both.wait()
            except ConfigError:
                both.wait()

        threads = [threading.Thread(target=work, args=(name,)) for name in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = outcomes
        assert json.loads((config.out / "config.json").read_text())["seed"] == winner
        assert len((config.out / "metrics.jsonl").read_bytes().splitlines()) == 1


def test_a_run_goes_on_with_the_lines_its_checkpoint_knows(config, capsys):
    save(config, opened(config), (2, 4))
    with open(config.out / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": 5}\n{"upda')
    run = opened(replace(config, resume="auto", save_minutes=1.0))
    assert run.resumed.update == 4 and "going on after update 4" in capsys.readouterr().err
    lines = [json.loads(unseal(line)) for line in (config.out / "metrics.jsonl").read_bytes().splitlines()]
    assert lines == run.logs["metrics.jsonl"] == [{"update": update} for update in (1, 2, 3, 4)]


def test_a_damaged_checkpoint_is_left_out_and_kept_aside(config, capsys):
    save(config, opened(config), (2, 4))
    state = config.out / "checkpoint-4" / "training.json"
    state.write_bytes(state.read_bytes()[:-5])
    run = opened(replace(config, resume="auto"))
    said = capsys.readouterr().err
    assert run.resumed.update == 2 and "checkpoint-4: training.json does not match its digest" in said
    assert "checkpoint-4.aside-1" in said and (config.out / "checkpoint-4.aside-1").is_dir()
    with pytest.raises(CheckpointError, match="training.json does not match"):
        opened(replace(config, resume=str(config.out / "checkpoint-4.aside-1")))


def test_an_earlier_checkpoint_can_be_named(config, tmp_path):
    save(config, opened(config), (2, 4))
    elsewhere = replace(config, out=tmp_path / "other", resume=str(config.out / "checkpoint-2"))
    assert opened(elsewhere).resumed.update == 2 and (config.out / "checkpoint-4").is_dir()
    assert opened(replace(config, resume=str(config.out / "checkpoint-2"))).resumed.update == 2
    assert not (config.out / "checkpoint-4").exists() and (config.out / "checkpoint-4.aside-1").is_dir()


def test_other_settings_are_refused_by_name(config):
    save(config, opened(config), (2,))
    again = replace(config, resume="auto", save_every=7, keep=9, device="cpu", evaluate_every=3)
    assert opened(again).resumed.update == 2
    for changed, flag in (
        ({"learning_rate": 0.5}, "learning-rate 0.0001, not 0.5"),
        ({"updates": 10}, "updates 9, not 10"),
    ):
        with pytest.raises(ConfigError, match=f"checkpoint-2 was made with --{flag}"):
            opened(replace(again, **changed))
    with (
        pytest.raises(ConfigError, match="made with --data not known, not abc"),
        open_run(again, settings_of(again, data="abc")),
    ):
        pass


def test_auto_starts_where_there_is_nothing_to_go_on_from(config):
    assert opened(replace(config, resume="auto")).resumed is None
    run = opened(replace(config, resume="auto"))
    assert run.resumed is None and sorted(os.listdir(config.out.parent)) == ["run"]


def test_saves_are_due_by_updates_and_by_minutes(config, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    model, optimizer = made()

    def saved(run, moments):
        done = []
        for update, minute in enumerate(moments):
            now[0] = 60.0 * minute
            run.save_if_due(update, lambda update=update: snapshot_of(model, optimizer, STATELESS, None, update, {}))
            run._writer.wait()
            if run._writer.last == update:
                done.append(update)
        return done

    assert saved(RunFolder(replace(config, out=opened(config).path)), [0, 4, 6, 7, 12]) == [2, 4]
    now[0] = 0.0
    assert saved(
        RunFolder(replace(config, out=opened(config).path, save_every=2, save_minutes=0.0)), range(0, 50, 10)
    ) == [2, 4]


def test_a_run_s_model_is_exported_at_any_time(config, tmp_path):
    run = opened(config)
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        export(ExportConfig(run=config.out, out=tmp_path / "model"))
    save(config, run, (2, 4))
    assert export(ExportConfig(run=config.out, out=tmp_path / "model")).name == "checkpoint-4"
    assert export(ExportConfig(run=config.out, out=tmp_path / "model", update=2)).name == "checkpoint-2"
    assert sorted(os.listdir(tmp_path / "model")) == [
        "README.md",
        "config.json",
        "digests.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with pytest.raises(ConfigError, match="--update 3: .* holds checkpoints of these updates: 2, 4"):
        export(ExportConfig(run=config.out, out=tmp_path / "model", update=3))
    for out, error in (
        (config.out, "not a checkpoint, so it is left as it is"),
        (tmp_path / "model" / "config.json", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=error):
            export(ExportConfig(run=config.out, out=out))
    assert open_checkpoint(config.out / "checkpoint-4").update == 4
