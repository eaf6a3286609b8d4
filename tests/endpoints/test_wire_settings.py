"""What a command is held to when it is called again: weights, settings, keys."""

from __future__ import annotations

import asyncio
import re
import shutil

import numpy as np
import pytest
from aiohttp import web

from benchmarks.fault_server import FaultServer
from swirl.storage.digest import checkpoint_digest
from tests.endpoints.loopback import (
    generate,
    model,
    run,
)


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
        (model / "digests.json").unlink()
        trained = bytearray(weights.read_bytes())
        trained[-4] ^= 1  # the last bit of the last weight
        weights.write_bytes(trained)
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
