"""How the data sets are read: bounded memory, and errors that name file, line and field."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from swirl.errors import ConfigError, InputError
from swirl.tools.search import Page
from swirl.trajectories.log import read_lines
from swirl.trajectories.record import Question

Record = TypeVar("Record")

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)  # bytes that are no UTF-8 are not wrapped by msgspec


def _input_error(path, error: Exception, line: int | None, field: str = "") -> InputError:
    if isinstance(error, msgspec.ValidationError):
        message, _, where = str(error).partition(" - at `$")
        return InputError(path, message, line=line, field=(field + where.rstrip("`")).strip(".") or None)
    return InputError(path, f"expected JSON ({error})", line=line, field=field or None)


def each_once(pages: Iterable[Page]) -> Iterator[Page]:
    """The pages without repeats, in order of first appearance; a hash is remembered, not the page."""
    seen = set()
    for page in pages:
        if hash(page) not in seen:
            seen.add(hash(page))
            yield page


def read_jsonl(path: str | os.PathLike, kind: type[Record]) -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of a JSONL file, streamed. Raises InputError; an empty file is one too."""
    decoder = msgspec.json.Decoder(kind)
    number = 0
    for number, line in read_lines(path):
        try:
            yield number, decoder.decode(line)
        except UNREADABLE as error:
            raise _input_error(path, error, number) from None
    if number == 0:
        raise InputError(path, "expected at least one line, the file is empty")


class _Data(msgspec.Struct):
    data: list[msgspec.Raw]


def read_array(path: str | os.PathLike, kind: type[Record], *, key: bool = False) -> Iterator[Record]:
    """The records of one JSON array, or with `key` of the array under "data".

    The file is mapped and its records are decoded one at a time, so that memory holds none but the one at
    hand. Raises InputError naming the record and its field; an empty array is one too.
    """
    decoder = msgspec.json.Decoder(kind)
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise InputError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        records = msgspec.json.decode(mapped, type=_Data if key else list[msgspec.Raw])
    except UNREADABLE as error:
        raise _input_error(path, error, None) from None
    records = records.data if key else records
    if not records:
        raise InputError(path, "expected at least one record, the array is empty")
    for i, record in enumerate(records):
        try:
            yield decoder.decode(record)
        except UNREADABLE as error:
            raise _input_error(path, error, None, f"data[{i}]" if key else f"[{i}]") from None


def golden_answers(question: Question) -> list[str]:
    """The answer and its aliases. Raises ConfigError where the question has none to score against."""
    if question.answer is None:
        raise ConfigError(f"question {question.id} has no golden answer to score against")
    return [question.answer, *question.aliases]
