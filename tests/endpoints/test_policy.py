"""Policies over the wire, against answers in the forms that vLLM, llama.cpp, transformers and Gemini give."""

from __future__ import annotations

import asyncio
import logging

import pytest
from aiohttp import web

from benchmarks.fault_server import FaultServer
from swirl.app.resolve import ALMANAC_BASE
from swirl.endpoints.address import endpoint_for, open_wire_policy, parse_spec
from swirl.endpoints.chat import ChatPolicy
from swirl.endpoints.client import Client
from swirl.endpoints.completions import CompletionsPolicy
from swirl.endpoints.endpoint import Endpoint
from swirl.endpoints.gemini import GeminiPolicy
from swirl.endpoints.turns import chat_messages, gemma_turns
from swirl.errors import ConfigError, EndpointError
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.policy import PolicyState
from swirl.trajectories.record import Step

STATE = PolicyState(
    prompt="Who?",
    steps=(Step(action="<search_query>x</search_query>", observation="x -> y"),),
    seed=2**62 + 5,
    temperature=0.7,
    max_new_tokens=33,
)


def act(kind, answer, *states, server_arguments=None, **arguments):
    """(actions, server) of one policy asked for all states at one time."""
    server = FaultServer(answer, **(server_arguments or {}))
    server.keep_requests = True

    async def run():
        async with server, Client() as client:
            policy = kind(Endpoint(f"{server.url}/v1", read_s=5.0, backoff_s=0.01), "m", client, **arguments)
            return await asyncio.gather(*(policy.act(state) for state in states or (STATE,)))

    return asyncio.run(run()), server


def chat_answer(content="<answer>y</answer>", **choice):
    made = {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": "stop",
        **choice,
    }
    return lambda path, payload: {"choices": [made]}


def test_chat_keeps_what_vllm_gives():
    tokens = [{"token": "<answer>", "logprob": -0.5, "top_logprobs": []}, {"token": "y", "logprob": -1.5}]
    (action,), server = act(ChatPolicy, chat_answer(token_ids=[7, 8], logprobs={"content": tokens}))
    assert (action.action, action.action_ids, action.log_probs, not action.truncated) == (
        "<answer>y</answer>",
        (7, 8),
        (-0.5, -1.5),
        True,
    )
    (sent,) = server.bodies
    assert sent["messages"] == [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "<search_query>x</search_query>"},
        {"role": "user", "content": "x -> y"},
    ]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("m", 33, 0.7, 5)
    assert sent["logprobs"] is True and sent["return_token_ids"] is True and "top_logprobs" not in sent


@pytest.mark.parametrize("token", [{"id": 9}, {"token": "token_id:9"}])
def test_chat_reads_ids_beside_log_probs(token):
    (action,), _ = act(ChatPolicy, chat_answer(logprobs={"content": [{"token": "y", "logprob": -1.0, **token}]}))
    assert action.action_ids == (9,) and action.log_probs == (-1.0,)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"logprobs": None},
        {"logprobs": {"content": None}},
        {"logprobs": {"content": [{"token": "y", "logprob": -1.0}]}},  # log-probs of tokens that are not known
        {"logprobs": {"content": ["garbage"]}},
        {
            "token_ids": [7, 8],
            "logprobs": {"content": [{"token": "y", "logprob": -1.0}]},
        },  # lengths that do not fit
        {"token_ids": [7.5]},
        {"token_ids": [-1]},
    ],
)
def test_nothing_is_made_up(choice):
    (action,), _ = act(ChatPolicy, chat_answer(**choice))
    assert action.log_probs is None and action.action_ids in (None, (7, 8)) and action.action == "<answer>y</answer>"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(ALMANAC_BASE)


def with_ids(tokenizer, *, text="<answer>y</answer>", shift=0, end=(), reason="stop"):
    """A chat answer whose token ids are those of the text, moved by `shift`, and `end`."""
    ids = [n + shift for n in tokenizer.encode(text)] + list(end)
    tokens = [{"token": "?", "logprob": -0.5} for _ in ids]
    return chat_answer(text, token_ids=ids, logprobs={"content": tokens}, finish_reason=reason)


def test_ids_of_the_model_s_tokenizer_are_kept_in_our_form(tokenizer):
    text = tokenizer.encode("<answer>y</answer>")
    for end in (tokenizer.end_of_turn_id, tokenizer.eos_id):
        (action,), _ = act(ChatPolicy, with_ids(tokenizer, end=[end]), tokenizer=tokenizer)
        assert action.action_ids == (*text, end) and len(action.log_probs) == len(action.action_ids)
    (action,), _ = act(ChatPolicy, with_ids(tokenizer), tokenizer=tokenizer)
    assert action.action_ids == tuple(tokenizer.action_ids("<answer>y</answer>")) and action.log_probs is None
    (action,), _ = act(ChatPolicy, with_ids(tokenizer, reason="length"), tokenizer=tokenizer)
    assert action.action_ids == tuple(text) and len(action.log_probs) == len(text) and action.truncated
    for shift in (1, tokenizer.vocab_size):
        (action,), _ = act(ChatPolicy, with_ids(tokenizer, shift=shift), tokenizer=tokenizer)
        assert action.action_ids is None and action.log_probs is None and action.action == "<answer>y</answer>"


@pytest.mark.parametrize("reason, stopped", [("stop", True), ("eos", True), (None, True), ("length", False)])
def test_cut_off_answers_are_not_stopped(reason, stopped):
    (action,), _ = act(ChatPolicy, chat_answer(finish_reason=reason))
    assert action.truncated is not stopped
    (action,), _ = act(ChatPolicy, chat_answer(None, finish_reason=reason))
    assert action.action == ""


NO_ANSWERS = {
    ChatPolicy: [{"choices": []}, {"gateway": "busy"}, chat_answer(finish_reason="abort")(None, None),
                 chat_answer("<ans", finish_reason="error")(None, None)],
    CompletionsPolicy: [{"choices": []}, {"choices": [{"index": 0, "text": 5}]},
                        {"choices": [{"index": 0, "text": "<ans", "finish_reason": "abort"}]}],
    GeminiPolicy: [{"candidates": []}, {"candidates": [{"content": {"parts": [{"text": 5}]}}]}],
}  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind, unread", [(kind, answer) for kind, all_of in NO_ANSWERS.items() for answer in all_of])
def test_what_cannot_be_read_is_not_kept_and_asked_for_by_the_next_run(kind, unread, temperature, tmp_path):
    good = {ChatPolicy: chat_answer(), CompletionsPolicy: completion, GeminiPolicy: gemini_answer}[kind]
    answers = iter([unread])
    state = PolicyState(prompt="Who?", temperature=temperature)

    async def run():
        async with FaultServer(lambda path, payload: next(answers, None) or good(path, payload)) as server:
            made, asked = [], []
            for _ in range(3):
                async with Client(tmp_path / "answers.sqlite") as client:
                    policy = kind(Endpoint(f"{server.url}/v1", backoff_s=0.01), "m", client)
                    both = (policy.act(state), policy.act(state))
                    made.append(await asyncio.gather(*both, return_exceptions=True))
                    asked.append(len(server.log))
                    assert client.progress.failed == (len(asked) == 1) and client.progress.in_flight == 0
            return made, asked

    (failed, answered, kept), asked = asyncio.run(run())
    assert all(isinstance(error, EndpointError) for error in failed)
    assert answered == kept and answered[0] == answered[1] and not answered[0].truncated
    assert asked == [1, 2, 2]


@pytest.mark.parametrize("answer", [{}, [], {"choices": []}, {"choices": [{"text": "y"}]}, "text", 3, None,
                                    {"choices": [{"message": {"content": ["parts"]}}]}])  # fmt: skip
@pytest.mark.parametrize("kind", [ChatPolicy, CompletionsPolicy, GeminiPolicy])
def test_answers_of_another_form_are_refused(kind, answer):
    with pytest.raises(EndpointError, match="expected"):
        act(kind, lambda path, payload: answer)


@pytest.mark.parametrize("status", [400, 422])
def test_fields_a_server_refuses_are_left_out_and_said(status, caplog):
    def strict(path, payload):
        unknown = sorted({"return_token_ids", "logprobs"} & payload.keys())
        if unknown:
            return web.Response(status=status, text=f"Unexpected fields in the request: {unknown[:1]}")
        return chat_answer()(path, payload)

    with caplog.at_level(logging.WARNING, "swirl.client"):
        actions, server = act(ChatPolicy, strict, STATE)
    assert actions[0].action and len(server.bodies) == 3 and "seed" in server.bodies[-1]
    assert "refuses 'logprobs'" in caplog.text and "refuses 'return_token_ids'" in caplog.text
    with pytest.raises(EndpointError, match="too long"):
        act(ChatPolicy, lambda path, payload: web.Response(status=400, text="the prompt is too long"))


@pytest.mark.parametrize("kind, answer", [(ChatPolicy, chat_answer()), (CompletionsPolicy, None)])
@pytest.mark.parametrize("status", [400, 422])
def test_a_refused_field_is_asked_for_once_and_is_no_failure(kind, answer, status):
    refused = []

    def strict(path, payload):
        if "return_token_ids" in payload:
            refused.append(payload)
            return web.Response(status=status, text="Unexpected fields in the request: return_token_ids")
        if kind is ChatPolicy:
            return answer(path, payload)
        prompts = payload["prompt"] if isinstance(payload["prompt"], list) else [payload["prompt"]]
        return {"choices": [{"index": n, "text": "<answer>x</answer>"} for n in range(len(prompts))]}

    async def run():
        async with FaultServer(strict) as server, Client() as client:
            policy = kind(Endpoint(f"{server.url}/v1", backoff_s=0.01), "m", client)
            states = [PolicyState(prompt=f"Who is {n}?", seed=n, temperature=1.0) for n in range(40)]
            steps = await asyncio.gather(*map(policy.act, states))
            return steps, client.progress

    steps, progress = asyncio.run(run())
    assert len(steps) == progress.done == 40 and (len(refused), progress.failed, progress.retried) == (1, 0, 0)


TAGGED = PolicyState(prompt="Who?", max_new_tokens=33, stop_texts=("</search_query>", "</answer>"))


def test_a_server_that_keeps_stop_texts_is_asked_to_stop_at_them(tokenizer):
    ids = tokenizer.encode("so <answer>y</answer>")
    choice = {"token_ids": ids, "stop_reason": "</answer>", "finish_reason": "stop"}
    text = "so <answer>y</answer>"
    completion = {"index": 0, "text": text, **choice}
    answers = {ChatPolicy: chat_answer(text, **choice), CompletionsPolicy: lambda *_: {"choices": [completion]}}
    for kind, answer in answers.items():
        (action,), server = act(kind, answer, TAGGED, tokenizer=tokenizer)
        assert (action.action, action.stop_text, action.truncated) == ("so <answer>y</answer>", "</answer>", False)
        assert action.action_ids == tuple(ids), "no end of turn is made up"
        assert set(TAGGED.stop_texts) <= set(server.bodies[0]["stop"])
        assert server.bodies[0]["include_stop_str_in_output"] is True


def test_what_ended_an_action_is_read_off_the_answer(tokenizer):
    def said(text, state=TAGGED, **choice):
        (action,), _ = act(ChatPolicy, chat_answer(text, **choice), state, tokenizer=tokenizer)
        return action.action, action.stop_text, action.action_ids

    ids = tuple(tokenizer.encode("<answer>y</answer>"))
    ended = (*ids, tokenizer.end_of_turn_id)
    assert said("<answer>y", stop_reason="</answer>")[:2] == ("<answer>y</answer>", "</answer>")  # left out, and named
    assert said("<answer>y") == ("<answer>y", None, None)  # nobody says what ended it: as it is
    assert said("<answer>y</answer>", token_ids=list(ended)) == ("<answer>y</answer>", None, ended)
    assert said("<answer>y</answer>", finish_reason="length")[1] is None
    assert said("<answer>y</answer>", STATE)[1] is None
    more = tokenizer.encode("<answer>y</answer>\n")
    if len(more) == len(ids):  # the last token goes beyond the tag: the ids are what was drawn
        assert said("<answer>y</answer>", token_ids=more)[0] == "<answer>y</answer>\n"


@pytest.mark.parametrize("kind", [ChatPolicy, CompletionsPolicy])
def test_a_server_that_cannot_keep_stop_texts_is_not_asked_to_stop_at_them(kind):
    def strict(path, payload):
        if "include_stop_str_in_output" in payload:
            return web.Response(status=400, text="include_stop_str_in_output: not supported here")
        assert "</answer>" not in payload.get("stop", [])
        said = "<answer>y</answer> and"
        return {"choices": [{"index": 0, "text": said, "message": {"content": said}, "finish_reason": "stop"}]}

    (action,), server = act(kind, strict, TAGGED)
    assert (action.action, action.stop_text) == ("<answer>y</answer> and", None) and len(server.bodies) == 2


def without_seed(answer):
    """A server that refuses `seed`, and answers each request with a number of its own."""
    numbers = iter(range(1000))

    def asked(path, payload):
        if "seed" in payload or "seed" in payload.get("generationConfig", {}):
            return web.Response(status=400, text="Unknown name 'seed': Cannot find field.")
        return answer(next(numbers))

    return asked


SEEDLESS = [
    (ChatPolicy, lambda n: chat_answer(f"draw {n}")("", {})),
    (CompletionsPolicy, lambda n: {"choices": [{"index": 0, "text": f"draw {n}"}]}),
    (GeminiPolicy, lambda n: {"candidates": [{"content": {"parts": [{"text": f"draw {n}"}]}}]}),
]


@pytest.mark.parametrize("kind, answer", SEEDLESS)
def test_draws_stay_apart_where_seed_is_refused_and_are_found_again(kind, answer, tmp_path):
    states = [PolicyState(prompt="Who?", seed=k, temperature=1.0) for k in (3, 1, 4)]

    async def drawn(server):
        async with Client(tmp_path / "answers.sqlite") as client:
            policy = kind(Endpoint(f"{server.url}/v1", backoff_s=0.01), "m", client)
            return [action.action for action in await asyncio.gather(*(policy.act(state) for state in states * 2))]

    async def run():
        async with FaultServer(without_seed(answer)) as server:
            first = await drawn(server)
            asked = len(server.log)
            assert first[:3] == first[3:] and len(set(first)) == 3  # a draw is one answer, three are three
            assert await drawn(server) == first
            assert len(server.log) - asked <= len(states)  # only `seed` was refused anew

    asyncio.run(run())


def test_tool_calls_of_a_server_s_own_are_no_answer():
    calls = [{"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    answer = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    with pytest.raises(EndpointError, match="expected text in .*, not tool_calls in the answer"):
        act(ChatPolicy, lambda path, payload: answer)


@pytest.mark.parametrize("kind, answer", SEEDLESS)
def test_greedy_draws_are_one_where_seed_is_refused(kind, answer):
    states = [PolicyState(prompt="Who?", seed=k, temperature=0.0) for k in range(3)]
    actions, _ = act(kind, without_seed(answer), *states)
    assert {action.action for action in actions} == {"draw 0"}


def test_the_newer_name_of_max_tokens():
    def newer(path, payload):
        if "max_tokens" in payload:
            said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return web.Response(status=400, text=said)
        return chat_answer()(path, payload)

    _, server = act(ChatPolicy, newer)
    assert server.bodies[-1]["max_completion_tokens"] == 33 and len(server.bodies) == 2


def completion(path, payload):
    prompts = payload["prompt"] if isinstance(payload["prompt"], list) else [payload["prompt"]]
    prompts = [prompts] if isinstance(prompts[0], int) else prompts
    choices = [
        {
            "index": k,
            "text": f"{prompt}"[-30:],
            "finish_reason": "stop",
            "token_ids": [k + 1, 107],
            "logprobs": {
                "tokens": ["a", "b"],
                "token_logprobs": [-0.25, -0.5],
                "top_logprobs": [{"a": -0.25}, {}],
            },
        }
        for k, prompt in enumerate(prompts)
    ]
    return {"choices": choices[::-1]}


def test_completions_send_gemma_turns_or_ids():
    (action,), server = act(CompletionsPolicy, completion)
    assert (
        action.action_ids == (1, 107)
        and action.log_probs == (-0.25, -0.5)
        and action.top_log_probs == ((("a", -0.25),), (("b", -0.5),))
    )
    assert (
        server.bodies[0]["prompt"]
        == gemma_turns(STATE)
        == (
            "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n<search_query>x</search_query><end_of_turn>\n"
            "<start_of_turn>user\nx -> y<end_of_turn>\n<start_of_turn>model\n"
        )
    )
    assert server.bodies[0]["seed"] == 5
    _, server = act(CompletionsPolicy, completion, PolicyState(prompt="Who?", ids=(2, 3, 4)))
    assert server.bodies[0]["prompt"] == [2, 3, 4]


def test_greedy_completions_share_a_request():
    states = [PolicyState(prompt=f"Who {k}?", seed=k, temperature=0.0) for k in range(20)]
    actions, server = act(CompletionsPolicy, completion, *states)
    assert len(server.bodies) == 1 and "seed" not in server.bodies[0] and len(server.bodies[0]["prompt"]) == 20
    assert [action.action for action in actions] == [gemma_turns(state)[-30:] for state in states]
    states = [PolicyState(prompt="Who?", seed=k, temperature=1.0) for k in range(5)]
    _, server = act(CompletionsPolicy, completion, *states)
    assert sorted(body["seed"] for body in server.bodies) == list(range(5))


def gemini_answer(path, payload):
    assert path == "/v1/models/m:generateContent"
    parts = [{"text": "hm", "thought": True}, {"text": "<answer>"}, {"text": "y</answer>"}]
    chosen = [{"token": "<answer>", "tokenId": 7, "logProbability": -0.5}]
    others = [
        {
            "candidates": [
                {"token": "<answer>", "logProbability": -0.5},
                {"token": "no", "logProbability": -2.0},
            ]
        }
    ]
    return {
        "candidates": [
            {
                "content": {"role": "model", "parts": parts},
                "finishReason": "STOP",
                "logprobsResult": {"chosenCandidates": chosen, "topCandidates": others},
            }
        ],
        "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 2},
    }


def test_gemini():
    asked = PolicyState(prompt="Who?", steps=STATE.steps, seed=3, temperature=0.0, max_new_tokens=9, top_log_probs=2)
    (action,), server = act(GeminiPolicy, gemini_answer, asked)
    assert action.action == "<answer>y</answer>" and action.action_ids == (7,) and action.log_probs == (-0.5,)
    assert action.top_log_probs == ((("<answer>", -0.5), ("no", -2.0)),)
    (sent,) = server.bodies
    assert [turn["role"] for turn in sent["contents"]] == ["user", "model", "user"]
    assert sent["contents"][1]["parts"] == [{"text": "<search_query>x</search_query>"}]
    assert sent["generationConfig"] == {
        "maxOutputTokens": 9, "temperature": 0.0, "seed": 3, "responseLogprobs": True, "logprobs": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        {"promptFeedback": {"blockReason": "SAFETY"}},
        {"candidates": [{"finishReason": "SAFETY"}]},
        {"candidates": [{"content": {"parts": [{"text": "half an ans"}]}, "finishReason": "MAX_TOKENS"}]},
    ],
)
def test_what_gemini_blocks_or_cuts_is_not_stopped(answer):
    (action,), _ = act(GeminiPolicy, lambda path, payload: answer)
    assert action.truncated and action.action_ids is None


def test_messages_alternate():
    steps = tuple(Step(action=f"a{k}", observation=None if k == 2 else f"o{k}") for k in range(4))
    roles = [message["role"] for message in chat_messages(PolicyState(prompt="p", steps=steps))]
    assert roles == ["user", "assistant"] * 4 + ["user"]


@pytest.mark.parametrize(
    "spec, parsed",
    [
        ("http://localhost:8000/v1#org/model", ("chat", "http://localhost:8000/v1", "org/model")),
        ("completions+http://h/v1/#m", ("completions", "http://h/v1", "m")),
        ("gemini+http://127.0.0.1:1/v1beta#m", ("gemini", "http://127.0.0.1:1/v1beta", "m")),
        (
            "https://generativelanguage.googleapis.com/v1beta#gemini-1.5-pro",
            ("gemini", "https://generativelanguage.googleapis.com/v1beta", "gemini-1.5-pro"),
        ),
    ],
)
def test_specs(spec, parsed):
    assert parse_spec(spec) == parsed
    assert open_wire_policy(spec, client=Client()).name == f"{parsed[1]}#{parsed[2]}"


@pytest.mark.parametrize("spec", ["http://h/v1", "http://h/v1#", "#m", "grpc+http://h#m", "/some/folder#m"])
def test_specs_that_are_none(spec):
    with pytest.raises(ConfigError):
        parse_spec(spec)


def test_a_company_s_key_goes_to_that_company_alone(monkeypatch):
    for name in ("SWIRL_API_KEY", "OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert endpoint_for("https://api.openai.com/v1").key_env is None
    monkeypatch.setenv("OPENAI_API_KEY", "a")
    monkeypatch.setenv("GEMINI_API_KEY", "b")
    assert endpoint_for("https://api.openai.com/v1").key_env == "OPENAI_API_KEY"
    google = endpoint_for("https://generativelanguage.googleapis.com/v1beta", protocol="gemini")
    assert (google.key_env, google.key_header) == ("GEMINI_API_KEY", "x-goog-api-key")
    for other in (
        "http://localhost:8000/v1",
        "https://api.openai.com.evil.example/v1",
        "https://evil.example/api.openai.com",
    ):
        assert endpoint_for(other).key_env is None
    monkeypatch.setenv("SWIRL_API_KEY", "c")
    assert endpoint_for("https://api.openai.com/v1").key_env == "OPENAI_API_KEY"
    assert endpoint_for("http://localhost:8000/v1").key_env == "SWIRL_API_KEY"
    assert endpoint_for("http://localhost:8000/v1", key_env="MINE").key_env == "MINE"
