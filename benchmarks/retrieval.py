"""Does the search tool find the supporting paragraphs? Recall by BM25, by embeddings, and by both.

    python -m benchmarks.retrieval [--data ../shared/data] [--embeddings wordllama] [--json] [--out FILE.jsonl]
    python -m benchmarks.retrieval --embeddings http://127.0.0.1:8000/v1#model

Recall at k is the share of a question's supporting paragraphs among the first k pages, averaged over questions; the
question is asked as it is, of all paragraphs of its slice, each once. `both` joins the two orders by reciprocal rank
(Cormack, Clarke, Buettcher, SIGIR 2009).

`--embeddings wordllama` (pip install wordllama, needed by nothing else) serves that package's vectors on loopback:
256 numbers a token, in its wheel, averaged. Any other OpenAI-style endpoint goes by its URL. Either way swirl's client
asks: micro-batches, limits, answers kept. `build_s` is the time to index all pages; `query_ms` a question's share of
the time that all of them take, asked at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from aiohttp import web

from benchmarks.harness import append, importable, machine
from swirl.endpoints.address import endpoint_for, parse_spec
from swirl.endpoints.batcher import embedder
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, SwirlError
from swirl.tasks import hotpotqa, musique
from swirl.tools.retrieval import DenseSearchTool, build_dense_index
from swirl.tools.search import Page, SearchTool, build_index

SLICES = (
    ("hotpotqa dev", hotpotqa, "hotpotqa/dev.slice.json"),
    ("musique dev", musique, "musique/dev.slice.jsonl"),
    ("musique train", musique, "musique/train.slice.jsonl"),
)
CUTS = (1, 5, 10)
DEPTH = 100  # pages of each order that `both` joins
RANK_OFFSET = 60  # of reciprocal rank, as in its paper

Search = Callable[[list[str]], Awaitable[list[list[Page]]]]


@asynccontextmanager
async def wordllama_server():
    """The spec of an /embeddings endpoint on loopback while the block lasts. Raises ConfigError without wordllama."""
    package = importable("wordllama")
    if package is None:
        raise ConfigError("--embeddings wordllama: no such package (pip install wordllama), or name an endpoint's URL")
    folder = Path(package.__file__).parent  # given as its cache: it looks for the tokenizer nowhere else beside it
    model = package.WordLlama.load(cache_dir=folder, disable_download=True)

    async def embeddings(request: web.Request) -> web.Response:
        texts = (await request.json())["input"]
        vectors = await asyncio.to_thread(model.embed, texts)
        return web.json_response(
            {"data": [{"index": i, "embedding": vector.tolist()} for i, vector in enumerate(vectors)]}
        )

    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1#wordllama-{package.__version__}"
    finally:
        await runner.cleanup()


async def by_bm25(pages: list[Page], folder: Path) -> Search:
    build_index(pages, folder)
    tool = SearchTool.open(folder)

    async def search(questions: list[str]) -> list[list[Page]]:
        return [tool.search(question, DEPTH) for question in questions]

    return search


async def by_embeddings(pages: list[Page], folder: Path, client: Client, spec: str) -> Search:
    _, url, model = parse_spec(spec)
    endpoint = endpoint_for(url)
    embed = embedder(client, endpoint, model)
    await build_dense_index(pages, folder, embed, pages_per_request=endpoint.batch_size * endpoint.concurrency)
    tool = DenseSearchTool(folder, embed)

    async def search(questions: list[str]) -> list[list[Page]]:
        return list(await asyncio.gather(*(tool.search(question, DEPTH) for question in questions)))

    return search


def by_reciprocal_rank(*orders: list[Page]) -> list[Page]:
    """The pages of all orders, by the sum of 1 / (RANK_OFFSET + rank) over those that hold them."""
    scores: dict[Page, float] = {}
    for order in orders:
        for rank, page in enumerate(order, 1):
            scores[page] = scores.get(page, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(scores, key=scores.__getitem__, reverse=True)[:DEPTH]


def recalls(found: list[list[Page]], golden: list[list[Page]]) -> dict[str, float]:
    """Recall at each of CUTS, over all questions."""
    shares = [[len(set(f[:k]) & set(g)) / len(set(g)) for k in CUTS] for f, g in zip(found, golden, strict=True)]
    return {f"recall_at_{k}": round(float(share), 4) for k, share in zip(CUTS, np.mean(shares, axis=0))}


async def measure(data: Path, spec: str | None) -> list[dict]:
    """A row a slice and method; BM25 alone without a `spec` of embeddings."""
    rows = []
    model = spec and parse_spec(spec)[2]
    for name, module, file in SLICES:
        pages, support = list(module.corpus(data / file)), list(module.support(data / file))
        questions, golden = [question for question, _ in support], [pages for _, pages in support]
        sizes = {"slice": name, "questions": len(questions), "pages": len(pages)}
        orders = []
        with tempfile.TemporaryDirectory() as folder:
            async with Client(Path(folder) / "answers.sqlite") as client:
                methods = [("bm25", None, partial(by_bm25, pages, Path(folder) / "bm25"))]
                if spec:
                    methods += [("dense", model, partial(by_embeddings, pages, Path(folder) / "dense", client, spec))]
                for method, embeddings, build in methods:
                    start = time.perf_counter()
                    search = await build()
                    built = time.perf_counter()
                    orders.append(await search(questions))
                    query_ms = 1e3 * (time.perf_counter() - built) / len(questions)
                    times = {"build_s": round(built - start, 3), "query_ms": round(query_ms, 3)}
                    shares = recalls(orders[-1], golden)
                    rows.append({**sizes, "method": method, "embeddings": embeddings, **shares, **times})
        if spec:
            shares = recalls([by_reciprocal_rank(*pair) for pair in zip(*orders, strict=True)], golden)
            times = {"build_s": None, "query_ms": None}
            rows.append({**sizes, "method": "both", "embeddings": model, **shares, **times})
    return rows


async def run(data: Path, embeddings: str) -> list[dict]:
    if embeddings != "wordllama":
        return await measure(data, None if embeddings == "none" else embeddings)
    async with wordllama_server() as spec:
        return await measure(data, spec)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--embeddings", default="wordllama", help="wordllama, an endpoint's URL#MODEL, or none")
    parser.add_argument("--json", action="store_true", help="one JSON row a line on stdout, no table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    given = parser.parse_args(arguments)
    if not given.data.is_dir():
        print(f"{given.data}: no such folder; --data names the one with the data sets", file=sys.stderr)
        return 1
    try:
        results = asyncio.run(run(given.data, given.embeddings))
    except SwirlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = [{"benchmark": "retrieval", **row, **machine(torch.device("cpu"))} for row in results]
    append(given.out, rows)
    if given.json:
        print("\n".join(json.dumps(row) for row in rows))
        return 0
    print(f"embeddings: {rows[-1]['embeddings'] or 'none'}; {rows[-1]['hardware']}, commit {rows[-1]['commit']}")
    cuts = "".join(f"{f'recall@{k}':>11}" for k in CUTS)
    print(f"{'slice':<15}{'method':<8}{'questions':>10}{'pages':>7}{cuts}{'build s':>9}{'query ms':>10}")
    for row in rows:
        shares = "".join(f"{row[f'recall_at_{k}']:>11.1%}" for k in CUTS)
        times = f"{row['build_s']:>9.2f}{row['query_ms']:>10.2f}" if row["build_s"] is not None else ""
        print(f"{row['slice']:<15}{row['method']:<8}{row['questions']:>10}{row['pages']:>7}{shares}{times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
