"""Does the search tool find the supporting paragraphs? Recall among the first 1 and 5, questions asked as
they are.

    python -m benchmarks.retrieval [--data ../shared/data] [--json]
    python -m benchmarks.retrieval --embeddings http://127.0.0.1:8000/v1 --model NAME

Recall is the share of a question's supporting paragraphs that are found, averaged over questions, in a
corpus of all paragraphs of the slice. Dense search goes by the embeddings of the endpoint; without one, by
latent semantic analysis of the corpus itself (256 dimensions, no model): a floor that shows the way works,
no rival to a trained embedder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from swirl.environment.retrieval import DenseSearchTool, Embed, build_dense_index, embeddings
from swirl.environment.search import Page, SearchTool, build_index, words_of
from swirl.errors import SwirlError
from swirl.learning.usage import commit
from swirl.progress import progress
from swirl.tasks import hotpotqa, musique

SLICES = (
    ("hotpotqa dev", hotpotqa, "hotpotqa/dev.slice.json"),
    ("musique dev", musique, "musique/dev.slice.jsonl"),
    ("musique train", musique, "musique/train.slice.jsonl"),
)


def latent_semantic(pages: list[Page], dimensions: int = 256) -> Embed:
    """Embeddings from the corpus alone: tf-idf rows projected on the leading right singular vectors."""
    import torch

    torch.manual_seed(0)
    texts = [words_of(f"{page.title} {page.text}") for page in pages]
    num_pages = Counter(word for words in texts for word in set(words))
    column = {word: i for i, word in enumerate(word for word, count in num_pages.items() if count > 1)}
    idf = {word: np.log(len(pages) / num_pages[word]) for word in column}

    def rows(texts):
        indices, values = [], []
        for row, words in enumerate(texts):
            counts = Counter(word for word in words if word in column)
            weights = np.array([(1 + np.log(n)) * idf[word] for word, n in counts.items()])
            indices += [(row, column[word]) for word in counts]
            values += (weights / (np.linalg.norm(weights) or 1)).tolist()
        shape = (len(texts), len(column))
        return torch.sparse_coo_tensor(np.array(indices).reshape(-1, 2).T, values, shape, dtype=torch.float32)

    _, _, directions = torch.svd_lowrank(rows(texts).coalesce(), q=dimensions, niter=4)

    async def embed(texts):
        return (torch.sparse.mm(rows([words_of(text) for text in texts]), directions) + 1e-6).tolist()

    return embed


async def measure(
    name: str, method: str, search: Callable, support: list[tuple[str, list[Page]]], pages: int
) -> dict:
    """Recall at 1 and 5, and the median milliseconds of a query."""
    recalls, elapsed_ms = [], []
    with progress(f"{name}, {method}", len(support)) as advance:
        for question, golden in support:
            start = time.perf_counter()
            found = search(question, 5)
            found = await found if asyncio.iscoroutine(found) else found
            elapsed_ms.append((time.perf_counter() - start) * 1e3)
            recalls.append([len(set(found[:k]) & set(golden)) / len(golden) for k in (1, 5)])
            advance()
    at_1, at_5 = np.mean(recalls, axis=0)
    return {
        "slice": name,
        "method": method,
        "questions": len(support),
        "pages": pages,
        "recall_at_1": round(float(at_1), 4),
        "recall_at_5": round(float(at_5), 4),
        "query_ms": round(float(np.median(elapsed_ms)), 3),
    }


async def run(data: Path, embed_by: Callable[[list[Page]], Embed], dense_name: str) -> list[dict]:
    results = []
    for name, module, file in SLICES:
        pages = list(module.corpus(data / file))
        support = list(module.support(data / file))
        with tempfile.TemporaryDirectory() as folder:
            build_index(pages, Path(folder) / "bm25")
            bm25 = SearchTool.open(Path(folder) / "bm25")
            results.append(await measure(name, "bm25", bm25.search, support, len(pages)))
            embed = embed_by(pages)
            await build_dense_index(pages, Path(folder) / "dense", embed)
            dense = DenseSearchTool(Path(folder) / "dense", embed)
            results.append(await measure(name, dense_name, dense.search, support, len(pages)))
    return results


async def run_with_endpoint(data: Path, url: str, model: str) -> list[dict]:
    from swirl.environment.client import Client, Endpoint

    async with Client() as client:

        async def post_json(path, payload):
            return await client.post(Endpoint(url), path, payload)

        embed = embeddings(post_json, "/embeddings", model)
        return await run(data, lambda pages: embed, f"dense ({model})")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.retrieval", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--embeddings", help="base URL of an OpenAI-style endpoint")
    parser.add_argument("--model", default="default", help="the endpoint's embedding model")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        print(f"{arguments.data}: no such folder; --data names the one with the data sets", file=sys.stderr)
        return 1
    try:
        if arguments.embeddings:
            results = asyncio.run(run_with_endpoint(arguments.data, arguments.embeddings, arguments.model))
        else:
            results = asyncio.run(run(arguments.data, latent_semantic, "dense (LSA, no model)"))
    except SwirlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        machine = {"machine": platform.machine(), "python": platform.python_version(), "commit": commit()}
        for result in results:
            print(json.dumps(result | machine))
        return 0
    print(
        f"{'slice':<15}{'method':<24}{'questions':>10}{'pages':>8}{'recall@1':>10}{'recall@5':>10}{'ms/query':>10}"
    )
    for r in results:
        counts = f"{r['questions']:>10}{r['pages']:>8}"
        recalls = f"{r['recall_at_1']:>10.1%}{r['recall_at_5']:>10.1%}"
        print(f"{r['slice']:<15}{r['method']:<24}{counts}{recalls}{r['query_ms']:>10.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
