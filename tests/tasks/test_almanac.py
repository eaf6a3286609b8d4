from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swirl.errors import ConfigError
from swirl.judging.judges import StepToJudge
from swirl.tasks import almanac
from swirl.tasks.almanac.arithmetic import Problem, parse_problem, problem_text
from swirl.tasks.almanac.questions import parse_question, path_key, split_of
from swirl.tasks.almanac.world import RELATIONS, read_facts, world
from swirl.tools.search import SearchTool, show_pages
from swirl.trajectories.actions import action_text, observation_text, parse_action
from swirl.trajectories.record import Question, Step, with_call

SEARCHING = tuple(family for family in almanac.ALL_FAMILIES if not almanac.is_arithmetic(family))
HOPS = {"bridge": {2}, "deep": {3, 4}, "counterfactual": {2, 3}, "mixed": {1, 2, 3}, "arithmetic": {2, 3, 4}}
HOPS |= {f"{family}-2": hops for family, hops in HOPS.items()}
JUDGE = almanac.RuleJudge()


def key_of(question: Question) -> str:
    if almanac.is_arithmetic(question.task):
        return parse_problem(question.question).key
    return path_key(parse_question(question.question))


def judge_all(question: Question, demonstration) -> list:
    """The judgement of every step, in its own state."""
    steps, judgements = [], []
    for action, observation in demonstration:
        judgements.append(judge(question, action, steps))
        steps.append(Step(action=action, observation=observation))
    return judgements


def judge(question: Question, action: str, steps=()):
    tool = "calculator" if almanac.is_arithmetic(question.task) else "search"
    return JUDGE.judge_now(to_judge(question, action, steps, tool=tool))


def to_judge(question: Question, action: str, steps=(), *, tool: str) -> StepToJudge:
    steps = tuple(with_call(step) for step in steps)
    return StepToJudge(question=question, steps=steps, step=with_call(Step(action=action)), tools=(tool,))


def is_right(question: Question, demonstration) -> bool:
    call, _ = parse_action(demonstration[-1][0])
    return call is not None and call.tool == "answer" and almanac.score(question, call.argument)["em"] == 1.0


def seen(query: str, result: str) -> Step:
    return Step(action=action_text("search", query), observation=observation_text(query, result))


def calculated(expression: str, result: str) -> Step:
    return Step(action=action_text("calculator", expression), observation=observation_text(expression, result))


# The world


def test_the_world_is_the_same_in_another_process_with_other_hash_seeds():
    code = (
        "from swirl.tasks import almanac as a; import hashlib;"
        "texts = [repr(a.pages(f)) + repr(a.questions(f, 'test')) for f in a.ALL_FAMILIES];"
        "print(hashlib.blake2b(''.join(texts).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop()) > 64


def test_another_seed_is_another_world():
    assert set(world(1).kinds) != set(world().kinds)


def test_pages_are_short_and_state_their_three_facts():
    for corpus, facts in world().stated.items():
        pages = world().pages[corpus]
        assert 1500 <= len(pages) <= 2500 and len({page.title for page in pages}) == len(pages)
        for page in pages:
            assert len(page.text.split()) <= 50
            stated = {relation: value for _, relation, value in read_facts(show_pages([page]))}
            assert stated == facts[page.title] and len(set(stated.values())) == 3


def test_facts_lead_to_pages_of_the_right_kind_and_couples_are_mutual():
    here = world()
    for facts in here.stated.values():
        for title, own in facts.items():
            for relation, value in own.items():
                assert (here.kinds[title], here.kinds[value]) == RELATIONS[relation] and value != title
            if here.kinds[title] == "person":
                assert facts[own["spouse"]]["spouse"] == title


@pytest.mark.parametrize(("corpus", "share"), [("edited", 0.5), ("stale", 0.18)])
def test_so_many_facts_differ_in_the_other_corpora(corpus, share):
    facts, other = world().stated["original"], world().stated[corpus]
    assert share - 0.1 < np.mean([facts[t][r] != other[t][r] for t in facts for r in facts[t]]) < share + 0.05


def test_no_name_is_part_of_another():
    words = [word for title in world().kinds for word in title.split() if not title.startswith("The ")]
    assert len(set(words)) == len(words)
    assert not any(a != b and a.lower() in b.lower() for a in words[:200] for b in words)


@pytest.mark.parametrize("family", ["bridge", "counterfactual"])
def test_a_title_finds_its_page_first(family):
    tool = almanac.tool(family)
    titles = [page.title for page in almanac.pages(family)]
    assert np.mean([tool.search(title)[0].title == title for title in titles]) >= 0.995
    asked = [tool.search(f"{title} page about")[0].title == title for title in titles]
    assert np.mean(asked) >= 0.995  # by its words alone, not by the rule that a whole title comes first


def test_facts_are_read_from_any_text():
    text = "X Y: A poet. Her spouse is A B. His spouse is nobody. Its foo is C.\nK: An opera. Its author is D E."
    assert read_facts(f"q -> {text}") == (("x y", "spouse", "A B"), ("k", "author", "D E"))
    assert read_facts("Her spouse is A B.") == () and read_facts("no page found") == ()
    for piece in ("A", "A ", "A: A", "Her spouse is ", "A: A b. "):
        assert read_facts(piece * 20_000) == ()


# Questions


@pytest.mark.parametrize("family", almanac.ALL_FAMILIES)
def test_splits_are_disjoint_and_of_the_promised_size(family):
    train, validation, test = (almanac.questions(family, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (4000, 100, 200)
    for split, drawn in (("train", train), ("validation", validation), ("test", test)):
        assert [question.id for question in drawn] == [f"{family}/{split}/{i}" for i in range(len(drawn))]
        assert {question.hops for question in drawn} == HOPS[family]
        assert len({key_of(question) for question in drawn}) == len(drawn)
        assert all(split_of(key_of(question)) == split and question.task == family for question in drawn)
        assert all(question.answer for question in drawn)
    assert almanac.questions(family, "train", 7) == train[:7]


def test_no_test_path_or_text_is_in_any_family_s_training_questions():
    train = [question for family in almanac.ALL_FAMILIES for question in almanac.questions(family, "train")]
    held_out = [q for f in almanac.ALL_FAMILIES for s in ("validation", "test") for q in almanac.questions(f, s)]
    assert not {key_of(question) for question in train} & {key_of(question) for question in held_out}
    assert not {question.question for question in train} & {question.question for question in held_out}


def test_golden_answers_follow_from_the_pages_and_edits_change_them():
    for family in SEARCHING:
        golden = almanac.ALL_FAMILIES[family].golden
        for question in almanac.questions(family, "test"):
            chain = parse_question(question.question)
            assert world().follow(chain.start, chain.relations, golden)[-1] == question.answer
            if golden == "edited":
                assert world().follow(chain.start, chain.relations)[-1] != question.answer


def test_problems_are_small_exact_and_read_back():
    rng = random.Random(0)
    for question in almanac.questions("arithmetic", "test"):
        problem = parse_problem(question.question)
        assert str(problem.values[-1]) == question.answer and len(problem.values) == question.hops + 1
        assert all(0 < value <= 9999 for value in problem.values)
        assert len(set(problem.values)) == len(problem.values)
        assert parse_problem(problem_text(problem, rng)) == problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Who?",
        "Who is the mayor of ?",
        "Who is the mayor of the mayor of Kelford?",  # a mayor has no mayor
        "Who is the friend of Orvane Tallis?",
        "Mira has 3 coins.",
        "Mira has 3 coins. How many coins are there now? Mira finds 2 more.",
        "Mira has 3 coins. Mira keeps one of 0 equal shares. How many coins are there now?",
        "Mira has 3 coins. Mira eats 2. How many coins are there now?",
        "the " * 5000,
    ],
)
def test_other_questions_are_not_read_and_get_no_verdict(text):
    assert parse_question(text) is None and parse_problem(text) is None
    for tool, task in (("search", "bridge"), ("calculator", "arithmetic")):
        question = Question(id="q", task=task, question=text)
        item = to_judge(question, action_text("answer", "x"), tool=tool)
        assert JUDGE.judge_now(item).verdict is None
        with pytest.raises(ConfigError):
            almanac.demonstrate(question, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("family", "split", "num"),
    [("bridg", "train", 1), ("bridge", "dev", 1), ("bridge", "test", -1), ("bridge", "test", 10**6)],
)
def test_a_bad_request_is_one_line(family, split, num):
    with pytest.raises(ConfigError) as error:
        almanac.questions(family, split, num)
    assert "\n" not in str(error.value)


def test_score_is_exact_match_and_f1_and_numbers_are_compared_as_numbers():
    question = Question(id="q", task="bridge", question="", answer="Orvane Tallis")
    assert almanac.score(question, "the orvane tallis.") == {"em": 1.0, "f1": 1.0}
    assert almanac.score(question, "Tallis") == {"em": 0.0, "f1": pytest.approx(2 / 3)}
    sum_question = Question(id="q", task="arithmetic", question="", answer="1200")
    for prediction, right in (
        ("1,200 coins", 1.0),
        ("1200.0", 1.0),
        ("120", 0.0),
        ("", 0.0),
        ("1200 or 3", 0.0),
    ):
        assert almanac.score(sum_question, prediction) == {"em": right, "f1": right}


# Demonstrator


@pytest.mark.parametrize("family", almanac.FAMILIES)
def test_without_slips_every_question_is_solved_by_good_steps(family):
    rng = np.random.default_rng(0)
    for question in almanac.questions(family, "train", 300) + almanac.questions(family, "test"):
        demonstration = almanac.demonstrate(question, rng, slips=None)
        assert is_right(question, demonstration) and len(demonstration) == question.hops + 1
        assert len(demonstration) <= almanac.max_queries(family)
        assert {j.verdict for j in judge_all(question, demonstration)} == {"GOOD"}


@pytest.mark.parametrize("family", almanac.FAMILIES)
def test_with_slips_mistakes_are_bad_and_every_kind_of_end_occurs(family):
    rng = np.random.default_rng(1)
    tool = almanac.tool(family)
    num_right = num_bad = 0
    questions = almanac.questions(family, "train", 400)
    for question in questions:
        demonstration = almanac.demonstrate(question, rng)
        assert len(demonstration) <= almanac.max_queries(family)
        judgements = judge_all(question, demonstration)
        right = is_right(question, demonstration)
        num_right += right
        num_bad += any(j.verdict == "BAD" for j in judgements)
        assert all(j.reason and "\n" not in j.reason for j in judgements)
        if not right:
            assert any(j.verdict == "BAD" for j in judgements)
        if parse_action(demonstration[-1][0])[0].tool == "answer":
            assert right or judgements[-1].verdict == "BAD"
        for action, observation in demonstration:
            call, _ = parse_action(action)
            assert (call.tool == "answer") == (observation is None) and call.tool in ("answer", tool.name)
    assert 0.2 < num_right / len(questions) < 0.7 and num_bad / len(questions) > 0.3


@pytest.mark.parametrize("family", ["bridge", "counterfactual", "arithmetic"])
def test_the_demonstrator_plays_the_real_tools_and_its_seed_decides(family):
    tool = almanac.tool(family)
    for question in almanac.questions(family, "train", 20):
        demonstration = almanac.demonstrate(question, np.random.default_rng(3))
        assert demonstration == almanac.demonstrate(question, np.random.default_rng(3))
        for action, observation in demonstration:
            if observation is not None:
                argument = parse_action(action)[0].argument
                assert observation == observation_text(argument, asyncio.run(tool(argument)))


def test_scale_is_a_knob_of_one_family():
    quiet = replace(almanac.HABITS, scale={"bridge": 0.0}, mend=1.0)
    for family, right in (("bridge", True), ("deep", False)):
        rng = np.random.default_rng(0)
        drawn = [(q, almanac.demonstrate(q, rng, slips=quiet)) for q in almanac.questions(family, "train", 100)]
        assert all(is_right(*pair) for pair in drawn) == right


def test_about_a_third_of_the_contexts_have_a_slip_for_their_likeliest_action():
    rates = [habit.rate for habits in almanac.HABITS.search.values() for habit in (habits[0], habits[2])]
    rates += [rate for _, rate in almanac.HABITS.arithmetic.values()]
    assert set(almanac.HABITS.search) == set(RELATIONS) and max(rates) <= 0.7 and min(rates) >= 0.1
    assert 0.2 < np.mean(np.array(rates) > 0.5) < 0.5


# Judge


PAGE = "Orva Tal: A painter. Her birthplace is Kelford. Her spouse is Dun Vel. Her teacher is Mal Bre."
TOWN = "Kelford: A town. Its mayor is Zan Zor. Its country is Lunaria. Its founder is Bor Bek."
ASKED = Question(id="q", task="bridge", question="Who is the mayor of the birthplace of Orva Tal?")


@pytest.mark.parametrize(
    ("action", "verdict"),
    [
        ("<search_query>Orva Tal</search_query>", "GOOD"),
        ("I look her up. <search_query>the birthplace of ORVA TAL</search_query>", "GOOD"),
        ("<search_query>Who is Orva Tal?</search_query>", "GOOD"),
        ("<search_query>Orva</search_query>", "BAD"),
        ("<search_query>Tal Orva</search_query>", "BAD"),
        ("<search_query>Orva Tal Kelford</search_query>", "BAD"),
        ("<search_query>Orva Tal Orva Tal</search_query>", "BAD"),
        ("<search_query>Orva Talis</search_query>", "BAD"),
        ("<search_query>Kelford</search_query>", "BAD"),
        ("<search_query>mayor</search_query>", "BAD"),
        ("<search_query>!?</search_query>", "BAD"),
        ("<search_query>Orva Tal" + " of" * 200 + "</search_query>", "BAD"),
        ("<math_exp>1 + 1</math_exp>", "BAD"),
        ("<answer>Zan Zor</answer>", "BAD"),  # true, but nothing says so yet
        ("<answer>I do not know</answer>", "BAD"),
        ("Orva Tal", "BAD"),
        ("", "BAD"),
        ("<answer>" * 10_000, "BAD"),
        ("<answer>\0\ud7ff</answer>", "BAD"),
    ],
)
def test_first_steps(action, verdict):
    judgement = judge(ASKED, action)
    assert judgement.verdict == verdict and judgement.reason and "\n" not in judgement.reason


@pytest.mark.parametrize(
    ("argument", "verdict"),
    [
        ("Kelford", "GOOD"),
        ("mayor of Kelford", "GOOD"),
        ("Orva Tal", "BAD"),
        ("orva tal!", "BAD"),
        ("Dun Vel", "BAD"),
    ],
)
def test_second_query(argument, verdict):
    assert judge(ASKED, action_text("search", argument), [seen("Orva Tal", f"{PAGE}")]).verdict == verdict


def test_an_answer_must_follow_from_the_results():
    steps = [seen("Orva Tal", PAGE), seen("Kelford", TOWN)]
    assert judge(ASKED, "So: <answer>the zan zor.</answer>", steps).verdict == "GOOD"
    assert judge(ASKED, "<answer>Bor Bek</answer>", steps).verdict == "BAD"
    assert judge(ASKED, "<answer>Zan Zor or Bor Bek</answer>", steps).verdict == "BAD"
    assert judge(ASKED, "<answer>Zan Zor</answer>", steps[1:]).verdict == "BAD"  # whose birthplace is unknown
    assert judge(ASKED, "<search_query>Zan Zor</search_query>", steps).verdict == "BAD"  # all is known already


def test_the_judge_goes_by_what_the_results_say():
    steps = [
        seen("Orva Tal", PAGE.replace("Kelford", "Dalburg")),
        seen("Dalburg", TOWN.replace("Kelford", "Dalburg")),
    ]
    assert judge(ASKED, "<search_query>Dalburg</search_query>", steps[:1]).verdict == "GOOD"
    assert judge(ASKED, "<search_query>Kelford</search_query>", steps[:1]).verdict == "BAD"
    assert judge(ASKED, "<answer>Zan Zor</answer>", steps).verdict == "GOOD"


SUM = Question(
    id="q",
    task="arithmetic",
    question="Mira has 12 coins. Mira finds 7 more, then loses 4. Mira doubles them. How many coins are there now?",
)  # 12, 19, 15, 30


@pytest.mark.parametrize(
    ("steps", "expression", "verdict"),
    [
        ([], "12 + 7", "GOOD"),
        ([], "7+12", "GOOD"),
        ([], "12 + 7 =", "GOOD"),
        ([], "12 + 7 - 4", "GOOD"),
        ([], "(12 + 7 - 4) * 2", "GOOD"),
        ([], "2 × (7 + 12 − 4)", "GOOD"),
        ([], "12 + 7 - 4 * 2", "BAD"),
        ([], "12 - 7", "BAD"),
        ([], "12 * 7", "BAD"),
        ([], "19", "BAD"),
        ([], "20 - 1", "BAD"),
        ([], "19 - 4", "BAD"),  # 19 is not known yet
        ([], "12 + 7 = 19", "BAD"),
        ([], "12 + 7 + 0", "BAD"),
        ([], "1/0", "BAD"),
        ([], "9**9**9**9", "BAD"),
        ([], "(" * 99, "BAD"),
        ([], "twelve plus seven", "BAD"),
        ([("12 + 7", "19")], "19 - 4", "GOOD"),
        ([("12 + 7", "19")], "(19 - 4) * 2", "GOOD"),
        ([("12 + 7", "19")], "12 + 7", "BAD"),
        ([("12 + 7", "19")], "7 + 12", "BAD"),
        ([("12 + 7", "19")], "12 - 4", "BAD"),
        ([("12 + 7", "19")], "19 + 4", "BAD"),
        ([("12 - 7", "5")], "5 - 4", "BAD"),
        ([("12 - 7", "5")], "12 + 7", "GOOD"),  # it goes back and mends
        ([("12 + 7", "error: no"), ("3 + 3", "6")], "19 - 4", "BAD"),
        ([("12 + 7 - 4", "15")], "15 * 2", "GOOD"),
        ([("12 + 7 - 4", "15")], "15 + 15", "GOOD"),
        ([("12 + 7 - 4", "15")], "15 + 2", "BAD"),
        ([("12 + 7 - 4", "15")], "15 - -15", "GOOD"),
        ([("(12 + 7 - 4) * 2", "30")], "15 * 2", "BAD"),
    ],
)
def test_calculations(steps, expression, verdict):
    judgement = judge(SUM, action_text("calculator", expression), [calculated(*step) for step in steps])
    assert judgement.verdict == verdict, judgement.reason


def test_a_sum_s_answer_must_follow_from_the_results():
    done = [calculated("12 + 7 - 4", "15"), calculated("15 * 2", "30")]
    for answer, steps, verdict in (
        ("30", done, "GOOD"),
        ("30 coins", done, "GOOD"),
        ("30.0", done, "GOOD"),
        ("15", done, "BAD"),
        ("30", done[:1], "BAD"),
        ("30", [], "BAD"),
        ("15", done[:1], "BAD"),
        ("thirty", done, "BAD"),
        ("30", [Step(action="<answer>30</answer>"), Step(action="no", observation="15 * 2 -> 30")], "BAD"),
    ):
        assert judge(SUM, action_text("answer", answer), steps).verdict == verdict
    assert judge(SUM, "<search_query>Mira</search_query>").verdict == "BAD"


def test_a_running_number_that_comes_twice_may_be_calculated_twice():
    problem = Problem(4, (("halves", 2), ("doubles", 2), ("halves", 2)))
    question = Question(id="q", task="arithmetic", question=problem_text(problem, random.Random(0)))
    assert {
        j.verdict for j in judge_all(question, almanac.demonstrate(question, np.random.default_rng(0), slips=None))
    } == {"GOOD"}


@pytest.mark.parametrize("family", almanac.FAMILIES)
def test_the_golden_answer_never_reaches_the_judge(family):
    rng = np.random.default_rng(2)
    for question in almanac.questions(family, "test", 60):
        demonstration = almanac.demonstrate(question, rng)
        judgements = judge_all(question, demonstration)
        for answer in (None, "garbage", "0"):
            blind = msgspec.structs.replace(question, answer=answer, aliases=("x",), hops=None, id="?")
            assert judge_all(blind, demonstration) == judgements


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([ASKED, SUM]),
    st.text(max_size=80) | st.text(alphabet="0123456789+-*/().x= ", max_size=40),
    st.lists(st.tuples(st.text(max_size=40), st.none() | st.text(max_size=80)), max_size=4),
)
def test_any_text_gets_a_verdict(question, argument, steps):
    done = [Step(action=action, observation=observation) for action, observation in steps]
    for action in (argument, *(action_text(kind, argument) for kind in ("search", "calculator", "answer"))):
        judgement = judge(question, action, done)
        assert judgement.verdict in ("GOOD", "BAD") and judgement.reason and "\n" not in judgement.reason


def test_the_awaited_verdict_is_the_same():
    item = to_judge(ASKED, action_text("search", "Orva Tal"), tool="search")
    assert asyncio.run(JUDGE.judge(item)) == JUDGE.judge_now(item)


def test_tools_and_limits_are_the_paper_s():
    for family in almanac.FAMILIES:
        tool = almanac.tool(family)
        assert (tool.name, almanac.max_queries(family)) == (
            ("calculator", 10) if family == "arithmetic" else ("search", 5)
        )
    assert isinstance(almanac.tool("deep"), SearchTool) and almanac.tool("deep") is almanac.tool("mixed")
    assert almanac.tool("counterfactual") is not almanac.tool("deep")
