"""generate, filter and evaluate over HTTP, as a user runs them, against a server on loopback that fails on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web
from safetensors.torch import load_file, save_file

from benchmarks.fault_server import FaultServer, verdict_of
from swirl.app.resolve import ALMANAC_BASE
from swirl.model.tokenizer import Tokenizer
from swirl.storage.digest import checkpoint_digest
from swirl.tasks import almanac
from swirl.trajectories.log import read_trajectories
from tests.process import run_module_beside

ROOT = Path(__file__).parents[2]
QUESTIONS = {q.question: q for split in ("train", "test") for q in almanac.questions("bridge", split, 12)}
TRANSIENT = ("429", "500", "reset", "truncated")
FAST = ("--endpoint.timeout-s", 1)


def model(path, payload):
    """What each model of the server says; each answer is a function of its request alone."""
    if path.endswith("/embeddings"):
        return {"data": [{"index": k, "embedding": embedding(text)} for k, text in enumerate(payload["input"])]}
    if path.endswith("/retrieve"):
        return {"result": [[{"contents": f"{query}\nIt is Vik."}] for query in payload["queries"]]}
    messages = [message["content"] for message in payload["messages"]]
    match payload["model"]:
        case "policy":
            said = play(messages)
        case "judge":
            said = verdict_of(messages[0])
        case "answers":
            said = {"GOOD": "YES", "BAD": "NO"}[verdict_of(messages[0])]
        case "reward":
            said = f"SCORE: {payload['seed'] % 10}"
        case "echo":
            said = messages[0]
        case "mumbling":
            said = "I cannot tell."
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    return {"choices": [{"index": 0, "message": {"content": said}, "finish_reason": "stop"}], "usage": usage}


def play(messages):
    """Almanac's demonstrator on its questions, one search and an answer on any other."""
    question, step = messages[0].partition("Question: ")[2], len(messages) // 2
    if question in QUESTIONS:
        return almanac.demonstrate(QUESTIONS[question], np.random.default_rng(0), slips=None)[step][0]
    return "<answer>Vik</answer>" if step else f"<search_query>{question}</search_query>"


def embedding(text):
    """Words as directions of their own, near enough."""
    vector = np.zeros(64)
    for word in re.findall(r"\w+", text.lower()):
        vector[blake2b(word.encode()).digest()[0] % 64] += 1.0
    return vector.tolist()


class Run:
    """A command that has ended."""

    def __init__(self, code, out, err):
        self.code, self.err = code, err
        self.results = [json.loads(line) for line in out.splitlines()] if code == 0 else out
        self.errors = [line for line in err.splitlines() if line.startswith("error: ")]
        self.warnings = [line for line in err.splitlines() if line.startswith("warning: ")]

    @property
    def result(self):
        (result,) = self.results
        return result


async def run(folder, name, *flags, code=0, **environment):
    """`python -m swirl.name`; no key and no proxy but those given."""
    clean = [key for key in os.environ if re.search("API_KEY|SWIRL|proxy", key, re.IGNORECASE)]
    done = await run_module_beside(f"swirl.{name}", *flags, cwd=folder, without=clean, **environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert code == 0 or done.stderr.count("error: ") == 1, done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


def generate(folder, url, *flags, **rest):
    flags = ("--policy", f"{url}/v1#policy", "--num-questions", 6, "--samples", 2, *flags)
    return run(folder, "generate", *flags, **rest)


def lines(path):
    return sorted(path.read_bytes().splitlines())


def kept_answers(path):
    with sqlite3.connect(path) as database:
        return database.execute("SELECT count(*) FROM answers").fetchone()[0]


def test_the_whole_way_with_faults_is_the_whole_way_without(tmp_path):
    async def whole_way(name, faults):
        folder = tmp_path / name
        folder.mkdir()
        async with FaultServer(model, faults=faults, kinds=TRANSIENT, retry_after="0.05", seed=1) as server:
            url = server.url
            made = (await generate(folder, url, "--seed", 7)).result
            flags = ("--data", "trajectories.jsonl", "--mode", "both", "--judge", f"{url}/v1#judge")
            flags += ("--outcome-judge", f"{url}/v1#answers", "--reward-judge", f"{url}/v1#reward", "--votes", 3)
            kept = (await run(folder, "filter", *flags)).result
            flags = (
                "--policy",
                f"{url}/v1#policy",
                "--num-questions",
                12,
                "--task",
                "bridge",
                "--out",
                "evaluated.jsonl",
            )
            flags += ("--judge", f"{url}/v1#judge", "--outcome-judge", f"{url}/v1#answers")
            evaluated = await run(folder, "evaluate", *flags)
            assert server.summary()["answered_twice"] == 0
            return made, kept, evaluated, server.summary()["faults"]

    calm, made, kept = tmp_path / "calm", *asyncio.run(whole_way("calm", 0.0))[:2]
    rough, *after, evaluated, faults = tmp_path / "rough", *asyncio.run(whole_way("rough", 0.2))
    assert set(faults) == set(TRANSIENT)
    assert after[0] == made and (made["trajectories"], made["new"], made["unanswered"]) == (12, 12, 0)
    counted = ("kept", "dropped", "unjudged", "dropped_now")
    assert [after[1][name] for name in counted] == [kept[name] for name in counted]
    assert kept["kept"] > 0 < kept["dropped"] and kept["unjudged"] == 0
    for name in ("kept.jsonl", "dropped.jsonl", "evaluated.jsonl"):
        assert sorted(_without_address(calm / name)) == sorted(_without_address(rough / name))
    steps = [step for t in read_trajectories(rough / "kept.jsonl") for step in t.steps]
    assert all(step.verdict == "GOOD" and 0 <= step.reward <= 1 for step in steps)
    assert not any(step.reward for t in read_trajectories(rough / "dropped.jsonl") for step in t.steps)
    score = evaluated.result
    assert score["questions"] == 12 and score["unanswered"] == score["unjudged_answers"] == 0
    low, high = score["judged_interval"]
    assert low <= score["judged_accuracy"] <= high and 0 <= score["good_steps"] <= 1
    for name in ("trajectories.jsonl", "kept.jsonl", "evaluated.jsonl"):
        assert kept_answers(rough / f"{name}.answers.sqlite") > 0


def _without_address(path):
    """Lines without the server's port, and without the digest that holds it."""
    return [re.sub(rb'127\.0\.0\.1:\d+|,"swirl_digest":"\w+"', b"", line) for line in lines(path)]


def test_what_failed_is_counted_and_asked_for_by_the_next_run(tmp_path):
    async def all_of_it():
        async with FaultServer(model, script=["stall", "not_json", "418"]) as server:
            first = await generate(tmp_path, server.url, *FAST)
            asked = len(server.log)
            again = await generate(tmp_path, server.url)
            answered = Counter(digest for digest, what in server.log if what == "ok")
            assert max(answered.values()) == 1  # a trajectory that failed late is not asked from its start
            undisturbed = tmp_path / "undisturbed"
            await generate(tmp_path, server.url, "--out", undisturbed)
            assert lines(undisturbed) == lines(tmp_path / "trajectories.jsonl")
            return first, again, len(server.log) - asked

    first, again, _ = asyncio.run(all_of_it())
    assert (first.result["trajectories"], first.result["new"], first.result["unanswered"]) == (9, 9, 3)
    (warning,) = first.warnings
    for part in ("3 trajectories unanswered", "1 x ", "no answer within 1 s", "expected JSON", "HTTP 418"):
        assert part in warning
    assert (again.result["trajectories"], again.result["new"], again.result["unanswered"]) == (12, 3, 0)
    assert not again.warnings


def test_an_answer_that_a_server_s_end_cut_off_is_no_wrong_answer(tmp_path):
    ends = iter(["abort", "error", "gateway"])

    def dying(path, payload):
        answer, end = model(path, payload), next(ends, None)
        if end == "gateway":
            return {"status": "restarting"}
        if end:
            answer["choices"][0] |= {"finish_reason": end, "message": {"content": "<sear"}}
        return answer

    async def all_of_it():
        async with FaultServer(dying) as server:
            first = await generate(tmp_path, server.url)
            again = await generate(tmp_path, server.url)
            await generate(tmp_path, server.url, "--out", "undisturbed.jsonl")
            return first, again

    first, again = asyncio.run(all_of_it())
    assert (first.result["new"], first.result["unanswered"], first.result["stops"]) == (9, 3, {"answer": 9})
    assert "ended the answer with 'abort'" in first.warnings[0] and "choices[0].message.content" in first.warnings[0]
    assert (again.result["new"], again.result["unanswered"], again.result["stops"]) == (3, 0, {"answer": 3})
    assert lines(tmp_path / "undisturbed.jsonl") == lines(tmp_path / "trajectories.jsonl")


def test_nothing_answered_is_an_error_and_not_an_empty_success(tmp_path):
    async def all_of_it():
        async with FaultServer(model, faults=1.0, kinds=["not_json"]) as server:
            made = await generate(tmp_path, server.url, code=1)
            flags = ("--policy", f"{server.url}/v1#policy", "--num-questions", 3, "--task", "bridge")
            return made, await run(tmp_path, "evaluate", *flags, code=1)

    for done, what in zip(asyncio.run(all_of_it()), ("12 trajectories", "3 questions"), strict=True):
        assert f"none of {what} was answered" in done.errors[0] and "expected JSON" in done.errors[0]
    assert (tmp_path / "trajectories.jsonl").read_bytes() == b""


def test_a_refused_key_ends_the_job_which_goes_on_later(tmp_path):
    async def all_of_it():
        async with FaultServer(model, script=["ok"] * 15 + ["401"] * 99) as server:
            refused = await generate(tmp_path, server.url, "--in-flight", 2, code=1)
            kept = len(lines(tmp_path / "trajectories.jsonl"))
            assert 16 <= len(server.log) <= 17
        other = FaultServer(model)
        url = await other.start(server.port)
        done = await generate(tmp_path, url, "--in-flight", 3)
        await other.stop()
        assert max(Counter(digest for digest, what in server.log + other.log if what == "ok").values()) == 1
        return refused, done, kept

    refused, done, kept = asyncio.run(all_of_it())
    assert "HTTP 401" in refused.errors[0] and 0 < kept < 12
    assert (done.result["trajectories"], done.result["new"]) == (12, 12 - kept)


def test_token_ids_travel_where_the_tokenizer_is_known(tmp_path):
    tokenizer = Tokenizer.from_pretrained(ALMANAC_BASE)

    def with_ids(path, payload):
        answer = model(path, payload)
        (choice,) = answer["choices"]
        choice["token_ids"] = tokenizer.action_ids(choice["message"]["content"])
        choice["logprobs"] = {"content": [{"token": "?", "logprob": -0.5} for _ in choice["token_ids"]]}
        return answer

    async def all_of_it():
        flags = ("--tokenizer", ALMANAC_BASE, "--out")
        async with FaultServer(with_ids) as server:
            await generate(tmp_path, server.url, *flags, "given.jsonl")
        async with FaultServer(model) as server:
            await generate(tmp_path, server.url, *flags, "made.jsonl")
        absent = await generate(tmp_path, server.url, "--tokenizer", tmp_path, code=1)
        own = await run(tmp_path, "generate", *flags, "x.jsonl", code=2)
        assert "tokenizer.json: no such file" in absent.errors[0] and "has its own" in own.errors[0]

    asyncio.run(all_of_it())
    given, made = (
        sorted(read_trajectories(tmp_path / name), key=lambda t: t.id) for name in ("given.jsonl", "made.jsonl")
    )
    assert [t.sub_trajectories() for t in given] == [t.sub_trajectories() for t in made]
    assert not any(t.retokenized for t in given) and all(t.retokenized for t in made)
    assert {t.tokenizer for t in given + made} == {tokenizer.fingerprint}
    assert all(len(step.log_probs) == len(step.action_ids) for t in given for step in t.steps)


def test_no_answer_is_paid_for_twice(tmp_path):
    async def all_of_it():
        async with FaultServer(model) as server:
            await generate(tmp_path, server.url)
            asked = len(server.log)
            assert kept_answers(tmp_path / "trajectories.jsonl.answers.sqlite") == asked
            before = lines(tmp_path / "trajectories.jsonl")
            (tmp_path / "trajectories.jsonl").unlink()
            await generate(tmp_path, server.url, "--endpoint.concurrency", 5)
            assert lines(tmp_path / "trajectories.jsonl") == before and len(server.log) == asked
            flags = ("--out", "other.jsonl", "--cache", "trajectories.jsonl.answers.sqlite")
            done = await generate(tmp_path, server.url, *flags)
            assert lines(tmp_path / "other.jsonl") == before and len(server.log) == asked
            assert f"{asked} done · {asked} cached · 0 in flight" in done.err
            flags = ("--policy", f"{server.url}/v1#policy", "--num-questions", 3, "--task", "bridge")
            for cache, new in (((), 1), ((), 1), (("--cache", "c.sqlite"), 1), (("--cache", "c.sqlite"), 0)):
                asked = len(server.log)
                done = await run(tmp_path, "evaluate", *flags, *cache)
                assert (len(server.log) > asked) == bool(new)
                assert bool(done.warnings) == (not new)
            assert "were paid for before and come from c.sqlite" in done.warnings[0]

    asyncio.run(all_of_it())
    assert not (tmp_path / "other.jsonl.answers.sqlite").exists()


def test_nothing_is_kept_where_no_server_is_asked(tmp_path):
    async def all_of_it():
        async with FaultServer(model) as server:
            await generate(tmp_path, server.url, "--out", "t.jsonl")
        await run(tmp_path, "filter", "--data", "t.jsonl")

    asyncio.run(all_of_it())
    assert [path.name for path in tmp_path.glob("*.sqlite")] == ["t.jsonl.answers.sqlite"]


def test_scores_say_how_many_questions_they_leave_out(tmp_path):
    async def all_of_it():
        flags = ("--num-questions", 12, "--task", "bridge", "--judge", "none")
        async with FaultServer(model, script=["418", "not_json"]) as server:
            return await run(tmp_path, "evaluate", "--policy", f"{server.url}/v1#policy", *flags)

    done = asyncio.run(all_of_it())
    score = done.result
    assert (score["questions"], score["unanswered"], score["correct"].count(None)) == (12, 2, 2)
    assert score["accuracy"] == np.mean([right for right in score["correct"] if right is not None])
    assert score["judged_accuracy"] is None and score["unjudged_answers"] == 0
    assert "bridge: 2 of 12 questions unanswered" in done.warnings[0]


def test_unjudged_trajectories_are_judged_by_the_next_run(tmp_path):
    async def all_of_it():
        async with FaultServer(model) as server:
            await generate(tmp_path, server.url)
        flags = ("--data", "trajectories.jsonl", "--mode", "process", "--in-flight", 1)
        async with FaultServer(model, script=["418", "ok", "418"]) as server:
            judge = f"{server.url}/v1#judge"
            first = await run(tmp_path, "filter", *flags, "--judge", judge)
            again = await run(tmp_path, "filter", *flags, "--judge", judge)
            assert max(Counter(digest for digest, what in server.log if what == "ok").values()) == 1
            never = ("--kept", "k.jsonl", "--dropped", "d.jsonl", "--judge", f"{server.url}/v1#mumbling")
            mumbled = await run(tmp_path, "filter", *flags, *never)
            asked = len(server.log)
            assert (await run(tmp_path, "filter", *flags, *never)).result == mumbled.result
            assert len(server.log) == asked  # what the judge said is kept, though it holds no verdict
            return first, again, mumbled

    first, again, mumbled = asyncio.run(all_of_it())
    assert first.result["unanswered"] == first.result["dropped_now"]["unanswered"] > 0 == first.result["unjudged"]
    assert "unanswered, the same command asks for them again" in first.warnings[0] and "HTTP 418" in first.warnings[0]
    assert again.result["unjudged"] == again.result["unanswered"] == 0 and not again.warnings
    assert again.result["kept"] + again.result["dropped"] == 12
    assert mumbled.result["unjudged"] == mumbled.result["dropped"] == 12 and mumbled.result["unanswered"] == 0
    (warning,) = mumbled.warnings
    assert "12 trajectories unjudged, which asking again would not change" in warning and "I cannot tell." in warning
    assert all(t.dropped.startswith("unjudged: ") for t in read_trajectories(tmp_path / "d.jsonl"))


def test_an_outcome_or_a_reward_without_an_answer_is_asked_for_again(tmp_path):
    broken = {"answers": 1, "reward": 99}  # requests of each model that fail

    def failing(path, payload):
        broken[payload["model"]] = broken.get(payload["model"], 0) - 1
        return web.Response(status=418) if broken[payload["model"]] >= 0 else model(path, payload)

    async def all_of_it():
        async with FaultServer(failing) as server:
            await generate(tmp_path, server.url)
            flags = ("--data", "trajectories.jsonl", "--in-flight", 1, "--mode", "outcome", "--votes", 2)
            flags += ("--outcome-judge", f"{server.url}/v1#answers", "--reward-judge", f"{server.url}/v1#reward")
            first = await run(tmp_path, "filter", *flags)
            broken.clear()
            return first, await run(tmp_path, "filter", *flags)

    first, again = asyncio.run(all_of_it())
    (warning,) = first.warnings
    assert "the final answer has no verdict (HTTP 418" in warning and "has no reward (HTTP 418" in warning
    assert first.result["unanswered"] > 1 and first.result["unjudged"] == 0
    assert again.result["unanswered"] == again.result["unjudged"] == 0 and not again.warnings
    assert again.result["kept"] + again.result["dropped"] == 12


def test_a_judge_s_template_can_be_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("GOOD as {question} and\n{action} after {context} are.\nGOOD")
    (tmp_path / "torn.txt").write_text("{question}")

    async def all_of_it():
        async with FaultServer(model) as server:
            await generate(tmp_path, server.url)
            flags = ("--data", "trajectories.jsonl", "--judge", f"{server.url}/v1#echo")
            done = await run(tmp_path, "filter", *flags, "--judge-prompt", "mine.txt")
            torn = await run(tmp_path, "filter", *flags, "--judge-prompt", "torn.txt", code=2)
            absent = await run(tmp_path, "filter", *flags, "--judge-prompt", "absent.txt", code=1)
            before = lines(tmp_path / "kept.jsonl")
            (tmp_path / "deep").mkdir()
            (tmp_path / "deep" / "mine.txt").write_bytes((tmp_path / "mine.txt").read_bytes())
            await run(tmp_path, "filter", *flags, "--judge-prompt", "deep/mine.txt")
            (tmp_path / "mine.txt").write_text("BAD as {question} and\n{action} after {context} are.\nBAD")
            other = await run(tmp_path, "filter", *flags, "--judge-prompt", "mine.txt", code=2)
            assert re.search(r"was begun with --judge \S+ \(mine-v.*, not \S+ \(mine-v", other.errors[0])
            assert lines(tmp_path / "kept.jsonl") == before
            return done, torn, absent

    done, torn, absent = asyncio.run(all_of_it())
    assert done.result["kept"] == 12 and re.search(r"mine-v[0-9a-f]{8}", done.result["judge"])
    assert "expected the placeholder {context}" in torn.errors[0] and "absent.txt" in absent.errors[0]


PAGES = [
    {"title": "Norland", "text": "The capital of Norland is Vik."},
    {"title": "Sudland", "text": "The capital of Sudland is Tor."},
    {"title": "Herring", "text": "A fish of cold seas."},
]


@pytest.fixture
def own_questions(tmp_path):
    questions = [{"question": f"What is the capital of {land}?", "answer": "Vik"} for land in ("Norland", "Sudland")]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "pages.jsonl").write_text("\n".join(map(json.dumps, PAGES)))
    return ("--task", "own", "--questions", "q.jsonl", "--samples", 1)


def observations(path):
    return sorted(t.steps[0].observation for t in read_trajectories(path))


def test_search_by_meaning_indexes_once_beside_the_pages(tmp_path, own_questions):
    flags = (*own_questions, "--corpus", "pages.jsonl")

    async def all_of_it():
        async with FaultServer(model) as server:
            server.keep_requests = True
            dense = ("--retriever", f"dense+{server.url}/v1#org/tiny")
            await generate(tmp_path, server.url, *flags, *dense)
            assert (tmp_path / "pages.jsonl.dense-org-tiny").is_dir()
            asked = len(server.bodies)
            await generate(tmp_path, server.url, *flags, *dense, "--out", "again.jsonl")
            assert not any("Herring" in str(body.get("input")) for body in server.bodies[asked:])
            evaluated = ("--policy", f"{server.url}/v1#policy", "--task", "own", *flags[2:4], *flags[6:])
            score = (await run(tmp_path, "evaluate", *evaluated, *dense)).result
            assert (score["accuracy"], score["good_steps"]) == (1.0, None)  # Almanac's judge was not asked
            (tmp_path / "pages.jsonl").write_text(json.dumps(PAGES[0]))
            return await generate(tmp_path, server.url, *flags, *dense, "--out", "new.jsonl", code=1)

    changed = asyncio.run(all_of_it())
    assert "dense-org-tiny: expected an index of pages.jsonl as it is now" in changed.errors[0]
    found = [f"{page['title']}: {page['text']}" for page in PAGES[:2]]
    assert [said.partition(" -> ")[2] for said in observations(tmp_path / "trajectories.jsonl")] == found
    assert observations(tmp_path / "again.jsonl") == observations(tmp_path / "trajectories.jsonl")


def test_search_by_a_retrieval_server(tmp_path, own_questions):
    async def all_of_it():
        async with FaultServer(model) as server:
            server.keep_requests = True
            flags = ("--retriever", f"{server.url}/retrieve", "--top-k", 2)
            await generate(tmp_path, server.url, *own_questions, *flags, SWIRL_API_KEY="for-the-model")
            asked = [k for k, body in enumerate(server.bodies) if "queries" in body]
            assert sum(len(server.bodies[k]["queries"]) for k in asked) == 2
            assert all(server.bodies[k]["topk"] == 2 and "Authorization" not in server.headers[k] for k in asked)
            wrong = [
                await generate(tmp_path, server.url, "--retriever", name, "--out", "x.jsonl", *task, code=2)
                for name, task in (
                    ("bm26", own_questions),
                    (f"dense+{server.url}/v1", own_questions),
                    (f"dense+{server.url}/v1#m", ()),
                    (f"{server.url}/retrieve", ("--task", "arithmetic")),
                )
            ]
            return [done.errors[0] for done in wrong]

    errors = asyncio.run(all_of_it())
    assert all("Vik" in said for said in observations(tmp_path / "trajectories.jsonl"))
    said = ("expected bm25, dense+", "names no model", "no file of pages", "--retriever: means nothing to task")
    assert all(part in error for part, error in zip(said, errors, strict=True)), errors
    assert not (tmp_path / "x.jsonl").exists()


def test_a_search_that_got_no_answer_is_not_what_the_policy_reads(tmp_path, own_questions):
    failures = iter([web.Response(text="busy"), web.Response(status=422, text="no such query")])

    def failing(path, payload):
        return next(failures, None) or model(path, payload) if path == "/retrieve" else model(path, payload)

    async def all_of_it():
        async with FaultServer(failing) as server:
            flags = (*own_questions, "--retriever", f"{server.url}/retrieve", "--num-questions", 1, "--out", "t.jsonl")
            first = await generate(tmp_path, server.url, *flags, code=1)
            await generate(tmp_path, server.url, *flags)
            await generate(tmp_path, server.url, *own_questions, "--retriever", f"{server.url}/retrieve")
            return first

    assert "expected JSON" in asyncio.run(all_of_it()).errors[0]
    (refused,) = observations(tmp_path / "t.jsonl")
    assert "search failed: HTTP 422: no such query" in refused
    assert not any("search failed" in said for said in observations(tmp_path / "trajectories.jsonl"))


def test_what_other_weights_began_is_not_gone_on_with(tmp_path, tiny_folder):
    model, copy = tmp_path / "model", tmp_path / "copy"
    for folder in (model, copy):
        shutil.copytree(tiny_folder, folder)
    weights = model / "model.safetensors"
    assert checkpoint_digest(model) == checkpoint_digest(copy)

    async def all_of_it():
        flags = ("--policy", "model", "--num-questions", 1, "--samples", 2, "--max-new-tokens", 4, "--out", "t.jsonl")
        judged = ("--data", "t.jsonl", "--judge", "model")
        for _ in range(2):
            made = await run(tmp_path, "generate", *flags)
            kept = await run(tmp_path, "filter", *judged)
        assert (made.result["new"], kept.result["kept"] + kept.result["dropped"]) == (0, 2)
        trained = load_file(weights)
        (model / "digests.json").unlink()
        save_file({name: tensor + 1e-3 for name, tensor in trained.items()}, weights, {"format": "pt"})
        assert weights.stat().st_size == (copy / weights.name).stat().st_size
        return [await run(tmp_path, *words, code=2) for words in (("generate", *flags), ("filter", *judged))]

    for done, flag in zip(asyncio.run(all_of_it()), ("policy", "judge"), strict=True):
        assert re.search(rf"was begun with --{flag} model.* \([0-9a-f]{{16}}\), not model", done.errors[0])


@pytest.mark.parametrize("size", [0, 1, 5000, 4096 * 256, 4096 * 256 + 1, 9_000_001])
def test_a_checkpoint_s_digest_sees_both_ends_and_the_size(size, tmp_path):
    path = tmp_path / "model.safetensors"
    content = np.random.default_rng(size).bytes(size)
    others = [content + b"x"] + [content[:at] + b"\1" + content[at + 1 :] for at in ((0, size - 1) if size else ())]
    digests = []
    for one in (content, *others, content):
        path.write_bytes(one)
        digests.append(checkpoint_digest(tmp_path))
    assert digests[0] == digests[-1] not in digests[1:-1]


def test_a_config_s_own_check_names_its_flag_and_no_empty_key(tmp_path):
    (tmp_path / "c.json").write_text('{"samples": 0}')
    (tmp_path / "d.json").write_text('{"endpoint": {"concurrency": "many"}}')

    async def all_of_it():
        return [await run(tmp_path, "generate", "--config", name, code=2) for name in ("c.json", "d.json")]

    flag, key = asyncio.run(all_of_it())
    assert flag.errors == ["error: c.json: --samples 0: expected at least 1"]
    assert key.errors[0].startswith("error: d.json: key 'endpoint.concurrency': Expected `int`")


def test_the_key_reaches_the_server_and_nothing_else(tmp_path):
    secret = "sk-very-secret-0123456789"
    refusals = iter(range(3))

    def leaky(path, payload):
        if payload["model"] == "policy" and next(refusals, None) is not None:
            return web.Response(status=400, text=f"{secret} may not do that")
        return {**model(path, payload), "echo": secret}

    async def all_of_it():
        key = {"SWIRL_API_KEY": secret}
        async with FaultServer(leaky, script=["ok"] * 40 + ["401"]) as server:
            server.keep_requests = True
            made = await generate(tmp_path, server.url, **key)
            assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {secret}"}
            server.answer = lambda path, payload: web.Response(status=403, text=f"{secret} is not welcome")
            refused = await generate(tmp_path, server.url, "--out", "refused.jsonl", code=1, **key)
            flags = ("--data", "trajectories.jsonl", "--judge", f"{server.url}/v1#judge")
            return made, refused, await run(tmp_path, "filter", *flags, code=1, **key)

    runs = asyncio.run(all_of_it())
    assert runs[0].result["unanswered"] == 3 and "*** may not do that" in runs[0].warnings[0]
    said = "".join(str(vars(done)) for done in runs) + str([file.name for file in tmp_path.rglob("*")])
    assert secret not in said
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
