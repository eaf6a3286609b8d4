"""Judges and templates over HTTP: what was not judged is asked for again."""

from __future__ import annotations

import asyncio
import re
from collections import Counter

from aiohttp import web

from benchmarks.fault_server import FaultServer
from swirl.trajectories.log import read_trajectories
from tests.endpoints.loopback import (
    generate,
    lines,
    model,
    run,
)


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
