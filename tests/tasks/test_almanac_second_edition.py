"""The second edition: stale pages, ambiguous phrases, shared habits, and judges that are wrong in a known way."""

from __future__ import annotations

import asyncio
from collections import Counter

import numpy as np
import pytest

from swirl.errors import ConfigError
from swirl.judging.judges import StepToJudge
from swirl.tasks import ALMANAC_FAMILIES, FIRST_EDITION, almanac
from swirl.tasks.almanac.arithmetic import AMBIGUOUS, Problem, parse_problem, readings
from swirl.tasks.almanac.manners import MANNERS, split_manner
from swirl.tasks.almanac.questions import parse_question
from swirl.trajectories.actions import action_text, observation_text, parse_action
from swirl.trajectories.record import Question, Step, with_call

ORACLE, LENIENT = almanac.RuleJudge(), almanac.LenientJudge()
TRAINED_ON = ("bridge-2", "arithmetic-2")


def judge_all(judge, question, demonstration) -> list[str]:
    """The verdict of every step, in its own state."""
    steps, verdicts = [], []
    for action, observation in demonstration:
        verdicts.append(judge.judge_now(to_judge(question, action, steps)).verdict)
        steps.append(Step(action=action, observation=observation))
    return verdicts


def to_judge(question, action, steps=()) -> StepToJudge:
    tools, steps = (almanac.tool(question.task).name,), tuple(with_call(step) for step in steps)
    return StepToJudge(question=question, steps=steps, step=with_call(Step(action=action)), tools=tools)


def answers(demonstration) -> bool:
    call, _ = parse_action(demonstration[-1][0])
    return call is not None and call.tool == "answer"


def is_right(question, demonstration) -> bool:
    call, _ = parse_action(demonstration[-1][0])
    return answers(demonstration) and almanac.score(question, call.argument)["em"] == 1.0


def demonstrated(family, num, *, slips=almanac.SHARED_HABITS):
    rng = np.random.default_rng(0)
    for question in almanac.questions(family, "train", num):
        yield question, almanac.demonstrate_shared(question, rng, slips=slips)


def test_the_names_of_the_tasks_are_those_of_the_families():
    assert set(ALMANAC_FAMILIES) == set(almanac.ALL_FAMILIES) and set(FIRST_EDITION) == set(almanac.FAMILIES)


@pytest.mark.parametrize("family", almanac.SECOND_EDITION)
def test_without_slips_every_step_is_sound_and_still_some_answers_are_wrong(family):
    right = []
    for question, demonstration in demonstrated(family, 300, slips=None):
        assert set(judge_all(ORACLE, question, demonstration)) == {"GOOD"}
        assert len(demonstration) == question.hops + 1 <= almanac.max_queries(family)
        right.append(is_right(question, demonstration))
    assert np.mean(right) == 1 if family == "counterfactual-2" else 0.4 < np.mean(right) < 0.9


@pytest.mark.parametrize("family", TRAINED_ON)
def test_sound_and_right_are_two_things(family):
    """All four cells are populated, so no filter keeps what another keeps."""
    cells = Counter()
    for question, demonstration in demonstrated(family, 600):
        sound = set(judge_all(ORACLE, question, demonstration)) == {"GOOD"}
        cells[sound, is_right(question, demonstration)] += 1 / 600
    assert len(cells) == 4 and min(cells.values()) > 0.05


@pytest.mark.parametrize("family", almanac.SECOND_EDITION)
def test_a_manner_sets_off_its_habit_whatever_the_tool(family):
    """Each habit is found far more often where the question asks for it."""

    def habits_of(question, demonstration) -> set[str]:
        verdicts = judge_all(ORACLE, question, demonstration)
        actions = [action for action, _ in demonstration]
        queries = [action for action, observation in demonstration if observation is not None]
        found = {"untagged"} if actions[-1].startswith("It is ") else set()
        found |= {"early"} if verdicts[-1] == "BAD" and len(set(queries)) < question.hops else set()
        return found | ({"extra"} if len(set(queries)) > question.hops else set())

    seen, count = Counter(), Counter()
    for question, demonstration in demonstrated(family, 400):
        manner = split_manner(question.question)[0]
        count[manner] += 1
        for habit in habits_of(question, demonstration):
            seen[manner, habit] += 1
    assert set(count) == {None, *MANNERS} and min(count.values()) > 50
    for habit in (
        "untagged",
        "extra",
        *(["early"] if max(almanac.ALL_FAMILIES[family].hops or (2,)) > 1 else []),
    ):
        cued, uncued = seen[habit, habit] / count[habit], seen[None, habit] / count[None]
        assert cued > uncued + 0.15, (habit, cued, uncued)


def test_a_manner_is_no_part_of_what_is_asked():
    for manner in MANNERS.values():
        text = "Who is the mayor of the birthplace of Orva Tal?"
        assert parse_question(manner + text) == parse_question(text)
        assert split_manner(manner + text)[1] == text


AMBIGUOUS_TEXT = "Mira has 12 coins. Mira gets 3 times more, then loses 4. How many coins are there now?"


def test_an_ambiguous_phrase_has_two_readings():
    problem = parse_problem(AMBIGUOUS_TEXT)
    assert problem == Problem(12, ((AMBIGUOUS.name, 3), ("loses", 4)))
    assert [read.values for read in readings(problem)] == [(12, 36, 32), (12, 48, 44)]


@pytest.mark.parametrize(
    ("done", "action", "verdict"),
    [
        ([], ("calculator", "12 * 3"), "GOOD"),
        ([], ("calculator", "12 * 4"), "GOOD"),
        ([], ("calculator", "12 * 5"), "BAD"),
        ([("12 * 3", "36")], ("calculator", "36 - 4"), "GOOD"),
        ([("12 * 4", "48")], ("calculator", "48 - 4"), "GOOD"),
        ([("12 * 3", "36")], ("calculator", "12 * 4"), "BAD"),  # a reading is kept to
        ([("12 * 3", "36"), ("36 - 4", "32")], ("answer", "32"), "GOOD"),
        ([("12 * 4", "48"), ("48 - 4", "44")], ("answer", "44"), "GOOD"),
        ([("12 * 3", "36"), ("36 - 4", "32")], ("answer", "44"), "BAD"),
    ],
)
def test_either_reading_is_sound_to_its_end(done, action, verdict):
    question = Question(id="q", task="arithmetic-2", question=AMBIGUOUS_TEXT)
    steps = tuple(
        Step(action=action_text("calculator", asked), observation=observation_text(asked, result))
        for asked, result in done
    )
    assert ORACLE.judge_now(to_judge(question, action_text(*action), steps)).verdict == verdict


# Weak judges

ASKED = Question(id="q", task="bridge-2", question="! Who is the mayor of the birthplace of Orva Tal?")
PAGE = "Orva Tal: A painter. Her birthplace is Kelford. Her spouse is Dun Vel. Her teacher is Mal Bre."
SUM = Question(id="q", task="arithmetic-2", question=AMBIGUOUS_TEXT)


@pytest.mark.parametrize(
    ("question", "done", "action", "verdict"),
    [
        (ASKED, [], ("search", "Orva Tal"), "GOOD"),
        (ASKED, [], ("search", "Kelford"), "BAD"),  # nothing names it yet
        (ASKED, [], ("answer", "Dun Vel"), "BAD"),
        (ASKED, [("Orva Tal", PAGE)], ("search", "Kelford"), "GOOD"),
        (ASKED, [("Orva Tal", PAGE)], ("search", "Mal Bre"), "GOOD"),  # the oracle would not have it
        (ASKED, [("Orva Tal", PAGE)], ("search", "Orva Tal"), "BAD"),
        (ASKED, [("Orva Tal", PAGE)], ("answer", "Dun Vel"), "GOOD"),  # a person, as is asked for, and the wrong one
        (ASKED, [("Orva Tal", PAGE)], ("answer", "Kelford"), "BAD"),  # not a person
        (ASKED, [("Orva Tal", PAGE)], ("calculator", "1 + 1"), "BAD"),
        (SUM, [], ("calculator", "12 - 3"), "GOOD"),
        (SUM, [], ("calculator", "12 - 7"), "BAD"),
        (SUM, [], ("answer", "12"), "BAD"),
        (SUM, [("12 * 3", "36")], ("calculator", "12*3"), "BAD"),
        (SUM, [("12 * 3", "36")], ("answer", "36"), "GOOD"),
        (SUM, [("12 * 3", "36")], ("search", "36"), "BAD"),
    ],
)
def test_the_lenient_judge_asks_for_grounds_alone(question, done, action, verdict):
    tool = almanac.tool(question.task).name
    steps = tuple(
        Step(action=action_text(tool, asked), observation=observation_text(asked, said)) for asked, said in done
    )
    item = to_judge(question, action_text(*action), steps)
    assert LENIENT.judge_now(item).verdict == verdict == asyncio.run(LENIENT.judge(item)).verdict


@pytest.mark.parametrize("family", almanac.SECOND_EDITION)
def test_the_lenient_judge_passes_what_is_sound_and_some_that_is_not(family):
    sound = lenient = 0
    for question, demonstration in demonstrated(family, 300):
        is_sound = set(judge_all(ORACLE, question, demonstration)) == {"GOOD"}
        is_lenient = set(judge_all(LENIENT, question, demonstration)) == {"GOOD"}
        assert is_lenient or not is_sound
        sound, lenient = sound + is_sound, lenient + is_lenient
    assert lenient > 1.3 * sound


@pytest.mark.parametrize("share", [0.0, 0.2, 0.35])
def test_the_noisy_judge_is_wrong_about_its_share_of_steps_and_always_the_same_ones(share):
    noisy, again = almanac.NoisyJudge(share), almanac.open_judge(f"noisy:{share}")
    verdicts, other_seed = [], []
    for question, demonstration in demonstrated("bridge-2", 400):
        said = judge_all(noisy, question, demonstration)
        assert said == judge_all(again, question, demonstration)
        verdicts += [a != b for a, b in zip(said, judge_all(ORACLE, question, demonstration), strict=True)]
        other_seed += judge_all(almanac.NoisyJudge(share, seed=1), question, demonstration)
    assert np.mean(verdicts) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("name", ["", "strict", "noisy", "noisy:", "noisy:much", "noisy:1.5", "lenient:2"])
def test_an_unknown_judge_is_one_line(name):
    with pytest.raises(ConfigError) as error:
        almanac.open_judge(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("judge", [LENIENT, almanac.NoisyJudge(0.2)])
def test_weak_judges_never_see_the_golden_answer_and_know_no_other_question(judge):
    for question, demonstration in demonstrated("bridge-2", 60):
        blind = Question(id="?", task=question.task, question=question.question, answer="garbage")
        assert judge_all(judge, blind, demonstration) == judge_all(judge, question, demonstration)
    other = Question(id="q", task="bridge-2", question="Who?")
    assert judge.judge_now(to_judge(other, action_text("answer", "x"))).verdict is None


def test_weak_judges_are_chosen_by_name(tmp_path):
    """filter --judge NAME: the lenient judge keeps what the oracle keeps, and more."""
    from swirl.filter import FilterConfig
    from swirl.filter import main as filter_main
    from swirl.trajectories.log import read_trajectories, write_trajectories
    from swirl.trajectories.record import Trajectory

    made = []
    for number, (question, demonstration) in enumerate(demonstrated("bridge-2", 60)):
        steps = tuple(with_call(Step(action=action, observation=seen)) for action, seen in demonstration)
        made.append(Trajectory(id=f"{number}", question=question, prompt="", steps=steps, stop="answer",
                               tools={"search": "search_query"}))  # fmt: skip
    write_trajectories(tmp_path / "all.jsonl", made)
    kept = {}
    for judge in ("rule", "lenient", "noisy:0.3"):
        files = {"kept": tmp_path / judge / "kept.jsonl", "dropped": tmp_path / judge / "dropped.jsonl"}
        filter_main(FilterConfig(data=tmp_path / "all.jsonl", judge=judge, **files))
        kept[judge] = {t.id for t in read_trajectories(files["kept"])}
    assert kept["rule"] < kept["lenient"] and kept["noisy:0.3"] not in (kept["rule"], kept["lenient"])
