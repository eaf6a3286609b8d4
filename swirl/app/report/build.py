"""The report as one HTML file: page, style, scripts and data together, nothing from elsewhere.

The data lies in it compressed, in parts: what the first view needs, the list of trajectories, and their details by the
hundred, which the page unpacks where somebody looks. No text of a run is ever markup: parts are base64, the page makes
elements out of them by text alone, and its policy (CSP) lets no other script run than the one whose digest it names.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from swirl.app.report.browser import Browsed, browse
from swirl.app.report.overview import overview
from swirl.app.report.runs import Run, read_run
from swirl.storage.files import replace_file

PAGE = Path(__file__).with_name("page")
STYLES = ("uPlot.css", "style.css")
SCRIPTS = ("data.js", "overview.js", "charts.js", "list.js", "detail.js", "main.js")
PER_CHUNK = 100  # entries
MAX_ENTRIES = 10_000  # of a run


def write_report(runs: Sequence[Path], out: Path | None = None, *, max_entries: int = MAX_ENTRIES) -> Path:
    """Write the report of these runs' folders, by default as report.html into the first. Returns where it is.

    Raises InputError where a folder is no run's, or holds a file that is not as swirl wrote it.
    """
    made = read_runs(runs)
    browsed = [browse(run, max_entries) for run in made]
    parts = {"overview": overview_part(made, browsed), **entry_parts(browsed)}
    out = runs[0] / "report.html" if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page(title_of(made), {name: packed(part) for name, part in parts.items()}))
    return out


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Each named by its folder, or by its path where two folders have one name."""
    names = [path.resolve().name for path in paths]
    shown = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    return [read_run(path, name) for path, name in zip(paths, shown, strict=True)]


def title_of(runs: Sequence[Run]) -> str:
    return "swirl: " + ", ".join(run.name for run in runs)


def overview_part(runs: Sequence[Run], browsed: Sequence[Browsed]) -> dict:
    made = overview(runs)
    for one, entries in zip(made["runs"], browsed, strict=True):
        one["notes"] = entries.notes
    return made


def entry_parts(browsed: Sequence[Browsed]) -> dict[str, object]:
    """`index`, by columns, and `chunk-0`, `chunk-1`, ..., the details of PER_CHUNK entries each."""
    entries = [
        ({**entry.row, "run": number}, entry.detail) for number, one in enumerate(browsed) for entry in one.entries
    ]
    names = dict.fromkeys(name for row, _ in entries for name in row)
    columns = {name: [row.get(name) for row, _ in entries] for name in names}
    parts: dict[str, object] = {"index": {"count": len(entries), "per_chunk": PER_CHUNK, "columns": columns}}
    for number in range(0, len(entries), PER_CHUNK):
        parts[f"chunk-{number // PER_CHUNK}"] = [detail for _, detail in entries[number : number + PER_CHUNK]]
    return parts


def packed(part: object) -> bytes:
    """JSON, compressed; the same bytes for the same part."""
    return gzip.compress(msgspec.json.encode(part), compresslevel=6, mtime=0)


def page(title: str, parts: Mapping[str, bytes], *, live: bool = False) -> bytes:
    """The page with its data, or the one that asks for it on the address it came from."""
    style = "\n".join(_read(name) for name in STYLES)
    script = _read("uPlot.js") + '\n(() => {\n"use strict";\n' + "\n".join(map(_read, SCRIPTS)) + "})();\n"
    asks = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        f"connect-src {asks}; base-uri 'none'; form-action 'none'"
    )
    data = "\n".join(
        f'<script type="application/gzip+base64" id="part-{name}">{base64.b64encode(content).decode()}</script>'
        for name, content in parts.items()
    )
    values = {
        "title": html.escape(title),
        "policy": html.escape(policy),
        "style": style,
        "script": script,
        "data": data,
        "live": "yes" if live else "no",
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _read("page.html")).encode()


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
