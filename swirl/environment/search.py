"""The search tool: BM25 over pages of {title, text}, one page a query as in the paper unless told otherwise.

An index is a handful of arrays, the same in memory and on disk:
    bm25s' eager scores in CSC form, one column a word;
    `words`  (V,) uint64   sorted hashes of all words: a word's column is its rank here;
    `titles` (N,) uint64   sorted hashes of all titles, `title_pages` (N,) int32 the page of each.
Hashes instead of a dictionary let processes share everything through the page cache, the vocabulary too.

bm25s' numba backend is not used: it compiles for 3.3 s in every process, which a job of a few thousand pages never
earns back. Its numpy scores are asked directly, 14 us a query over 2,000 pages.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec
import numpy as np

from swirl.errors import ConfigError

NO_PAGE = "no page found"
TITLE_WEIGHT = 2  # a title's words are counted this often

_WORD = re.compile(r"\w+")


class Page(msgspec.Struct, frozen=True):
    """One page of a corpus."""

    title: str
    text: str


def words_of(text: str) -> list[str]:
    """Lower-case words without accents: "Beyoncé's" gives ["beyonce", "s"]."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return _WORD.findall(text.casefold())


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def show_pages(pages: Sequence[Page]) -> str:
    """The result text of a search, `title: text`, a line a page; NO_PAGE for none."""
    return "\n".join(f"{page.title}: {page.text}" if page.title else page.text for page in pages) or NO_PAGE


class Bm25Index:
    """BM25 over N pages; made by `Bm25Index.build`."""

    def __init__(self, bm25, words: np.ndarray, titles: np.ndarray, title_pages: np.ndarray, pages: Sequence[Page]):
        self.bm25, self.words, self.titles, self.title_pages, self.pages = bm25, words, titles, title_pages, pages

    @classmethod
    def build(cls, pages: Iterable[Page]) -> Bm25Index:
        """Index the pages. Raises ConfigError where there is none, or none with a word in it."""
        import bm25s

        pages = list(pages)
        first_seen: dict[str, int] = {}
        rows = []
        for page in pages:
            words = words_of(page.title) * TITLE_WEIGHT + words_of(page.text)
            rows.append(np.array([first_seen.setdefault(word, len(first_seen)) for word in words], dtype=np.int32))
        if not first_seen:
            raise ConfigError("search needs at least one page with a word in it")
        hashes = np.fromiter(map(_hash, first_seen), dtype=np.uint64, count=len(first_seen))
        order = np.argsort(hashes)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        bm25 = bm25s.BM25(backend="numpy")
        ids = [rank[row].tolist() for row in rows]
        bm25.index((ids, {word: int(rank[i]) for word, i in first_seen.items()}), show_progress=False)
        titles = np.fromiter((_hash(" ".join(words_of(page.title))) for page in pages), np.uint64, len(pages))
        title_pages = np.argsort(titles, kind="stable").astype(np.int32)
        return cls(bm25, hashes[order], titles[title_pages], title_pages, pages)

    def search(self, query: str, top_k: int) -> list[Page]:
        """At most `top_k` pages, best first; only pages that share a word with the query.

        A page whose title is the query comes before all others; ties go to the earlier page.
        """
        words = words_of(query)
        if not words or top_k < 1:
            return []
        hashes = np.array([_hash(word) for word in words], dtype=np.uint64)
        columns = np.minimum(np.searchsorted(self.words, hashes), len(self.words) - 1)
        columns = columns[self.words[columns] == hashes]
        if not len(columns):
            return []
        scores = self.bm25.get_scores_from_ids(columns)
        title = np.uint64(_hash(" ".join(words)))
        start, end = np.searchsorted(self.titles, title), np.searchsorted(self.titles, title, side="right")
        scores[self.title_pages[start:end]] += 1e6
        top_k = min(top_k, len(scores))
        least = np.partition(scores, -top_k)[-top_k]
        found = np.flatnonzero((scores >= least) & (scores > 0))
        best = found[np.argsort(-scores[found], kind="stable")][:top_k]
        return [self.pages[i] for i in best.tolist()]


class SearchTool:
    """The policy's `search`. Takes pages, which it indexes, or an index."""

    name = "search"

    def __init__(self, pages: Iterable[Page] | Bm25Index, top_k: int = 1):
        self.index = pages if isinstance(pages, Bm25Index) else Bm25Index.build(pages)
        self.top_k = top_k

    def search(self, query: str, top_k: int | None = None) -> list[Page]:
        return self.index.search(query, self.top_k if top_k is None else top_k)

    async def __call__(self, query: str) -> str:
        return show_pages(self.search(query))
