"""swirl.serve asked by swirl's own client, by the official `openai` package, and by the bare protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

from swirl.app.resolve import load_model
from swirl.endpoints.address import open_wire_policy
from swirl.endpoints.client import Client
from swirl.rollout.policy import PolicyState
from swirl.sampling.local_policy import LocalPolicy

ROOT = Path(__file__).parents[2]
KEY = "sesame"
PROMPT = "Think, then answer.\nQuestion: Who is the founder of Gorvale?"


def start(*flags: str, **environment: str) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "swirl.serve", "--port", "0", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("almanac: http://"), line + process.stderr.read()
    return process, line.split()[1]


@pytest.fixture(scope="module")
def server():
    process, url = start(SWIRL_SERVE_KEY=KEY)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def here():
    model, tokenizer = load_model("almanac")
    return LocalPolicy(model, tokenizer), tokenizer


@pytest.fixture(autouse=True)
def no_proxy_and_the_key(monkeypatch):
    monkeypatch.setenv("SWIRL_API_KEY", KEY)


async def acted(policy, states):
    return [await policy.act(state) for state in states]


def acted_over_the_wire(protocol, here, server, states):
    async def ask():
        async with Client() as client:
            policy = open_wire_policy(f"{protocol}+{server}#almanac", client=client, tokenizer=here[1])
            return await acted(policy, states)

    return asyncio.run(ask())


def test_swirls_own_client_gets_what_the_policy_gives_here(server, here):
    policy, tokenizer = here
    states = [
        PolicyState(prompt=PROMPT, ids=tuple(tokenizer.prompt_ids(PROMPT)), seed=5, temperature=t, max_new_tokens=20)
        for t in (0.0, 1.0)
    ]

    mine = asyncio.run(acted(policy, states))
    for protocol in ("completions", "chat"):
        for step, truth in zip(acted_over_the_wire(protocol, here, server, states), mine, strict=True):
            assert (step.action, step.action_ids, step.truncated) == (truth.action, truth.action_ids, truth.truncated)
            assert step.log_probs == pytest.approx(truth.log_probs)


def test_an_action_ends_at_its_tag_over_the_wire_as_it_does_here(server, here):
    policy, tokenizer = here
    ids = tuple(tokenizer.prompt_ids(PROMPT))
    states = [
        PolicyState(prompt=PROMPT, ids=ids, seed=seed, max_new_tokens=40, stop_texts=("</search_query>", "</answer>"))
        for seed in range(6)
    ]

    mine = asyncio.run(acted(policy, states))
    assert any(step.stop_text for step in mine)
    for protocol in ("completions", "chat"):
        for step, truth in zip(acted_over_the_wire(protocol, here, server, states), mine, strict=True):
            assert (step.action, step.action_ids, step.stop_text) == (truth.action, truth.action_ids, truth.stop_text)
            assert step.log_probs == pytest.approx(truth.log_probs)


def test_swirls_own_client_goes_on_without_alternatives_which_are_not_given(server, here):
    policy, tokenizer = here
    ids = tuple(tokenizer.prompt_ids(PROMPT))
    states = [PolicyState(prompt=PROMPT, ids=ids, temperature=0, max_new_tokens=8, top_log_probs=5)]

    (mine,) = asyncio.run(acted(policy, states))
    for protocol in ("completions", "chat"):
        (step,) = acted_over_the_wire(protocol, here, server, states)
        assert (step.action, step.top_log_probs) == (mine.action, None)


def test_openai_chat(client, here):
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(
        model="almanac", messages=messages, temperature=0, max_tokens=12, logprobs=True, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    first, second = (choice.message.content for choice in answer.choices)
    assert first == second and answer.usage.completion_tokens == 2 * len(answer.choices[0].logprobs.content)
    policy, tokenizer = here
    ids = tuple(tokenizer.prompt_ids(PROMPT))
    mine = asyncio.run(policy.act(PolicyState(prompt=PROMPT, ids=ids, temperature=0, max_new_tokens=12)))
    assert first == mine.action
    stream = client.chat.completions.create(
        model="almanac", messages=messages, temperature=0, max_tokens=12, stream=True
    )
    pieces = list(stream)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == first
    assert pieces[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_openai_completions_stream_stop_and_seed(client):
    options = dict(model="almanac", prompt=["Who is", "Its setting is"], max_tokens=24, temperature=1.0, seed=3)
    answer = client.completions.create(**options, n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(c.logprobs.tokens) == len(c.logprobs.token_logprobs) for c in answer.choices)
    again = client.completions.create(**options, n=2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]
    texts = dict.fromkeys(range(4), "")
    for piece in client.completions.create(**options, n=2, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert list(texts.values()) == [choice.text for choice in answer.choices]
    whole = max(texts.values(), key=len)
    index = list(texts.values()).index(whole)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    stopped = client.completions.create(**options, n=2, stop=[stop]).choices[index]
    assert stopped.text == whole[: whole.index(stop)] and stopped.finish_reason == "stop"
    streamed = ""
    for piece in client.completions.create(**options, n=2, stop=[stop], stream=True):
        streamed += piece.choices[0].text if piece.choices[0].index == index else ""
    assert streamed == stopped.text
    cut = client.completions.create(**options | {"max_tokens": 1})
    assert {choice.finish_reason for choice in cut.choices} == {"length"}


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["almanac"]
    with urllib.request.urlopen(server.removesuffix("/v1") + "/health") as answer:
        assert json.load(answer) == {"status": "ok"}


def ask(url, body, key=KEY):
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(
    "path, fields, status, words",
    [
        ("completions", {"prompt": "a", "model": "other"}, 404, "'almanac'"),
        ("completions", {"prompt": "a", "max_tokens": 9000}, 400, "context"),
        ("completions", {"prompt": [[1, 5000]]}, 400, "token ids in"),
        ("completions", {"prompt": []}, 400, "prompt"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 100}}, 400, "logit_bias"),
        ("completions", {"prompt": "a", "beam_width": 2}, 400, "beam_width"),
        ("completions", {"prompt": ["a"] * 200, "n": 2}, 400, "at most 256"),
        ("completions", {"prompt": "a", "stop": ["b"] * 17}, 400, "$.stop"),
        ("completions", {"prompt": "a", "logprobs": 5}, 400, "$.logprobs"),
        ("completions", {"prompt": [[1, 2], [1, 5000]], "stream": True}, 400, "token ids in"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, 400, "in turn"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3}, 400, "top_logprobs"),
    ],
)
def test_what_is_not_served_is_refused_in_a_line(server, path, fields, status, words):
    got, answer = ask(f"{server}/{path}", json.dumps(fields).encode())
    assert got == status and words in answer["error"]["message"], answer


def test_no_json_a_wrong_key_and_a_large_body_are_refused(server):
    for body in (b"{", b'{"prompt": "\xff"}', b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[]", b""):
        status, answer = ask(f"{server}/completions", body)
        assert status == 400 and "expected a JSON object" in answer["error"]["message"]
    assert ask(f"{server}/completions", b"{}", key="wrong")[0] == 401
    assert ask(f"{server}/completions", b" " * (17 << 20))[0] == 413


def test_an_open_address_needs_a_key():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SWIRL_SERVE_KEY": ""}
    command = [sys.executable, "-m", "swirl.serve", "--host", "0.0.0.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "needs a key" in done.stderr


def test_ctrl_c_finishes_what_is_in_flight():
    process, url = start("--max-concurrency", "1")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    # at this temperature a draw hardly depends on the model, and this seed's draws 3,203 tokens
    long = dict(model="almanac", prompt="a", max_tokens=2000, temperature=100, seed=186)
    stream = iter(client.completions.create(**long, stream=True))
    next(stream)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="almanac", prompt="b")
    process.send_signal(signal.SIGINT)
    pieces = list(stream)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert process.wait(20) == 0
