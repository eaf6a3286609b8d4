"""Judges: what counts as a verdict, when they ask again, and what they never see."""

from __future__ import annotations

import asyncio
import math

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.client import items, judge_all
from benchmarks.fault_server import FaultServer, verdict_of
from swirl.endpoints.client import Client, Endpoint
from swirl.errors import ConfigError, EndpointError, EndpointUnusable, InputError
from swirl.judging.judges import (
    GenerativeJudge,
    GenerativeRewardModel,
    Judgement,
    OutcomeJudge,
    OutcomeToJudge,
    StepToJudge,
    open_judge,
)
from swirl.judging.prompts import CALCULATOR_PROCESS, OUTCOME, REWARD, SEARCH_PROCESS, read_prompt
from swirl.judging.verdicts import expected_score, read_score, read_verdict
from swirl.trajectories.record import Question, Step

QUESTION = Question(id="q", task="bridge", question="Who {action} it?", answer="the golden one", aliases=("gilded",))
ITEM = StepToJudge(
    question=QUESTION,
    steps=(Step(action="<search_query>x</search_query>", observation="x -> {question}"),),
    step=Step(action="<answer>{context}</answer>"),
    tools=("search",),
)


class Scripted:
    """A policy that says what its script says, an exception included, and remembers what it was asked."""

    name = "scripted"

    def __init__(self, *script):
        self.script, self.states = iter(script), []

    async def act(self, state):
        self.states.append(state)
        said = next(self.script)
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Step) else Step(action=said)


def judge(judge, item=ITEM):
    return asyncio.run(judge.judge(item))


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("GOOD", "GOOD"),
        ("It repeats the query.\nBAD", "BAD"),
        ("At first this looked BAD. It is, on balance, GOOD", "GOOD"),
        ("GOOD or BAD? I say:\n\n**BAD**", "BAD"),
        ("Verdict: GOOD.", "GOOD"),
        ("_GOOD_\n\nThank you.", "GOOD"),
        ("The word is [GOOD]", "GOOD"),
        ("GOOD GOOD GOOD", "GOOD"),
        ("not bad at all: GOOD", "GOOD"),
        ("", None),
        ("I cannot tell.", None),
        ("good", None),
        ("Good", None),
        ("GOODNESS, BADLY, xGOOD, GOOD4U", None),
        ("GOOD or BAD", None),
        ("It is GOOD.\nGOOD/BAD", None),
        ("It is neither GOOD nor BAD.", None),
        ("It is not GOOD.", None),
        ("This isn't BAD", None),
        ("ＧＯＯＤ", None),
        ("<html>It works!</html>", None),
    ],
)
def test_verdicts(text, verdict):
    assert read_verdict(text) == verdict
    other = {"GOOD": "BAD", "BAD": "GOOD"}
    mirrored = text.replace("GOOD", "\0").replace("BAD", "GOOD").replace("\0", "BAD")
    if "not " not in text and "isn't" not in text:
        assert read_verdict(mirrored) == (other[verdict] if verdict else None)
    assert read_verdict(text.replace("GOOD", "YES").replace("BAD", "NO"), "YES", "NO") == verdict


@given(st.text(alphabet="GODBA .\n/'notNOT", max_size=60))
def test_any_text_is_read(text):
    verdict = read_verdict(text)
    assert verdict is None or verdict in text
    assert read_verdict(text + "\nGOOD") == "GOOD" and read_verdict(text + "\nBAD\nGOOD or BAD") is None


@pytest.mark.parametrize(
    "text, score",
    [
        ("SCORE: 7", 7 / 9),
        ("SCORE: 2\nOn reflection:\n**SCORE:** 9", 1.0),
        ("SCORE: 0.", 0.0),
        ("SCORE: 5/9", 5 / 9),
        ("SCORE: 10", None),
        ("SCORE: 7.5", None),
        ("SCORE: high", None),
        ("7", None),
        ("", None),
    ],
)
def test_scores(text, score):
    assert read_score(text) == score


def test_expected_score():
    def at(**digits):
        return tuple((name.strip("_"), math.log(p)) for name, p in digits.items())

    said = (at(SCORE=0.9), at(_7=0.4, _1=0.1, x=0.1), at(_9=0.6, _3=0.2, other=0.2), at(eos=0.99, _0=0.01))
    assert expected_score(said) == pytest.approx((0.6 * 9 + 0.2 * 3) / 0.8 / 9)
    assert expected_score((((" 4", 0.0),),)) == pytest.approx(4 / 9)
    assert expected_score(None) is expected_score(()) is expected_score((at(a=1.0), at(_1=0.2, b=0.8))) is None


def test_a_clear_verdict_is_asked_for_once():
    policy = Scripted("It follows.\nGOOD")
    judged = judge(GenerativeJudge(policy))
    assert judged == Judgement(verdict="GOOD", reason="It follows. GOOD") and len(policy.states) == 1
    assert policy.states[0].temperature == 0.0


@pytest.mark.parametrize(
    "first",
    [
        "no idea",
        "GOOD or BAD",
        "",
        Step(action="It is GOOD", truncated=True),
        EndpointError("e", "no JSON", status=200),
    ],
)
def test_no_verdict_is_asked_for_again_once_and_then_masked(first):
    policy = Scripted(first, "BAD")
    generative = GenerativeJudge(policy)
    assert judge(generative).verdict == "BAD"
    assert (
        policy.states[1].prompt.startswith(policy.states[0].prompt)
        and SEARCH_PROCESS.reminder in policy.states[1].prompt
    )
    policy = Scripted(first, first, "GOOD")
    generative = GenerativeJudge(policy)
    judged = judge(generative)
    assert judged.verdict is None and judged.reward is None and len(policy.states) == 2
    assert judged.reason.startswith("no answer: " if isinstance(first, EndpointError) else "no verdict: ")
    for script in ((first, EndpointError("e", "busy", status=503)), (EndpointError("e", "torn", status=200), first)):
        assert judge(GenerativeJudge(Scripted(*script))).reason.startswith("no answer: ")


def test_a_request_that_failed_for_good_is_masked_at_once():
    policy = Scripted(EndpointError("e", "no answer within 300 s"), "GOOD")
    judged = judge(GenerativeJudge(policy))
    assert judged.verdict is None and "no answer within 300 s" in judged.reason and len(policy.states) == 1


def test_an_unusable_endpoint_ends_the_job():
    with pytest.raises(EndpointUnusable):
        judge(GenerativeJudge(Scripted(EndpointUnusable("e", "HTTP 401", status=401))))


def test_the_process_judge_sees_the_state_and_the_action_and_no_golden_answer():
    policy = Scripted("GOOD")
    judge(GenerativeJudge(policy))
    prompt = policy.states[0].prompt
    assert "golden" not in prompt and "gilded" not in prompt
    for part in (
        "Who {action} it?",
        "x -> {question}",
        "<answer>{context}</answer>",
        "<search_query>x</search_query>",
    ):
        assert prompt.count(part) == 1  # what is put in is not filled in its turn
    policy = Scripted("GOOD")
    judge(
        GenerativeJudge(policy),
        StepToJudge(question=QUESTION, steps=(), step=Step(action="1+1"), tools=("calculator",)),
    )
    assert "calculator" in policy.states[0].prompt and "(nothing yet)" in policy.states[0].prompt


def test_outcome():
    policy = Scripted("The same.\nYES", "Another.\nNO", "perhaps", "perhaps")
    outcome = OutcomeJudge(policy)
    asked = OutcomeToJudge(question=QUESTION, prediction="the gilded one")
    assert [judge(outcome, asked).verdict for _ in range(3)] == ["GOOD", "BAD", None]
    assert "the golden one or gilded" in policy.states[0].prompt and "the gilded one" in policy.states[0].prompt
    assert len(policy.states) == 4
    for nothing in (None, " "):
        assert judge(outcome, OutcomeToJudge(question=QUESTION, prediction=nothing)).verdict == "BAD"
    no_answer = Question(id="q", task="mine", question="?")
    assert judge(outcome, OutcomeToJudge(question=no_answer, prediction="x")).verdict is None


def test_reward_by_log_probs_takes_one_request():
    top = ((("7", math.log(0.5)), ("9", math.log(0.5))),)
    policy = Scripted(Step(action="SCORE: 7", top_log_probs=top))
    judged = judge(GenerativeRewardModel(policy))
    assert judged.reward == pytest.approx(8 / 9) and judged.verdict == "GOOD" and len(policy.states) == 1
    assert policy.states[0].top_log_probs > 0


def test_reward_by_votes():
    policy = Scripted("SCORE: 9", "SCORE: 0", "SCORE: 3", "none", "none")
    judged = judge(GenerativeRewardModel(policy, votes=4))
    assert judged.reward == pytest.approx(4 / 9) and judged.verdict == "BAD"
    assert len({state.seed for state in policy.states}) == 5
    judged = judge(GenerativeRewardModel(Scripted(*["none"] * 4), votes=2))
    assert judged.reward is None and judged.verdict is None and judged.reason.startswith("no verdict: ")
    unanswered = Scripted("none", "none", EndpointError("e", "busy", status=503))
    assert judge(GenerativeRewardModel(unanswered, votes=2)).reason == "no answer: busy"
    with pytest.raises(ConfigError):
        GenerativeRewardModel(Scripted(), votes=0)


def test_votes_are_draws_of_their_own_where_seed_is_refused(tmp_path):
    scores = iter(range(10))

    def seedless(path, payload):
        if "seed" in payload:
            return web.Response(status=400, text="seed: unknown field")
        return {"choices": [{"message": {"content": f"SCORE: {next(scores)}"}, "finish_reason": "stop"}]}

    async def run():
        async with FaultServer(seedless) as server:
            rewards = []
            for _ in range(2):
                wire = open_judge(f"{server.url}/v1#m", kind="reward", votes=4, cache=tmp_path / "answers.sqlite")
                rewards.append((await wire.judge(ITEM)).reward)
                await wire.close()
            return rewards

    assert asyncio.run(run()) == [pytest.approx((0 + 1 + 2 + 3) / 4 / 9)] * 2


@pytest.mark.parametrize("built_in", [SEARCH_PROCESS, CALCULATOR_PROCESS, OUTCOME, REWARD])
def test_templates_can_be_replaced(tmp_path, built_in):
    own = tmp_path / "strict.txt"
    own.write_text(built_in.text + "\nBe strict: {not a placeholder}.")
    prompt = read_prompt(own, built_in)
    assert prompt.name == "strict" and prompt.version != built_in.version and prompt.reminder == built_in.reminder
    assert read_prompt(str(own), built_in) == prompt
    assert read_prompt(prompt.text, built_in).version == prompt.version
    for missing in ("{question} alone", "{}"):
        with pytest.raises(ConfigError, match="expected the placeholder"):
            read_prompt(missing, built_in)
    with pytest.raises(InputError):
        read_prompt(tmp_path / "absent.txt", built_in)


def test_a_replaced_template_shows_in_the_name_and_the_request():
    policy = Scripted("GOOD")
    own = read_prompt("{question}|{context}|{action}", SEARCH_PROCESS)
    generative = GenerativeJudge(policy, search_prompt=own)
    judge(generative)
    assert own.version in generative.name and policy.states[0].prompt.startswith("Who {action} it?|MESSAGE 1\n")


def test_judging_over_the_wire(tmp_path, monkeypatch):
    monkeypatch.delenv("SWIRL_API_KEY", raising=False)
    steps = list(items(40))
    server = FaultServer()
    server.keep_requests = True

    async def run():
        async with server:
            verdicts = []
            for _ in range(2):
                wire = open_judge(f"{server.url}/v1#model", cache=tmp_path / "answers.sqlite")
                try:
                    verdicts.append([judgement.verdict for judgement in await judge_all(wire, steps, in_flight=16)])
                finally:
                    await wire.close()
            return verdicts

    first, second = asyncio.run(run())
    assert first == second and len(server.log) == 40  # the second time all came from the cache
    by_prompt = {verdict_of(body["messages"][0]["content"]) for body in server.bodies}
    assert set(first) == by_prompt == {"GOOD", "BAD"}


def test_kinds_of_judge():
    spec = "http://127.0.0.1:9/v1#model"
    assert isinstance(open_judge(spec), GenerativeJudge)
    assert isinstance(open_judge(spec, kind="outcome"), OutcomeJudge)
    assert isinstance(open_judge(spec, kind="reward"), GenerativeRewardModel)
    with pytest.raises(ConfigError):
        open_judge(spec, kind="vibes")


def test_a_shared_client_is_not_closed_by_its_judges(tmp_path):
    async def run():
        async with FaultServer() as server, Client(tmp_path / "answers.sqlite") as client:
            wire = open_judge(f"{server.url}/v1#model", client=client)
            await wire.judge(next(items(1)))
            await wire.close()
            return await client.post(Endpoint(server.url), "/v1/chat/completions", {"messages": [{"content": "still"}]})

    assert asyncio.run(run())["choices"]
