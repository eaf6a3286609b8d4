import asyncio
import json
import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest

from swirl.errors import ConfigError, EndpointError, InputError
from swirl.tools import search as searching
from swirl.tools.retrieval import DenseSearchTool, RetrievalServerTool, build_dense_index
from swirl.tools.search import NO_PAGE, Bm25Index, Page, SearchTool, build_index, open_index, read_pages

PAGES = [
    Page("Rock music", "The who, the what and the stone. The Who are named in passing, the who of it."),
    Page("The Who", "A band from London."),
    Page("Beyoncé", "A singer from Houston, Texas."),
    Page("Texas", "A state. Houston is its largest city."),
    Page("", "A page without a title about zebras."),
    Page("Mercury", "A planet close to the sun."),
    Page("Mercury", "A metal that is liquid at room temperature."),
]


def test_a_query_that_is_a_title_finds_that_page_first():
    tool = SearchTool(PAGES)
    for page in PAGES:
        if page.title:
            assert tool.search(page.title)[0].title == page.title
    assert tool.search("the  WHO!") == [PAGES[1]]
    assert tool.search("beyonce") == [PAGES[2]]
    assert [page.text for page in tool.search("mercury", 2)] == [PAGES[5].text, PAGES[6].text]


def test_ranking_counts_rare_words_and_titles():
    tool = SearchTool(PAGES)
    assert tool.search("Which metal is liquid?") == [PAGES[6]]
    assert tool.search("Houston Texas", 2)[0] in (PAGES[2], PAGES[3])
    assert tool.search("zebras") == [PAGES[4]]


def test_results_as_text():
    tool = SearchTool(PAGES, top_k=2)
    assert asyncio.run(tool("zebras")) == "A page without a title about zebras."
    assert asyncio.run(SearchTool(PAGES)("planet")) == "Mercury: A planet close to the sun."
    assert asyncio.run(tool("mercury")).count("\n") == 1


@pytest.mark.parametrize("query", ["", "  ", "?!", "xyzzy", "\x00", "\ud800", "🙂", "a" * 100_000])
def test_nothing_found_is_a_readable_result(query):
    assert asyncio.run(SearchTool(PAGES[2:4])(query)) in (NO_PAGE, "Beyoncé: A singer from Houston, Texas.")
    assert asyncio.run(SearchTool([Page("Zebra", "striped")])(query)) == NO_PAGE


def test_top_k_beyond_the_pages_and_below_one():
    tool = SearchTool(PAGES)
    assert len(tool.search("a", 99)) == 6  # every page with the word
    assert tool.search("a", 0) == []


def test_more_pages_extend_the_ranking_and_ties_go_to_the_earlier_page():
    rng = random.Random(1)
    words = [f"w{i}" for i in range(40)]
    pages = [Page(f"title {i}", " ".join(rng.choices(words, k=rng.randrange(1, 30)))) for i in range(300)]
    index = Bm25Index.build(pages)
    for _ in range(50):
        query = " ".join(rng.choices(words, k=4))
        ranked = index.search(query, 300)
        assert len(set(ranked)) == len(ranked)
        for k in (1, 2, 7):
            assert index.search(query, k) == ranked[:k]
    twins = Bm25Index.build([Page(f"{i}", "same words") for i in range(20)])
    assert [page.title for page in twins.search("words", 5)] == ["0", "1", "2", "3", "4"]


def test_scores_are_those_of_bm25s_itself():
    import bm25s

    rng = random.Random(2)
    texts = [[f"w{rng.randrange(50)}" for _ in range(rng.randrange(1, 25))] for _ in range(80)]
    theirs = bm25s.BM25(backend="numpy")
    theirs.index(texts, show_progress=False)
    ours = Bm25Index.build([Page("", " ".join(words)) for words in texts])
    for _ in range(20):
        query = [f"w{i}" for i in rng.sample(range(50), 3)]
        best = int(np.argmax(theirs.get_scores(query)))
        assert ours.search(" ".join(query)) == [ours.pages[best]]


def test_common_words_do_not_hide_the_rare_one():
    pages = [Page(str(i), "the river flows " * 3) for i in range(1200)] + [Page("last", "the quiet heron of a river")]
    assert SearchTool(pages).search("the river heron") == [pages[-1]]
    assert SearchTool(pages).search("the river")[0] in pages  # only common words: they count again


def test_no_pages_is_a_config_error():
    for pages in ([], [Page("", "")], [Page("?", "!")]):
        with pytest.raises(ConfigError, match="at least one page"):
            SearchTool(pages)


@pytest.mark.parametrize(
    "text, line, field",
    [
        ('{"title": "a", "text": "b"}\n{"title": "a"}\n', 2, None),
        ('{"title": "a", "text": 3}\n', 1, "text"),
        ('\n["a"]\n', 2, None),
        ('{"title": "a", "text": "b"\n', 1, None),
        (b'{"title": "a", "text": "\xff"}\n', 1, None),
    ],
)
def test_malformed_pages_are_refused_by_file_line_and_field(tmp_path, text, line, field):
    path = tmp_path / "pages.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        list(read_pages(path))
    assert (error.value.file, error.value.line, error.value.field) == (str(path), line, field)


def test_a_saved_index_answers_as_the_one_in_memory(tmp_path):
    folder = tmp_path / "nested" / "index"
    build_index(iter(PAGES), folder)
    saved, built = open_index(folder), Bm25Index.build(PAGES)
    for query in ("the who", "beyonce", "houston", "mercury", "state", "nothing here", ""):
        assert saved.search(query, 3) == built.search(query, 3)
    assert list(saved.pages) == PAGES
    assert not saved.arrays["data"].flags.writeable
    assert [path.name for path in folder.parent.iterdir()] == ["index"]
    assert SearchTool.open(folder).search("zebras") == [PAGES[4]]


def _found(folder, query):
    return open_index(folder).search(query)[0].title


def test_processes_share_a_saved_index(tmp_path):
    build_index(PAGES, tmp_path / "index")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.starmap(_found, [(tmp_path / "index", q) for q in ("london band", "sun", "singer")])
    assert found == ["The Who", "Mercury", "Beyoncé"]


def test_building_is_whole_or_not_at_all(tmp_path):
    def failing():
        yield PAGES[0]
        raise InputError("pages.jsonl", "expected a page", line=2)

    with pytest.raises(InputError):
        build_index(failing(), tmp_path / "index")
    with pytest.raises(ConfigError):
        build_index([], tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    build_index(PAGES, tmp_path / "index")
    with pytest.raises(ConfigError, match="already"):
        build_index(PAGES, tmp_path / "index")


def test_a_damaged_index_is_refused(tmp_path):
    folder = tmp_path / "index"

    def refused():
        with pytest.raises(InputError) as error:
            open_index(folder)
        assert str(folder) in str(error.value)

    refused()
    for name in ("pages.jsonl", "data.npy", "offsets.npy", "words.npy", "index.json"):
        build_index(PAGES, folder)
        file = folder / name
        file.write_bytes(file.read_bytes()[: -len(file.read_bytes()) // 2])
        refused()
        file.unlink()
        refused()
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    build_index(PAGES, folder)
    (folder / "index.json").write_text('{"version": 99, "pages": 7}')
    refused()


def test_the_command_builds_once(tmp_path, monkeypatch, capsys):
    corpus = tmp_path / "pages.jsonl"
    corpus.write_text("".join(json.dumps({"title": p.title, "text": p.text}) + "\n" for p in PAGES))
    monkeypatch.setattr("sys.argv", ["search", str(corpus), str(tmp_path / "index")])
    assert searching.main() == 0
    assert capsys.readouterr().out.startswith("7 pages")
    assert searching.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    (tmp_path / "file").touch()
    for words in ((tmp_path / "absent.jsonl", tmp_path / "i"), (corpus, tmp_path / "file" / "index")):
        monkeypatch.setattr("sys.argv", ["search", *map(str, words)])
        assert searching.main() == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
    monkeypatch.setattr("sys.argv", ["search", str(corpus)])
    assert searching.main() == 2


def hashed_words(texts):
    """An embedding that can be checked by hand: counts of words in 64 buckets."""
    vectors = np.zeros((len(texts), 64))
    for row, text in zip(vectors, texts, strict=True):
        for word in searching.words_of(text):
            row[searching._hash(word) % 64] += 1
        row[0] += 1e-3
    return vectors.tolist()


async def embed(texts):
    return hashed_words(texts)


def test_dense_search_finds_the_nearest_page(tmp_path):
    asyncio.run(build_dense_index(iter(PAGES), tmp_path / "dense", embed, pages_per_request=3))
    tool = DenseSearchTool(tmp_path / "dense", embed, top_k=3)
    vectors = np.array(hashed_words([f"{page.title}\n{page.text}" for page in PAGES]))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for query in ("liquid metal temperature", "singer Houston", "band London"):
        best = np.argsort(-(vectors @ np.array(hashed_words([query])[0])))[:3]
        assert asyncio.run(tool.search(query)) == [PAGES[i] for i in best]
    assert asyncio.run(tool("")) == NO_PAGE
    assert asyncio.run(tool("zebras")).startswith("A page without a title")
    assert len(asyncio.run(tool.search("zebras", 99))) == len(PAGES)


@pytest.mark.parametrize(
    "given, reason",
    [
        ([[1.0, 2.0]] * 2, "expected 1 vectors of 64 numbers"),
        ([[1.0, 2.0]], "expected 1 vectors of 64 numbers"),
        ([[0.0] * 64], "none of them zero"),
        ([[float("nan")] * 64], "finite"),
        ([["a"] * 64], "vectors of numbers"),
        ([[1.0], [1.0, 2.0]], "all of one length"),
        (None, "expected 1 vectors"),
    ],
)
def test_bad_embeddings_are_no_answer(tmp_path, given, reason):
    asyncio.run(build_dense_index(PAGES, tmp_path / "dense", embed))

    async def wrong(texts):
        return given

    with pytest.raises(EndpointError, match=reason):
        asyncio.run(DenseSearchTool(tmp_path / "dense", wrong)("who"))


def test_a_dense_index_is_whole_or_not_at_all(tmp_path):
    async def failing(texts):
        raise EndpointError("http://localhost:1", "refused the connection")

    with pytest.raises(EndpointError):
        asyncio.run(build_dense_index(PAGES, tmp_path / "dense", failing))
    with pytest.raises(ConfigError):
        asyncio.run(build_dense_index([], tmp_path / "dense", embed))
    assert list(tmp_path.iterdir()) == []
    asyncio.run(build_dense_index(PAGES, tmp_path / "dense", embed))
    with pytest.raises(EndpointError, match="refused the connection"):
        asyncio.run(DenseSearchTool(tmp_path / "dense", failing)("a"))
    (tmp_path / "dense" / "vectors.usearch").write_bytes(b"damaged")
    with pytest.raises(InputError):
        DenseSearchTool(tmp_path / "dense", embed)
    with pytest.raises(InputError):
        DenseSearchTool(tmp_path / "absent", embed)


def test_a_retrieval_server_of_search_r1s_form():
    """Over real HTTP, with the answer's form as that server gives it."""
    from aiohttp import ClientSession, web

    asked = []

    async def retrieve(request):
        asked.append(await request.json())
        documents = [
            {"document": {"id": "3", "contents": '"Texas"\nA state.\nIn the south.'}, "score": 0.9},
            {"document": {"id": "5", "contents": '"Houston"\nA city.'}, "score": 0.4},
        ]
        return web.json_response({"result": [documents[: asked[-1]["topk"]]]})

    async def run():
        app = web.Application()
        app.router.add_post("/retrieve", retrieve)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/retrieve"
        async with ClientSession() as session:

            async def post_json(url, payload):
                async with session.post(url, json=payload) as response:
                    return await response.json()

            one = await RetrievalServerTool(url, post_json)("largest state")
            two = await RetrievalServerTool(url, post_json, top_k=2).search("largest state")
            nothing = await RetrievalServerTool(url, post_json)(" ")
        await runner.cleanup()
        return one, two, nothing

    one, two, nothing = asyncio.run(run())
    assert one == "Texas: A state.\nIn the south."
    assert two == [Page("Texas", "A state.\nIn the south."), Page("Houston", "A city.")]
    assert nothing == NO_PAGE
    assert asked[0] == {"queries": ["largest state"], "topk": 1, "return_scores": True}


@pytest.mark.parametrize(
    "answer, result",
    [
        ({"result": [[{"contents": "T\nx"}]]}, "T: x"),
        ({"result": [[{"document": {"title": "T", "text": "x"}, "score": 1}]]}, "T: x"),
        ({"result": [[]]}, NO_PAGE),
        ({"result": []}, None),
        ({"result": [[], []]}, None),
        ({"results": [[]]}, None),
        ({"result": [[{"document": {"body": "x"}}]]}, None),
        ({"result": [[{"document": {"contents": 5}}]]}, None),
        ({"result": [["text"]]}, None),
        ({"result": 3}, None),
        ([], None),
        (None, None),
    ],
)
def test_other_forms_of_a_retrieval_answer(answer, result):
    async def post_json(url, payload):
        return answer

    tool = RetrievalServerTool("http://localhost/retrieve", post_json)
    if result is not None:
        assert asyncio.run(tool("q")) == result
    else:
        with pytest.raises(EndpointError, match="expected"):
            asyncio.run(tool("q"))


@pytest.mark.parametrize("status", [400, 413, 422, 418, None])
def test_a_query_that_is_refused_is_a_readable_result_and_no_answer_is_none(status, tmp_path):
    async def failing(*_):
        raise EndpointError("http://localhost/retrieve", "not this one", status=status)

    asyncio.run(build_dense_index(PAGES, tmp_path / "dense", embed))
    tools = RetrievalServerTool("http://localhost/retrieve", failing), DenseSearchTool(tmp_path / "dense", failing)
    for tool in tools:
        if status in (400, 413, 422):
            assert asyncio.run(tool("q")) == "search failed: not this one"
        else:
            with pytest.raises(EndpointError, match="not this one"):
                asyncio.run(tool("q"))


def test_searching_the_real_slices_finds_supporting_paragraphs():
    from swirl.tasks import hotpotqa

    path = Path(__file__).parents[3] / "shared" / "data" / "hotpotqa" / "train.slice.json"
    if not path.exists():
        pytest.skip("the data sets' slices are not beside this checkout")
    index = Bm25Index.build(hotpotqa.corpus(path))
    found = [any(p in support for p in index.search(question, 5)) for question, support in hotpotqa.support(path)]
    assert sum(found) / len(found) > 0.8
