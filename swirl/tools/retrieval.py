"""Search by meaning: dense vectors from an /embeddings endpoint, and HTTP retrieval servers of Search-R1's
form.

Both take the request as a callable, so that limits, retries and the cache are the client's. A query that the server
refuses (400, 413, 422) is the policy's own doing: the refusal is a result it can read, `search failed: ...`. What a
server fails to answer raises EndpointError, which leaves the trajectory to the next run: the policy must not learn from
a server's bad moment.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from swirl.endpoints.batcher import Batcher
from swirl.endpoints.client import Client, encode_payload
from swirl.endpoints.endpoint import Endpoint
from swirl.errors import ConfigError, EndpointError, InputError
from swirl.storage.digest import DigestError, check_digests, digests_of, write_manifest
from swirl.tools.search import Page, read_pages, show_pages

Embed = Callable[[list[str]], Awaitable[list[list[float]]]]
PostJson = Callable[[str, dict], Awaitable[dict]]

_EXPECTED = 'expected {"result": [[{"document": {"contents": ...}}]]}, one list a query'
_EXACT_BELOW = 50_000  # pages that are compared one by one; above, usearch's graph finds nearly all of the same


def _index_class():
    try:
        from usearch.index import Index
    except ImportError:
        raise ConfigError("dense search needs usearch: pip install 'swirl[dense]'") from None
    return Index


def _vectors(given: Sequence[Sequence[float]], count: int, dimensions: int | None) -> np.ndarray:
    """(count, dimensions) float32, rows of length 1. Raises EndpointError where it was given anything
    else.
    """
    try:
        array = np.asarray(given, dtype=np.float32)
    except (ValueError, TypeError):
        raise EndpointError("embeddings", "expected vectors of numbers, all of one length") from None
    if array.ndim != 2 or len(array) != count or (dimensions is not None and array.shape[1] != dimensions):
        shape = f"{count} vectors" + (f" of {dimensions} numbers" if dimensions is not None else "")
        raise EndpointError("embeddings", f"expected {shape}, got shape {array.shape}")
    norms = np.linalg.norm(array, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or not norms.all():
        raise EndpointError("embeddings", "expected finite vectors, none of them zero")
    return array / norms


async def build_dense_index(
    pages: Iterable[Page], folder: str | os.PathLike, embed: Embed, *, pages_per_request: int = 64
) -> None:
    """Embed every page as `title\\ntext` and write `folder` (pages.jsonl, vectors.usearch), whole or not at
    all.

    Raises ConfigError where the folder is there already or there is no page, EndpointError as `embed` does.
    """
    Index = _index_class()
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} is there already: an index is built once, remove it to build it anew")
    aside = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    aside.mkdir(parents=True, exist_ok=True)  # unlike tempfile's, readable by whom the umask says
    index, count = None, 0
    try:
        with open(aside / "pages.jsonl", "wb") as file:
            for batch in _batches(pages, pages_per_request):
                given = await embed([f"{page.title}\n{page.text}" for page in batch])
                vectors = _vectors(given, len(batch), None if index is None else index.ndim)
                if index is None:
                    index = Index(ndim=vectors.shape[1], metric="ip", dtype="f32")
                index.add(np.arange(count, count + len(batch), dtype=np.uint64), vectors)
                count += len(batch)
                file.writelines(msgspec.json.encode(page) + b"\n" for page in batch)
        if index is None:
            raise ConfigError("search needs at least one page")
        index.save(str(aside / "vectors.usearch"))
        write_manifest(aside, digests_of(aside.iterdir()))
        os.rename(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _batches(pages: Iterable[Page], size: int):
    batch = []
    for page in pages:
        batch.append(page)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class DenseSearchTool:
    """The policy's `search` by nearest vectors, over a folder that `build_dense_index` wrote; vectors are
    mapped.

    Raises InputError where the folder is no such index, or damaged.
    """

    name = "search"

    def __init__(self, folder: str | os.PathLike, embed: Embed, top_k: int = 1):
        Index = _index_class()
        self.embed, self.top_k = embed, top_k
        try:
            check_digests(Path(folder))
        except (OSError, DigestError) as error:
            raise InputError(folder, f"expected an index made by build_dense_index ({error})") from None
        self.pages = list(read_pages(Path(folder) / "pages.jsonl"))
        try:
            self.index = Index.restore(str(Path(folder) / "vectors.usearch"), view=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(folder, f"expected an index made by build_dense_index ({error})") from None
        if self.index is None or len(self.index) != len(self.pages):
            raise InputError(folder, "expected one vector a page: it is damaged, build it anew")

    async def search(self, query: str, top_k: int | None = None) -> list[Page]:
        """At most `top_k` pages, nearest first. Raises EndpointError as `embed` does."""
        if not query.strip():
            return []
        vector = _vectors(await self.embed([query]), 1, self.index.ndim)[0]
        count = min(self.top_k if top_k is None else top_k, len(self.pages))
        matches = self.index.search(vector, count, exact=len(self.pages) < _EXACT_BELOW)
        return [self.pages[int(key)] for key in matches.keys]

    async def __call__(self, query: str) -> str:
        return await _result(self.search(query))


class RetrievalServerTool:
    """The policy's `search` by a server of Search-R1's form.

    POST url {"queries": [...], "topk": k, "return_scores": true} -> {"result": [[{"document": {"contents":
    "title\\ntext"}, "score": 0.5}, ...]]}, one list a query, best first. Documents with `title` and `text`
    of their own, and lists without scores, are read too.
    """

    name = "search"

    def __init__(self, url: str, post_json: PostJson, top_k: int = 1):
        self.url, self.post_json, self.top_k = url, post_json, top_k

    async def search(self, query: str, top_k: int | None = None) -> list[Page]:
        """At most `top_k` pages, best first. Raises EndpointError as `post_json` does, or on another
        answer's form.
        """
        if not query.strip():
            return []
        top_k = self.top_k if top_k is None else top_k
        answer = await self.post_json(self.url, {"queries": [query], "topk": top_k, "return_scores": True})
        try:
            (found,) = answer["result"]
        except (KeyError, TypeError, ValueError):
            raise EndpointError(self.url, _EXPECTED) from None
        return read_found(found, self.url)[:top_k]

    async def __call__(self, query: str) -> str:
        return await _result(self.search(query))


async def _result(search: Awaitable[list[Page]]) -> str:
    """What the policy reads. Raises EndpointError where the server gave no answer, or none that can be read."""
    try:
        return show_pages(await search)
    except EndpointError as error:
        if error.status in (400, 413, 422):
            return f"search failed: {error.reason}"
        raise


def read_found(found: Any, url: str) -> list[Page]:
    """The pages a server found for one query. Raises EndpointError on another form."""
    try:
        return [_page_of(item) for item in found]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EndpointError(url, _EXPECTED, status=200) from None


def _page_of(item: dict) -> Page:
    document = item.get("document", item)
    if "contents" in document:
        title, _, text = document["contents"].partition("\n")
        return Page(title.strip().strip('"'), text)
    return Page(str(document.get("title", "")), str(document["text"]))


def retriever(client: Client, endpoint: Endpoint) -> Callable[[str, dict], Awaitable[dict]]:
    """`await post_json(url, {"queries": [one], ...}) -> {"result": [found]}` by a server of Search-R1's form.

    `endpoint` gives the limits and the address; `url` must be that address. Queries whose other fields are
    equal share a request.
    """

    def read(found: Any) -> Any:
        read_found(found, endpoint.url)
        return found

    batcher = Batcher(
        client,
        endpoint,
        "",
        join=lambda queries, rest: {**msgspec.json.decode(rest), "queries": queries},
        split=lambda answer: answer["result"],
        read=read,
    )

    async def post_json(url: str, payload: dict) -> dict:
        if url != endpoint.url:
            raise ConfigError(f"expected the address {endpoint.url}, got {url}")
        rest = {name: value for name, value in payload.items() if name != "queries"}
        found = [batcher.ask(query, encode_payload(rest)) for query in payload["queries"]]
        return {"result": list(await asyncio.gather(*found))}

    return post_json
