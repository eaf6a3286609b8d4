"""Digests of what lies on disk: of an object of JSON, in its last field; of a folder's files, in a list beside them.

What swirl writes bears one and is checked when it is read. What others wrote has none, and is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from swirl.storage.files import replace_file

FIELD = "swirl_digest"
MANIFEST = "digests.json"
_KEY = f'"{FIELD}"'.encode()
DIGITS = 16  # 64 bits: against damage, not against somebody who writes digests too
_LAST_FIELD = re.compile(rb'"[^"]*"\s*:\s*"([0-9a-f]{%d})"\s*}\Z' % DIGITS)
_LONGEST_FIELD = 100  # bytes, more than `seal` writes


class DigestError(ValueError):
    """Something that swirl wrote is not as swirl wrote it; the text says what, in one line."""


def digest_of(content: bytes) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def file_digest(path: str | os.PathLike) -> str:
    """`digest_of` a file's content, read as a stream. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def seal(text: bytes) -> bytes:
    """An object of JSON with the digest of its bytes as its last field; a line's end stays at the end.

    b'{"a":1}\\n' -> b'{"a":1,"swirl_digest":"…"}\\n'
    """
    whole = text.rstrip()
    body = whole[:-1].rstrip()
    if not (whole.startswith(b"{") and whole.endswith(b"}")):
        raise ValueError("expected an object of JSON")
    comma = b"" if body == b"{" else b","
    between = b"\n  " if b"\n" in body else b""
    space, end = (b" ", b"\n") if between else (b"", b"")
    field = comma + between + _KEY + b":" + space + b'"' + digest_of(body).encode() + b'"'
    return body + field + end + b"}" + text[len(whole) :]


def unseal(text: bytes) -> bytes:
    """The object as it was before `seal`, but for white space; one without a digest as it is.

    Raises DigestError where the object does not match its digest, or its digest stands under another name.
    """
    whole = text.rstrip()
    last = _LAST_FIELD.search(whole, max(0, len(whole) - _LONGEST_FIELD))
    if last is not None:
        body = whole[: last.start()].rstrip().removesuffix(b",").rstrip()
        if last[1].decode() == digest_of(body):
            if last[0].startswith(_KEY):
                return body + b"}" + (b"\n" if text.endswith(b"\n") else b"")
            raise DigestError(f"the name of its digest, '{FIELD}', is damaged: mend it, or take its digest out")
    if _KEY in whole:
        raise DigestError(
            f"does not match its digest: damaged, or changed since swirl wrote it (if so, take '{FIELD}' out)"
        )
    return text


def digests_of(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> digest, several files at a time. Raises OSError."""
    paths = sorted(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip((path.name for path in paths), threads.map(file_digest, paths), strict=True))


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Put down the digests of a folder's files beside them, as digests.json. Raises OSError."""
    replace_file(folder / MANIFEST, seal(json.dumps({"files": dict(digests)}, indent=2).encode() + b"\n"))


def read_manifest(folder: Path) -> dict[str, str]:
    """Digest by file name, {} where the folder has no digests.json. Raises DigestError, OSError."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return {}
    try:
        files = json.loads(unseal(text))["files"]
        if all(isinstance(part, str) for item in files.items() for part in item):
            return files
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise DigestError(f"{MANIFEST} is damaged: delete it to take the files as they are")


def check_digests(folder: Path, names: Iterable[str] | None = None) -> None:
    """Hold files of a folder, by default all that its digests.json knows, to their digests.

    A file that digests.json does not know, and a folder without one, are others' and pass. Raises DigestError naming
    the first file that is missing or does not match, OSError where one cannot be read.
    """
    known = read_manifest(folder)
    wanted = [name for name in (known if names is None else names) if name in known]
    for name in wanted:
        if not (folder / name).is_file():
            raise DigestError(f"{name} is missing")
    for name, found in digests_of(folder / name for name in wanted).items():
        if found != known[name]:
            raise DigestError(
                f"{name} does not match its digest: damaged, or replaced (if so, take it out of {MANIFEST})"
            )


def checkpoint_digest(folder: Path) -> str:
    """Tells what lies in a model's folder from all else that ever lay there. Raises OSError.

    Of the name and every byte of config.json, tokenizer.json and all *.safetensors, about a second a GB. Times are left
    out: a copy is the same checkpoint.
    """
    names = ("config.json", "tokenizer.json")
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name in names]
    return digest_of(json.dumps(digests_of(files)).encode())
