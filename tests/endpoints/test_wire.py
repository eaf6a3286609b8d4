"""generate, filter and evaluate over HTTP, as a user runs them, against a server on loopback that fails on purpose."""

from __future__ import annotations

import asyncio
import re
from collections import Counter

import numpy as np

from benchmarks.fault_server import FaultServer
from swirl.app.resolve import ALMANAC_BASE
from swirl.model.tokenizer import Tokenizer
from swirl.trajectories.log import read_trajectories
from tests.endpoints.loopback import (
    FAST,
    TRANSIENT,
    generate,
    kept_answers,
    lines,
    model,
    run,
)


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
