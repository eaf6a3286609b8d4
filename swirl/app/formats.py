"""Trajectories in other people's formats, both ways: chat messages with tool calls, TRL's stepwise rows, Parquet.

  python -m swirl.app.formats --data kept.jsonl --out messages.parquet

The formats: swirl/trajectories/formats.py. Token ids and their log-probs stay behind; the trainer tokenizes such text
once.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from swirl.app import command
from swirl.errors import ConfigError, InputError
from swirl.trajectories.formats import read_any, to_messages, to_trl
from swirl.trajectories.rows import Format, write_rows


@dataclass(frozen=True)
class FormatsConfig:
    data: Path = Path("trajectories.jsonl")
    """What to read; .parquet is Parquet, all else JSONL."""
    out: Path = Path("messages.jsonl")
    """What to write, replaced whole or not at all."""
    read: Format = "swirl"
    write: Format = "messages"


def main(config: FormatsConfig) -> None:
    if config.data.resolve() == config.out.resolve():
        raise ConfigError("--data and --out must be two different files")
    counts: Counter[str] = Counter()

    def rows():
        for trajectory in read_any(config.data, config.read):
            counts["read"] += 1
            if config.write == "swirl":
                yield msgspec.to_builtins(trajectory)
            elif config.write == "messages":
                yield to_messages(trajectory)
            elif (row := to_trl(trajectory)) is not None:
                yield row
            else:
                counts["left_out_unjudged"] += 1
        if not counts["read"]:
            raise InputError(config.data, "expected at least one trajectory, the file is empty")

    try:
        written = write_rows(config.out, rows(), config.write)
    except OSError as error:
        raise ConfigError(f"{config.out}: cannot be written ({error.strerror or error})") from None
    sys.stdout.write(msgspec.json.encode({"written": written, **counts}).decode() + "\n")


if __name__ == "__main__":
    command.run(main, FormatsConfig, __doc__)
