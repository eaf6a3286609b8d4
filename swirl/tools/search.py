"""The search tool: BM25 over pages of {title, text}, one page a query as in the paper unless told otherwise.

An index is a handful of arrays, the same in memory and on disk, so that processes share it by mapping the
files:
    BM25 scores by bm25s in CSC form: a word's column holds its pages and its score in each;
    `words`  (V,) uint64  sorted hashes of all words: a word's column is its rank here;
    `titles` (N,) uint64  sorted hashes of all titles, `title_pages` (N,) int32 the page of each.

bm25s' numba backend is not used: it compiles for 3.3 s in every process (measured, bm25s 0.3.16), which a
job of a few thousand pages never earns back. Adding up the columns here takes 0.1 ms a query over 2,000
pages.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import msgspec
import numpy as np

from swirl.errors import ConfigError, InputError, SwirlError
from swirl.rollout.tool import Tool
from swirl.storage.digest import check_digests, digests_of, write_manifest
from swirl.trajectories.actions import TAGS
from swirl.trajectories.log import read_lines

NO_PAGE = "no page found"
TITLE_WEIGHT = 3  # a title's words are counted this often: best of 1, 2, 3 in benchmarks.retrieval
COMMON = 0.1  # words in more than this share of many pages ("the") are left out of a query that has rarer ones
INDEX_VERSION = 1

_WORD = re.compile(r"\w+")
_ARRAYS = ("words", "titles", "title_pages", "data", "indices", "indptr", "offsets")


class Page(msgspec.Struct, frozen=True):
    """One page of a corpus."""

    title: str
    text: str


_page_decoder = msgspec.json.Decoder(Page)
_page_encoder = msgspec.json.Encoder()


def read_pages(path: str | os.PathLike) -> Iterator[Page]:
    """Stream a JSONL file of {title, text}. Raises InputError naming file, line and field."""
    for number, line in read_lines(path):
        try:
            yield _page_decoder.decode(line)
        except msgspec.ValidationError as error:
            message, _, where = str(error).partition(" - at `$")
            raise InputError(path, message, line=number, field=where.strip("`.") or None) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(path, f"expected one page a line ({error})", line=number) from None


def words_of(text: str) -> list[str]:
    """Lower-case words without accents: "Beyoncé's" gives ["beyonce", "s"]."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(text.casefold())


def show_pages(pages: Sequence[Page]) -> str:
    """The result text of a search, `title: text`, a line a page; NO_PAGE for none."""
    return "\n".join(f"{page.title}: {page.text}" if page.title else page.text for page in pages) or NO_PAGE


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Bm25Index:
    """BM25 over N pages: `Bm25Index.build(pages)` in memory, `open_index(folder)` from disk. Safe to
    share.
    """

    def __init__(self, arrays: dict[str, np.ndarray], pages: Sequence[Page]):
        self.arrays, self.pages = arrays, pages

    @classmethod
    def build(cls, pages: Iterable[Page]) -> Bm25Index:
        """Raises ConfigError where there is no page, or none with a word in it."""
        pages = list(pages)
        return cls(_build_arrays(pages), pages)

    def search(self, query: str, top_k: int = 1) -> list[Page]:
        """At most `top_k` pages, best first; only pages that share a word with the query.

        A page whose title is the query comes before all others; ties go to the earlier page.
        """
        words = words_of(query)
        if not words or top_k < 1:
            return []
        of = self.arrays
        hashes = np.array([_hash(word) for word in words], dtype=np.uint64)
        columns = np.minimum(np.searchsorted(of["words"], hashes), len(of["words"]) - 1)
        columns = columns[of["words"][columns] == hashes]
        num_pages = of["indptr"][columns + 1] - of["indptr"][columns]
        rare = num_pages <= max(COMMON * len(self.pages), 1000)
        columns = columns[rare] if rare.any() else columns
        scores = np.zeros(len(self.pages), dtype=np.float32)
        for column in columns.tolist():
            part = slice(of["indptr"][column], of["indptr"][column + 1])
            scores[of["indices"][part]] += of["data"][part]
        title = np.uint64(_hash(" ".join(words)))
        same = slice(np.searchsorted(of["titles"], title), np.searchsorted(of["titles"], title, side="right"))
        scores[of["title_pages"][same]] += 1e6
        if top_k == 1:
            best = scores.argmax(keepdims=True)
            best = best[scores[best] > 0]
        else:
            top_k = min(top_k, len(scores))
            least = np.partition(scores, -top_k)[-top_k]
            found = np.flatnonzero((scores >= least) & (scores > 0))
            best = found[np.argsort(-scores[found], kind="stable")][:top_k]
        return [self.pages[i] for i in best.tolist()]


def _build_arrays(pages: Iterable[Page]) -> dict[str, np.ndarray]:
    import bm25s

    ids: dict[str, int] = {}
    rows, titles = [], []
    for page in pages:
        title = words_of(page.title)
        words = title * TITLE_WEIGHT + words_of(page.text)
        rows.append(np.array([ids.setdefault(word, len(ids)) for word in words], dtype=np.int32))
        titles.append(_hash(" ".join(title)))
    if not ids:
        raise ConfigError("search needs at least one page with a word in it")
    hashes = np.fromiter(map(_hash, ids), dtype=np.uint64, count=len(ids))
    order = np.argsort(hashes)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    bm25 = bm25s.BM25(backend="numpy")
    scores = bm25.build_index_from_ids(range(len(ids)), [rank[row] for row in rows], show_progress=False)
    titles = np.array(titles, dtype=np.uint64)
    title_pages = np.argsort(titles, kind="stable").astype(np.int32)
    return {
        "words": hashes[order],
        "titles": titles[title_pages],
        "title_pages": title_pages,
        "data": scores["data"],
        "indices": scores["indices"],
        "indptr": scores["indptr"],
    }


class _MappedPages(Sequence[Page]):
    """The pages of an index on disk, each decoded when asked for; `offsets` (N + 1,) int64 in bytes."""

    def __init__(self, path: Path, offsets: np.ndarray):
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.offsets = offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Page:
        return _page_decoder.decode(self.bytes[self.offsets[i] : self.offsets[i + 1]])


def build_index(pages: Iterable[Page], folder: str | os.PathLike) -> None:
    """Index the pages and write `folder`, whole or not at all; pages are streamed, their text is never all
    in memory.

    Raises ConfigError where the folder is there already, or no page has a word in it.
    """
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: an index is built once, remove it to build it anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    try:
        offsets = [0]

        def written(file):
            for page in pages:
                offsets.append(offsets[-1] + file.write(_page_encoder.encode(page) + b"\n"))
                yield page

        with open(aside / "pages.jsonl", "wb") as file:
            arrays = _build_arrays(written(file))
        for name, array in (arrays | {"offsets": np.array(offsets, dtype=np.int64)}).items():
            np.save(aside / f"{name}.npy", array)
        (aside / "index.json").write_text(f'{{"version": {INDEX_VERSION}, "pages": {len(offsets) - 1}}}\n')
        write_manifest(aside, digests_of(aside.iterdir()))
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def open_index(folder: str | os.PathLike) -> Bm25Index:
    """Map an index that `build_index` wrote: all processes share the memory. Opening reads it once, about a second a
    GB and core, to hold it to its digests.

    Raises InputError where the folder is no index, of another version, or damaged.
    """
    folder = Path(folder)
    try:
        check_digests(folder)
        about = msgspec.json.decode((folder / "index.json").read_bytes(), type=dict[str, int])
        if about.get("version") != INDEX_VERSION:
            raise InputError(folder, f"expected an index of version {INDEX_VERSION}, got {about.get('version')}")
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in _ARRAYS}
        pages = _MappedPages(folder / "pages.jsonl", arrays.pop("offsets"))
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        if isinstance(error, SwirlError):
            raise
        raise InputError(folder, f"expected an index made by build_index ({error})") from None
    if len(pages) != about.get("pages") or len(pages.bytes) != pages.offsets[-1]:
        raise InputError(folder, "expected as many pages as the index was built of: it is damaged, build it anew")
    return Bm25Index(arrays, pages)


async def find_nothing(query: str) -> str:
    """The search of known trajectories, which bring their results along."""
    return NO_PAGE


def search_tool(search: Callable[[str], Awaitable[str]] = find_nothing) -> Tool:
    """The policy's `search`, done by a SearchTool or by one of `retrieval`; their requests have limits of their own."""
    return Tool(
        name="search",
        tag=TAGS["search"],
        run=search,
        description="Find a page.",
        argument="query",
        verb="search",
        timeout_s=None,
    )


class SearchTool:
    """Search by BM25. Takes pages, which it indexes, or an index."""

    name = "search"

    def __init__(self, pages: Iterable[Page] | Bm25Index, top_k: int = 1):
        self.index = pages if isinstance(pages, Bm25Index) else Bm25Index.build(pages)
        self.top_k = top_k

    @classmethod
    def open(cls, corpus: str | os.PathLike, top_k: int = 1) -> SearchTool:
        """Over an index folder, mapped, or a JSONL of pages, indexed in memory."""
        return cls(open_index(corpus) if os.path.isdir(corpus) else read_pages(corpus), top_k)

    def search(self, query: str, top_k: int | None = None) -> list[Page]:
        return self.index.search(query, self.top_k if top_k is None else top_k)

    async def __call__(self, query: str) -> str:
        return show_pages(self.search(query))


def main() -> int:
    """`python -m swirl.tools.search CORPUS.jsonl FOLDER`: build an index once for all later runs."""
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        print("usage: python -m swirl.tools.search CORPUS.jsonl FOLDER", file=sys.stderr)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    try:
        build_index(read_pages(sys.argv[1]), sys.argv[2])
        print(f"{len(open_index(sys.argv[2]).pages)} pages indexed in {sys.argv[2]}")
    except (SwirlError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
