"""Flips and truncations of every kind of file that swirl writes: told in one line, or nothing that is read has changed.

    python -m tests.drills damaged_files

Each kind is written as the commands do, damaged in one place (a bit flipped, or its end cut off), and read as they do.
A SwirlError of one line, or a warning, tells. Without either, what is read must be what was written. Answers and
checkpoints have drills of their own. Not told by design is a JSONL file whose last lines are gone, each of them whole.
"""

from __future__ import annotations

import asyncio
import io
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from swirl.app import command, resolve
from swirl.app.report.build import write_report
from swirl.config import TrainConfig
from swirl.errors import SwirlError
from swirl.generate import GenerateConfig
from swirl.model.gemma import Gemma
from swirl.model.lora import LoRA, add_lora, save_adapter
from swirl.tools.retrieval import DenseSearchTool, build_dense_index
from swirl.tools.search import Page, build_index, open_index
from swirl.train import train
from swirl.trajectories.files import TrajectoryFiles
from swirl.trajectories.formats import to_messages
from swirl.trajectories.log import TrajectoryLog, iter_trajectories, read_trajectories, write_trajectories
from swirl.trajectories.rows import read_rows, write_rows
from tests.drills.resume_drill import config_in, make_inputs, tiny_model, trajectories_of
from tests.drills.table import Row

LONGEST_S = 20.0
PAGES = [Page(title=f"page {k}", text=f"{k} is {k * k} and {'abcdefgh'[k % 8] * 3}") for k in range(40)]


@dataclass(frozen=True)
class Kind:
    """`files` of a folder that are damaged in turn; `read(folder)` must give the same each time, or tell."""

    name: str
    files: list[str]
    read: Callable[[Path], object]


def damaged(content: bytes, draw: random.Random, *, lines: bool) -> tuple[bytes, str]:
    """One bit flipped, or in one of five cases the end cut off, and where; of `lines` none is left out whole."""
    at = draw.randrange(len(content))
    if draw.random() < 0.2 and not (lines and (at == 0 or b"\n" in content[at - 1 : at + 1])):
        return content[:at], f"cut at byte {at}"
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :], f"flip at byte {at}"


def became(kind: Kind, folder: Path, wanted: object) -> str:
    """What came of reading: told, the same, or failed."""
    said, began = io.StringIO(), time.monotonic()
    try:
        with redirect_stderr(said):
            found = kind.read(folder)
    except SwirlError as error:
        return "told" if "\n" not in str(error) else "failed: more than a line"
    except OSError as error:  # as command.run shows it
        return f"told by the system: {type(error).__name__}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"[:200]
    if time.monotonic() - began > LONGEST_S:
        return "failed: it took too long"
    if found == wanted:
        return "the same"
    return "told" if "warning" in said.getvalue() else "failed: changed unseen"


def drill_kind(kind: Kind, folder: Path, count: int, draw: random.Random) -> Row:
    wanted, outcomes, examples = kind.read(folder), Counter(), []
    for number in range(count):
        path = folder / kind.files[number % len(kind.files)]
        content = path.read_bytes()
        damage, where = damaged(content, draw, lines=path.suffix == ".jsonl")
        path.write_bytes(damage)
        outcome = became(kind, folder, wanted)
        if outcome.startswith("failed"):
            examples.append(f"{path.name}, {where}: {outcome}")
        outcomes[outcome.partition(":")[0]] += 1
        path.write_bytes(content)
    told = ", ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common())
    return Row(f"damage: {kind.name}", count, outcomes["failed"], "; ".join([told, *examples[:3]]))


def every_file(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def trajectories(folder: Path) -> Kind:
    write_trajectories(folder / "t.jsonl", trajectories_of(30))
    return Kind(
        "trajectories",
        ["t.jsonl"],
        lambda folder: (read_trajectories(folder / "t.jsonl"), list(TrajectoryFiles([folder / "t.jsonl"]))),
    )


def log_of_a_command(folder: Path) -> Kind:
    """What is left of a log that is gone on with must be whole trajectories of it: the others are made again."""
    write_trajectories(folder / "log.jsonl", trajectories_of(30))
    written = {one.id: one for one in iter_trajectories(folder / "log.jsonl")}

    def read(folder: Path) -> bool:
        with TrajectoryLog(folder / "log.jsonl") as log:
            done = set(log.done)
        left = list(iter_trajectories(folder / "log.jsonl"))
        return {one.id for one in left} == done and all(one == written[one.id] for one in left)

    return Kind("a log that is gone on with", ["log.jsonl"], read)


def settings(folder: Path) -> Kind:
    """They must refuse another seed, unless their own damage is told."""
    (folder / "t.jsonl").write_text("{}\n")
    config = GenerateConfig(out=folder / "t.jsonl")

    def check(config: GenerateConfig) -> None:
        command.refuse_other_settings(config, [config.out], may_change=("out",), known_as={})

    def read(folder: Path) -> str:
        try:
            check(replace(config, seed=config.seed + 1))
        except SwirlError:
            check(config)
            return "another seed is refused"
        return "another seed is taken"

    check(config)
    return Kind("settings", ["t.jsonl.settings.json"], read)


def config_of_a_run(folder: Path) -> Kind:
    (folder / "config.json").write_bytes(command.config_to_json(TrainConfig(seed=3)))
    return Kind(
        "config.json", ["config.json"], lambda folder: command.config_from_json(folder / "config.json", TrainConfig)
    )


def report(folder: Path) -> Kind:
    """Of all that a run leaves beside its checkpoints."""
    make_inputs(folder, tiny_model(folder / "made"), trajectories_of(12))
    told = {"evaluate_on": ("bridge",), "evaluate_num_questions": 2, "max_new_tokens": 8}
    config = config_in(folder, 3, out=folder / "run", **told)
    with redirect_stderr(io.StringIO()):
        train(config)
    left = [f"run/{name}" for name in every_file(folder / "run") if name.endswith((".json", ".jsonl"))]
    return Kind("what a report shows", left, lambda folder: write_report([folder / "run"]).read_bytes())


def loaded(folder: Path) -> tuple:
    model, tokenizer = resolve.load_model(str(folder))
    weights = {name: weight.numpy().tobytes() for name, weight in model.state_dict().items()}
    return weights, model.config, getattr(model, "lora", None), tokenizer.fingerprint


def model(folder: Path) -> Kind:
    tiny_model(folder / "model")
    return Kind("a model", [f"model/{name}" for name in every_file(folder / "model")], lambda at: loaded(at / "model"))


def adapter(folder: Path) -> Kind:
    base = Gemma.from_pretrained(tiny_model(folder / "base"))
    save_adapter(add_lora(base, LoRA(4, 8.0)), folder / "adapter")
    names = [f"adapter/{name}" for name in every_file(folder / "adapter")]
    return Kind("an adapter", names, lambda folder: loaded(folder / "adapter"))


def rows(name: str) -> Callable[[Path], Kind]:
    def make(folder: Path) -> Kind:
        write_rows(folder / name, map(to_messages, trajectories_of(30)), "messages")
        return Kind(f"rows, {Path(name).suffix[1:]}", [name], lambda folder: list(read_rows(folder / name)))

    return make


def index(folder: Path) -> Kind:
    build_index(PAGES, folder / "index")
    names = [f"index/{name}" for name in every_file(folder / "index")]

    def read(folder: Path) -> list:
        opened = open_index(folder / "index")
        return [opened.search(page.text, 3) for page in PAGES]

    return Kind("an index", names, read)


async def embed(texts: list[str]) -> list[list[float]]:
    return [[float(np.cos(len(text) * k + ord(text[0]))) for k in range(8)] for text in texts]


def dense_index(folder: Path) -> Kind:
    asyncio.run(build_dense_index(PAGES, folder / "dense", embed))
    names = [f"dense/{name}" for name in every_file(folder / "dense")]

    def read(folder: Path) -> list:
        opened = DenseSearchTool(folder / "dense", embed)
        return [asyncio.run(opened.search(page.text, 3)) for page in PAGES[:5]]

    return Kind("an index of vectors", names, read)


KINDS = (trajectories, log_of_a_command, settings, config_of_a_run, report, model, adapter, rows("r.parquet"),
         rows("r.jsonl"), index, dense_index)  # fmt: skip


def drill(seed: int, count: int = 1000) -> Iterator[Row]:
    """So many of each kind."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    for make in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            yield drill_kind(make(Path(folder)), Path(folder), count, draw)
