"""Rows of a file, as dicts: JSON lines, or Parquet where the name ends in .parquet (needs pyarrow).

What swirl writes bears digests, checked on reading: each line of JSON its own, a Parquet file one of all its rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from swirl.errors import ConfigError, InputError
from swirl.storage.digest import FIELD, seal
from swirl.storage.files import replacing
from swirl.trajectories.log import read_lines

Format = Literal["swirl", "messages", "trl"]

_ROWS_PER_GROUP = 1000


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'swirl[parquet]'") from None
    return pyarrow


def _parquet_schema(pa, kind: Format):
    """The columns of a format."""
    text, texts = pa.string(), pa.list_(pa.string())
    if kind == "trl":
        fields = {"prompt": text, "completions": texts, "labels": pa.list_(pa.bool_()), "swirl": text}
    elif kind == "messages":
        function = pa.struct({"name": text, "arguments": text}.items())
        call = pa.struct({"id": text, "type": text, "function": function}.items())
        message = {
            "role": text,
            "content": text,
            "tool_calls": pa.list_(call),
            "tool_call_id": text,
            "name": text,
        }
        fields = {"id": text, "messages": pa.list_(pa.struct(message.items())), "tools": text, "swirl": text}
    else:
        number, ids = pa.int64(), pa.list_(pa.int64())
        question = {
            "id": text,
            "task": text,
            "question": text,
            "answer": text,
            "aliases": texts,
            "hops": number,
        }
        call = pa.struct({"tool": text, "argument": text}.items())
        step = {"action": text, "observation": text, "action_ids": ids, "observation_ids": ids}
        step |= {"log_probs": pa.list_(pa.float64()), "truncated": pa.bool_(), "call": call, "invalid": text}
        step |= {"stop_text": text}
        step |= {"verdict": text, "judged": text, "reason": text, "reward": pa.float64()}
        fields = {"id": text, "question": pa.struct(question.items()), "prompt": text}
        fields |= {
            "steps": pa.list_(pa.struct(step.items())),
            "stop": text,
            "sample": number,
            "prediction": text,
        }
        fields |= {"prompt_ids": ids, "tokenizer": text, "retokenized": pa.bool_(), "policy": text}
        fields |= {"outcome": pa.bool_(), "dropped": text, "tools": pa.map_(text, text), "schema": number}
    return pa.schema(fields.items())


def _without_none(value):
    """Parquet keeps an absent field as null; JSON leaves it out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def read_rows(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """(row number from 1, row) of a JSONL or Parquet file, streamed. Raises InputError."""
    if Path(path).suffix != ".parquet":
        for number, line in read_lines(path):
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(path, f"expected one JSON object a line ({error})", line=number) from None
            if not isinstance(row, dict):
                raise InputError(path, "expected one JSON object a line", line=number)
            yield number, row
        return
    yield from enumerate(_parquet_rows(path), 1)


def _parquet_rows(path: str | os.PathLike) -> Iterator[dict]:
    """Pages are held to their checksums, and where swirl wrote the file all rows to their digest, after the last."""
    pa = _pyarrow()
    rows_digest = hashlib.sha256()
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            claimed = (file.metadata.metadata or {}).get(FIELD.encode())
            decode = _json_decoder(pa, pa.struct(list(file.schema_arrow))) or (lambda row: row)
            for batch in file.iter_batches(batch_size=_ROWS_PER_GROUP):
                for row in map(_without_none, batch.to_pylist(maps_as_pydicts="strict")):
                    if claimed is not None:
                        rows_digest.update(msgspec.json.encode(row))
                    yield decode(row)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(path, f"cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    if claimed not in (None, rows_digest.hexdigest().encode()):
        raise InputError(path, "its rows do not match their digest: the file is damaged")


def _json_decoder(pa, kind):
    """What decodes the values of a column that are JSON as text by Arrow's extension type, at any depth; None where
    there are none. So `datasets` writes messages whose tool calls have arguments of different names.
    """
    if isinstance(kind, pa.JsonType):
        return lambda text: None if text is None else msgspec.json.decode(text)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = _json_decoder(pa, kind.value_type)
        return inner and (lambda values: None if values is None else [inner(value) for value in values])
    if pa.types.is_struct(kind):
        inside = {field.name: decode for field in kind if (decode := _json_decoder(pa, field.type))}

        def decode_struct(row):
            return None if row is None else row | {name: inside[name](row[name]) for name in inside if name in row}

        return decode_struct if inside else None
    return None


def write_rows(path: str | os.PathLike, rows: Iterable[dict], kind: Format) -> int:
    """Write JSONL or Parquet aside, then rename. Returns the number written."""
    with replacing(path) as file:
        return (_write_parquet if Path(path).suffix == ".parquet" else _write_jsonl)(file, rows, kind)


def _write_jsonl(file: BinaryIO, rows: Iterable[dict], kind: Format) -> int:
    count = 0
    for row in rows:
        file.write(seal(msgspec.json.encode(row) + b"\n"))
        count += 1
    return count


def _write_parquet(file: BinaryIO, rows: Iterable[dict], kind: Format) -> int:
    pa = _pyarrow()
    schema = _parquet_schema(pa, kind)
    count, rows, rows_digest = 0, iter(rows), hashlib.sha256()
    with pa.parquet.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        while group := list(islice(rows, _ROWS_PER_GROUP)):
            table = pa.Table.from_pylist(group, schema=schema)
            writer.write_table(table)
            for row in table.to_pylist(maps_as_pydicts="strict"):
                rows_digest.update(msgspec.json.encode(_without_none(row)))
            count += len(group)
        writer.add_key_value_metadata({FIELD: rows_digest.hexdigest()})
    return count
