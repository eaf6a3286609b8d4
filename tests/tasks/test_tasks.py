import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest

from swirl import tasks
from swirl.app.resolve_tasks import TaskFlags, open_tasks
from swirl.errors import ConfigError, InputError
from swirl.rollout.prompts import question_prompt
from swirl.tasks import beerqa, cofca, gsm8k, hotpotqa, musique, own, scoring
from swirl.tools.calculator.calculate import calculator_tool
from swirl.tools.search import Page
from swirl.trajectories.log import read_trajectories
from swirl.trajectories.record import Question, Step, Trajectory, with_calls
from tests.process import run_module

FIXTURES = Path(__file__).parents[1] / "fixtures"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def question(task, answer, *aliases):
    return Question(id="q", task=task, question="?", answer=answer, aliases=aliases)


def test_normalizing_lowers_drops_punctuation_then_articles_then_spaces():
    assert scoring.normalize_answer("The  Beatles' \t (a) Band!") == "beatles band"
    assert scoring.normalize_answer("A.N. Other") == "other"  # "an other": the article goes after the punctuation
    assert scoring.normalize_answer("theatre") == "theatre"
    assert scoring.normalize_answer("U.S.A.") == "usa"
    assert scoring.normalize_answer("« the » café—an") == "« » café—"  # only ASCII punctuation is dropped


def test_f1_counts_tokens_as_often_as_they_occur():
    assert scoring.f1("red red blue", "red blue blue") == pytest.approx(2 / 3)
    assert scoring.f1("the red car", "red car") == 1.0
    assert scoring.f1("a b c d", "b") == pytest.approx(0.5)  # "a" is an article: 1 of 3 and 1 of 1
    assert scoring.f1("x", "y") == 0.0


@pytest.mark.parametrize(
    "prediction, golden, em, f1",
    [
        ("yes", "Yes.", 1.0, 1.0),
        ("yes it is", "yes", 0.0, 0.0),  # would be 0.5 without the rule
        ("yes", "yes it is", 0.0, 0.0),
        ("no", "noanswer", 0.0, 0.0),
        ("yes sir yes", "oh yes", 0.0, 0.4),  # neither side is "yes" alone
        ("", "", 1.0, 0.0),  # the official F1 of nothing against nothing
        ("the", "", 1.0, 0.0),
        ("netherlands", "The Netherlands", 1.0, 1.0),
    ],
)
def test_hotpotqa_scores_as_its_script_does(prediction, golden, em, f1):
    assert hotpotqa.score(question("hotpotqa", golden), prediction) == {"em": em, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    "prediction, golden, em, f1",
    [
        ("Merin", ("Port Merin", "Merin"), 1.0, 1.0),
        ("Port of", ("Port Merin", "Port of Merin City"), 0.0, 2 / 3),  # 0.5 by the first, 2/3 by the alias
        ("yes it is", ("yes",), 0.0, 0.5),  # no rule for yes and no
        ("", ("the",), 1.0, 1.0),  # both empty
        ("", ("Merin",), 0.0, 0.0),
        ("a b", ("b", "a"), 1.0, 1.0),  # EM by the first answer; F1 is the maximum too
    ],
)
def test_musique_takes_each_maximum(prediction, golden, em, f1):
    assert musique.score(question("musique", *golden), prediction) == {"em": em, "f1": pytest.approx(f1)}


@pytest.mark.parametrize(
    "prediction, golden, em, f1",
    [
        ("308", ("308", "308 points"), 1.0, 1.0),
        ("308 points", ("308", "308 points"), 1.0, 1.0),
        ("points 308", ("308 points", "308"), 0.0, 1.0),  # EM is that of the answer with the best F1
        ("points 308", ("308 points", "points 308"), 0.0, 1.0),  # a later equal F1 is not strictly better
        ("nothing", ("308",), 0.0, 0.0),
        ("the", ("",), 0.0, 0.0),  # EM would be 1, but no F1 is above 0
    ],
)
def test_beerqa_takes_the_em_of_the_best_f1(prediction, golden, em, f1):
    assert beerqa.score(question("beerqa", *golden), prediction) == {"em": em, "f1": f1}


@pytest.mark.parametrize(
    "prediction, golden, em, number",
    [
        ("72", "72", 1, 1),
        ("72.00", "72", 0, 1),
        ("$72", "72", 0, 1),
        ("1,050", "1050", 1, 1),
        ("72 clips", "72", 1, 1),  # the regular expression stops at the space
        ("72.", "72", 0, 1),  # it takes the full stop along, as the official one does
        ("about 72 clips", "72", 0, 1),
        ("so it is 3+4\n#### 72\n#### 73", "72", 1, 1),
        ("#### seven", "7", 0, 0),
        ("", "7", 0, 0),
        ("-5", "-5", 1, 1),
        ("5", "-5", 0, 0),
        ("between 7 and 8", "7", 0, 0),
        ("1/2", "0.5", 0, 1),
        ("7 million", "7", 1, 1),  # em is the official rule, blind to what follows
        ("$7 million", "7", 0, 0),
    ],
)
def test_gsm8k_reports_the_official_rule_and_the_rule_for_numbers(prediction, golden, em, number):
    score = gsm8k.score(question("gsm8k", golden), prediction)
    assert (score["em"], score["number"]) == (em, number)
    assert 0 <= score["f1"] <= 1


def test_gsm8k_extracts_by_the_official_expression():
    assert gsm8k.extract_answer("text #### -1,234.5 apples") == "-1234.5"
    assert gsm8k.extract_answer("####72") == "[invalid]"
    assert gsm8k.extract_answer("no number") == "[invalid]"


def test_own_and_cofca_take_aliases_and_numbers():
    assert own.score(question("own", "1,200"), "1200 people")["number"] == 1.0
    assert own.score(question("own", "Vik", "Old Vik"), "old vik") == {"em": 1.0, "f1": 1.0, "number": 1.0}
    assert own.score(question("own", "Vik"), "elsewhere") == {"em": 0.0, "f1": 0.0, "number": 0.0}
    assert cofca.score(question("cofca", "Oren Tal", "Tal"), "Tal") == {"em": 1.0, "f1": 1.0}
    assert cofca.chain_score([{"em": 1.0, "f1": 0.5}, {"em": 1.0, "f1": 0.5}]) == {"em": 1.0, "f1": 0.25}


def test_a_question_without_a_golden_answer_is_not_scored():
    for module in (beerqa, cofca, gsm8k, hotpotqa, musique, own):
        with pytest.raises(ConfigError, match="no golden answer"):
            module.score(question(module.__name__.rpartition(".")[2], None), "x")


def test_averages_are_micro_per_source_and_macro():
    good, bad = {"em": 1.0, "f1": 1.0}, {"em": 0.0, "f1": 0.5}
    means = beerqa.averages([("squad", good), ("squad", bad), ("squad", bad), ("hotpotqa", good)])
    assert means["micro"] == {"em": 0.5, "f1": 0.75, "count": 4}
    assert means["squad"] == {"em": pytest.approx(1 / 3), "f1": pytest.approx(2 / 3), "count": 3}
    assert means["macro"]["em"] == pytest.approx(2 / 3)


def test_fixtures_load_with_their_pages():
    loaded = hotpotqa.load(FIXTURES / "hotpotqa.json")
    assert [(q.id, q.task, q.answer, q.hops) for q in loaded] == [
        ("h1", "hotpotqa", "The Netherlands", 2),
        ("h2", "hotpotqa", "yes", 2),
    ]
    assert [q.id for q in hotpotqa.load(FIXTURES / "hotpotqa.json", without_easy=True)] == ["h1"]
    pages = list(hotpotqa.corpus(FIXTURES / "hotpotqa.json"))
    assert [page.title for page in pages] == ["Lake Tower", "Ida Brandt", "Sea Tower", "Old Tower"]
    assert pages[0].text == "Lake Tower is a tower. It was built by Ida Brandt."
    assert [[p.title for p in found] for _, found in hotpotqa.support(FIXTURES / "hotpotqa.json")] == [
        ["Lake Tower", "Ida Brandt"],
        ["Sea Tower"],
    ]

    (only,) = musique.load(FIXTURES / "musique.jsonl")
    assert only.hops == 2 and only.aliases == ("Merin", "Port of Merin")
    assert [page.title for page in musique.corpus(FIXTURES / "musique.jsonl")] == [
        "Salt Roads",
        "Una Kell",
        "Salt",
    ]

    loaded = beerqa.load(FIXTURES / "beerqa.json")
    assert [(q.answer, q.aliases, q.hops) for q in loaded][0] == ("308", ("308 points",), 1)
    assert beerqa.sources(FIXTURES / "beerqa.json") == {"b1": "squad", "b2": "squad", "b3": "hotpotqa"}
    assert len(list(beerqa.corpus(FIXTURES / "beerqa.json"))) == 2
    (test,) = beerqa.load(FIXTURES / "beerqa_test.json")
    assert test.answer is None and list(beerqa.corpus(FIXTURES / "beerqa_test.json")) == []

    assert [q.hops for q in cofca.load(FIXTURES / "cofca.jsonl")] == [2, 1]
    assert [q.answer for q in cofca.sub_questions(FIXTURES / "cofca.jsonl")["c1"]] == [
        "Port Merin",
        "Oren Tal",
    ]
    assert list(cofca.corpus(FIXTURES / "cofca.jsonl")) == [Page("Port Merin", "Port Merin was founded by Oren Tal.")]

    assert [q.id for q in own.load(FIXTURES / "own.jsonl")] == ["norland", "line-3"]
    assert len(list(own.corpus(FIXTURES / "own.jsonl"))) == 1
    assert [q.answer for q in gsm8k.load(FIXTURES / "gsm8k.jsonl")] == ["30", "9", "1050", "12", "3.33", "3"]


def test_open_task_scores_and_searches_every_data_set():
    for name in ("gsm8k", "hotpotqa", "musique", "beerqa", "cofca", "own"):
        (path,) = (p for p in FIXTURES.iterdir() if p.stem == name)
        task = tasks.open_task(name, questions=path)
        assert [tool.name for tool in task.tools] == ["calculator" if name == "gsm8k" else "search"]
        assert all(task.is_correct(q, q.answer) and tasks.is_correct(q, q.answer) for q in task.take("test"))


def test_a_calculator_trajectory_of_others_is_judged_as_one():
    from swirl.judging.filtering import step_to_judge

    prompt = question_prompt("2 + 2?", [calculator_tool()], 10)
    step = Step(action="<answer>4</answer>")
    asked = Trajectory(id="t", question=question("own", "4"), prompt=prompt, steps=(step,), stop="answer")
    assert step_to_judge(with_calls(asked), 0, step).tools == ("calculator",)


@pytest.mark.parametrize(
    "name, flags, named",
    [
        ("bridge", {"questions": "q.jsonl"}, "--questions: means nothing to task 'bridge'"),
        ("deep", {"corpus": "pages.jsonl"}, "--corpus: means nothing to task 'deep'"),
        ("arithmetic", {"top_k": 2}, "--top-k: means nothing to task 'arithmetic'"),
        ("gsm8k", {"questions": "q.jsonl", "corpus": "pages.jsonl"}, "--corpus: means nothing to task 'gsm8k'"),
        ("gsm8k", {"questions": "q.jsonl", "top_k": 3}, "--top-k: means nothing to task 'gsm8k'"),
        ("trivia", {}, "task 'trivia' is unknown"),
        ("own", {}, "task 'own' needs --questions"),
    ],
)
def test_a_flag_that_means_nothing_to_a_task_is_refused(name, flags, named):
    with pytest.raises(ConfigError, match=named):
        tasks.open_task(name, **flags)


def test_almanac_returns_as_many_pages_as_asked_for():
    page, pages = (tasks.open_task("deep", top_k=k).tools[0].run.search("the author of the river") for k in (1, 3))
    assert len(page) == 1 and len(pages) == 3 and pages[0] == page[0]


def opened_for(**flags):
    return asyncio.run(open_tasks(TaskFlags(**flags), client=None))


def test_each_task_gets_the_flags_that_mean_something_to_it():
    gsm8k_file = FIXTURES / "gsm8k.jsonl"
    names = ("bridge", "gsm8k", "arithmetic")
    opened = opened_for(task=names, questions=gsm8k_file, top_k=2, split="validation")
    assert [(task.name, len(task.take("validation", 2))) for task in opened] == [(name, 2) for name in names]
    for names, flag, value in (
        (("bridge", "arithmetic"), "questions", gsm8k_file),
        (("bridge",), "corpus", FIXTURES / "own.jsonl"),
        (("arithmetic",), "top_k", 2),
        (("bridge", "musique"), "without_easy", True),
    ):
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}: means nothing to task '{names[0]}'"):
            opened_for(task=names, **{flag: value})
    assert len(opened_for(task=("gsm8k",), questions=gsm8k_file)) == 1
    with pytest.raises(ConfigError, match="--split: means nothing to task 'gsm8k'"):
        opened_for(task=("gsm8k",), questions=gsm8k_file, split="train")


def test_easy_questions_of_hotpotqa_can_be_left_out():
    (every,) = opened_for(task=("hotpotqa",), questions=FIXTURES / "hotpotqa.json")
    (hard,) = opened_for(task=("hotpotqa",), questions=FIXTURES / "hotpotqa.json", without_easy=True)
    assert len(hard.take("train")) == len(hotpotqa.load(FIXTURES / "hotpotqa.json", without_easy=True))
    assert 0 < len(hard.take("train")) < len(every.take("train"))


def test_questions_come_from_the_file_of_their_split():
    files = {"train": FIXTURES / "own.jsonl", "test": FIXTURES / "own.jsonl"}
    task = tasks.open_task("own", questions=files)
    assert len(task.take("train")) == len(task.take("test")) == 2
    with pytest.raises(ConfigError, match="no file of questions for its split 'validation'"):
        task.take("validation")


BROKEN = [
    (hotpotqa, '[{"_id": "a", "question": "q"}, {"_id": 3, "question": "q"}]', "[1]._id", None),
    (hotpotqa, '[{"_id": "a", "question": "q"', None, None),
    (hotpotqa, "{}", None, None),
    (hotpotqa, "[]", None, None),
    (hotpotqa, "", None, None),
    (beerqa, '{"data": [{"id": "a"}]}', "data[0]", None),
    (beerqa, '{"version": "1"}', None, None),
    (beerqa, '{"data": []}', None, None),
    (musique, '{"id": "a", "question": "q"}\n{"id": "a", "question": 5}\n', "question", 2),
    (musique, '{"id": "a", "question": "q", "paragraphs": [{"idx": "0"}]}\n', "paragraphs[0].idx", 1),
    (gsm8k, '{"question": "q", "answer": "no number"}\n', "answer", 1),
    (gsm8k, '\n\n{"question": "q"}\n', None, 3),
    (gsm8k, "", None, None),
    (cofca, '{"id": "a", "question": "q", "hop": 3}\n', None, 1),
    (own, '{"question": "q", "id": "a"}\n{"question": "q", "id": "a"}\n', "id", 2),
    (own, '{"question": "q", "answers": ["x"]}\n', None, 1),
    (own, b'{"question": "\xff"}\n', None, 1),
]


@pytest.mark.parametrize("module, text, field, line", BROKEN)
def test_malformed_files_are_refused_by_file_line_and_field(tmp_path, module, text, field, line):
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as error:
        module.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert (error.value.field, error.value.line) == (field, line)


def test_a_missing_file_is_an_input_error(tmp_path):
    for module in (beerqa, cofca, gsm8k, hotpotqa, musique, own):
        with pytest.raises(InputError, match="cannot be read"):
            module.load(tmp_path / "absent")


def test_gsm8k_annotations_become_calculator_steps():
    dropped = Counter()
    made = list(gsm8k.records(FIXTURES / "gsm8k.jsonl", dropped))
    assert [t.id for t in made] == ["gsm8k-1#0", "gsm8k-2#0", "gsm8k-3#0"]
    assert dropped == {
        "no annotation": 1,
        "annotation differs from the calculator": 1,
        "annotation the calculator refuses": 1,
    }
    first = made[0]
    assert [step.action for step in first.steps] == [
        "Mara picks 12*5 <math_exp>12*5</math_exp>",
        "60 apples. She keeps 60/2 <math_exp>60/2</math_exp>",
        "30 apples. <answer>30</answer>",
    ]
    assert [step.observation for step in first.steps] == ["12*5 -> 60", "60/2 -> 30", None]
    assert all(step.verdict == "GOOD" and step.reward == 1.0 for step in first.steps)
    assert first.prompt_ids is None and first.stop == "answer" and first.prediction == "30"
    assert made[1].steps[1].observation == "2.25*4 -> 9"
    assert made[2].prediction == "1050"
    for trajectory in made:
        kinds = [step.call.tool for step in trajectory.steps]
        assert kinds == ["calculator"] * (len(kinds) - 1) + ["answer"]


def test_musique_decompositions_become_search_steps():
    (made,) = musique.records(FIXTURES / "musique.jsonl")
    assert [step.action for step in made.steps] == [
        "<search_query>Salt Roads author</search_query>",
        "<search_query>Where was Una Kell born?</search_query>",
        "<answer>Port Merin</answer>",
    ]
    assert made.steps[1].observation == "Where was Una Kell born? -> Una Kell: Una Kell was born in Port Merin."


def test_musique_refuses_a_supporting_paragraph_that_is_not_there(tmp_path):
    record = json.loads((FIXTURES / "musique.jsonl").read_text().splitlines()[0])
    record["question_decomposition"][1]["paragraph_support_idx"] = 9
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(InputError) as error:
        list(musique.records(path))
    assert error.value.field == "question_decomposition[1].paragraph_support_idx"


def test_the_converter_writes_trajectories_and_counts(tmp_path, capsys):
    out = tmp_path / "t.jsonl"
    assert gsm8k.main([str(FIXTURES / "gsm8k.jsonl"), str(out)]) == 0
    assert len(read_trajectories(out)) == 3
    said = capsys.readouterr()
    assert "3 trajectories" in said.out and "1 left out: no annotation" in said.out and not said.err
    assert gsm8k.main([str(FIXTURES / "gsm8k.jsonl"), str(out), "--limit", "1"]) == 0
    assert len(read_trajectories(out)) == 1


def test_the_converter_fails_in_one_line_and_keeps_what_was_there(tmp_path):
    out = tmp_path / "t.jsonl"
    out.write_text("precious")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q", "answer": "none"}\n')
    for words, code in (([bad, out], 1), ([tmp_path / "absent", out], 1), ([bad], 2)):
        done = run_module("swirl.tasks.gsm8k", *words, cwd=tmp_path)
        assert done.returncode == code and not done.stdout
        assert code == 2 or done.stderr.count("\n") == 1
    assert out.read_text() == "precious"


@pytest.mark.parametrize(
    "text, value",
    [
        ("$1,000.50", 1000.5),
        ("10 dollars", 10),
        ("-5", -5),
        ("−5", -5),
        ("$-5", -5),
        ("-$5", -5),
        ("3/4", 0.75),
    ]
    + [
        ("", None),
        ("1/0", None),
        ("5 or 6", None),
        ("two", None),
        ("2 thousand", None),
        ("٣", None),
        ("9" * 300, None),
    ],
)
def test_the_one_number_of_an_answer(text, value):
    assert scoring.read_number(text) == value


SLICES = [
    (gsm8k, "gsm8k/train.jsonl"),
    (hotpotqa, "hotpotqa/dev.slice.json"),
    (hotpotqa, "hotpotqa/train.slice.json"),
    (musique, "musique/dev.slice.jsonl"),
    (musique, "musique/train.slice.jsonl"),
    (beerqa, "beerqa/squad_part.derived.json"),
]


@pytest.mark.parametrize("module, name", SLICES)
def test_the_real_slices_score_100_on_their_own_answers(module, name):
    if not (SHARED / name).exists():
        pytest.skip("the data sets' slices are not beside this checkout")
    loaded = module.load(SHARED / name)
    means = scoring.mean_scores(module.score(q, q.answer) for q in loaded)
    assert means.pop("count") == len(loaded) > 0
    assert set(means.values()) == {1.0}


def test_every_usable_gsm8k_solution_becomes_a_trajectory():
    path = SHARED / "gsm8k/train.jsonl"
    if not path.exists():
        pytest.skip("the data sets' slices are not beside this checkout")
    dropped = Counter()
    made = sum(1 for _ in gsm8k.records(path, dropped))
    assert made + dropped.total() == 7473 and made > 7000
