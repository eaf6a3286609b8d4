import json

import msgspec
import pytest
from msgspec.structs import replace

from swirl.errors import InputError
from swirl.storage.digest import seal
from swirl.trajectories.log import TrajectoryLog, read_trajectories, write_trajectories
from swirl.trajectories.record import Question, Step, Trajectory, decode_trajectory, encode_trajectory, with_calls


def made(name="q#0", ids=True):
    question = Question(id="q", task="bridge", question="Where?", answer="There")
    steps = (
        Step(
            action="<search_query>a</search_query>",
            observation="a -> b",
            action_ids=(5, 6) if ids else None,
            observation_ids=(7, 8, 9) if ids else None,
            log_probs=(-0.5, -1.25) if ids else None,
        ),
        Step(action="<answer>b</answer>", action_ids=(10,) if ids else None, verdict="GOOD", reward=1.0),
    )
    made = Trajectory(
        id=name,
        question=question,
        prompt="Where?",
        prompt_ids=(1, 2) if ids else None,
        steps=steps,
        stop="answer",
    )
    return with_calls(made)


def test_a_line_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "t.jsonl"
    trajectories = [made("a"), made("b", ids=False)]
    assert write_trajectories(path, trajectories) == 2
    assert read_trajectories(path) == trajectories
    assert list(tmp_path.iterdir()) == [path]


def test_states_join_ids_without_tokenising():
    pairs = made().sub_trajectories()
    assert pairs == [([1, 2], [5, 6]), ([1, 2, 5, 6, 7, 8, 9], [10])]
    with pytest.raises(ValueError, match="no token ids"):
        made(ids=False).state_ids(0)


def edited(change):
    content = json.loads(encode_trajectory(made()))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda t: t.pop("steps"), None),
        (lambda t: t.update(steps=[]), "steps"),
        (lambda t: t.update(steps=3), "steps"),
        (lambda t: t.update(stop="tired"), "stop"),
        (lambda t: t.update(schema=99), "schema"),
        (lambda t: t.update(prompt_ids=[]), "prompt_ids"),
        (lambda t: t.update(prompt_ids=[-4]), "prompt_ids"),
        (lambda t: t["question"].update(question=7), "question.question"),
        (lambda t: t["steps"][1].update(action=None), "steps[1].action"),
        (lambda t: t["steps"][0].update(verdict="FINE"), "steps[0].verdict"),
        (lambda t: t["steps"][1].pop("action_ids"), "steps[1].action_ids"),
        (lambda t: t["steps"][1].update(action_ids=[]), "steps[1].action_ids"),
        (lambda t: t["steps"][0].pop("observation_ids"), "steps[0].observation_ids"),
        (lambda t: t["steps"][0].update(log_probs=[-1.0]), "steps[0].log_probs"),
    ],
)
def test_a_malformed_line_is_named_by_file_line_and_field(change, field):
    with pytest.raises(InputError) as caught:
        decode_trajectory(edited(change), "some.jsonl", 17)
    assert caught.value.file == "some.jsonl" and caught.value.line == 17 and caught.value.field == field
    assert str(caught.value).startswith("some.jsonl:17: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"id": "x"', "\x00\x01", "NaN", b'{"id": "\xff"}'])
def test_garbage_is_refused_in_one_line(text):
    with pytest.raises(InputError) as caught:
        decode_trajectory(text, "g.jsonl", 1)
    assert "\n" not in str(caught.value)


def test_an_empty_or_absent_file_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="at least one trajectory"):
        read_trajectories(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_trajectories(tmp_path / "absent.jsonl")


def test_a_log_cut_anywhere_resumes_with_whole_lines_only(tmp_path):
    whole = b"".join(seal(encode_trajectory(made(f"q#{i}"))) for i in range(3))
    for cut in [*range(0, len(whole), 149), len(whole)]:
        path = tmp_path / f"{cut}.jsonl"
        path.write_bytes(whole[:cut])
        with TrajectoryLog(path) as log:
            missing = [f"q#{i}" for i in range(3) if f"q#{i}" not in log.done]
            for name in missing:
                log.append(made(name))
        assert path.read_bytes() == whole


def test_a_damaged_line_is_told_by_readers_and_logs(tmp_path):
    path = tmp_path / "t.jsonl"
    write_trajectories(path, [made("q#0"), made("q#1")])
    content = path.read_bytes()
    path.write_bytes(content.replace(b"q#0", b"q#2"))
    for read in (read_trajectories, TrajectoryLog):
        with pytest.raises(InputError, match=r"t\.jsonl:1: .*does not match its digest"):
            read(path)
    path.write_bytes(content[:-10])
    with TrajectoryLog(path) as log:
        assert log.done == {"q#0"}
        log.append(made("q#1"))
    assert read_trajectories(path) == [made("q#0"), made("q#1")]


def test_a_log_knows_whether_an_id_has_come_to_mean_another_question(tmp_path):
    with TrajectoryLog(tmp_path / "t.jsonl") as log:
        log.append(made("q#0"))
    with TrajectoryLog(tmp_path / "t.jsonl") as log:
        question = made("q#0").question
        assert not log.answers_another("q#0", question) and not log.answers_another("q#1", question)
        assert log.answers_another("q#0", replace(question, question="another"))


def test_json_nested_too_deep_is_one_line():
    with pytest.raises(InputError, match="expected one JSON object"):
        decode_trajectory('{"x": ' + "[" * 100_000)


def test_a_log_cut_within_a_character_or_left_with_zeros_by_a_power_cut(tmp_path):
    lines = [encode_trajectory(replace(made(f"q#{i}"), prompt='Où? 走 \u2028 "\\', sample=-3)) for i in range(2)]
    path = tmp_path / "t.jsonl"
    prompt = lines[1].index(b"O\xc3")
    for cut in [*range(1, len(lines[1]), 41), *range(prompt, prompt + 25), len(lines[1]) - 1]:
        path.write_bytes(lines[0] + lines[1][:cut])
        with TrajectoryLog(path) as log:
            whole = cut == len(lines[1]) - 1
            assert log.done == ({"q#0", "q#1"} if whole else {"q#0"})
        assert path.read_bytes() == b"".join(lines[: 1 + whole])
    for zeros in (bytes(70), lines[1][:40] + bytes(4096)):
        path.write_bytes(lines[0] + zeros)
        with TrajectoryLog(path) as log:
            assert log.done == {"q#0"}
        assert path.read_bytes() == lines[0]


@pytest.mark.parametrize(
    "text",
    [
        b"my notes\nare precious",
        b"my notes are precious",
        b'{"my": "notes"}',
        b'{\n  "id": "x"\n}',
        b"\n\n  indented",
        b'["a"]',
        b'"a',
        b"\xff\xfe",
    ],
)
def test_a_log_refuses_a_foreign_file_and_leaves_it_alone(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_bytes(text)
    with pytest.raises(InputError, match=r"notes\.txt:[13]"):
        TrajectoryLog(path)
    assert path.read_bytes() == text


def test_a_log_has_one_writer(tmp_path):
    path = tmp_path / "t.jsonl"
    with TrajectoryLog(path) as log:
        log.append(made("a"))
        log.sync()
        with open(path, "ab") as file:
            file.write(b'{"id": "half')  # as the writer's own buffer may leave it for a moment
        with pytest.raises(InputError, match="another command is writing"):
            TrajectoryLog(path)
        assert path.read_bytes().endswith(b'{"id": "half')
    with TrajectoryLog(path) as log:
        assert log.done == {"a"}


def test_unknown_defaults_are_left_out_of_the_line():
    line = msgspec.json.decode(encode_trajectory(made(ids=False)))
    assert "verdict" not in line["steps"][0] and "outcome" not in line


@pytest.mark.parametrize(
    "change, field",
    [
        ({"log_probs": (0.5, -1.0)}, "log_probs"),
        ({"log_probs": (-1.0, 1e-9)}, "log_probs"),
        ({"reward": 1.5}, "reward"),
        ({"reward": -0.25}, "reward"),
    ],
)
def test_numbers_outside_their_range_are_named(change, field):
    trajectory = made("q#0")
    steps = (replace(trajectory.steps[0], **change), *trajectory.steps[1:])
    with pytest.raises(InputError, match=rf"t.jsonl:1: field 'steps\[0\]\.{field}'"):
        decode_trajectory(encode_trajectory(replace(trajectory, steps=steps)), "t.jsonl", 1)


@pytest.mark.parametrize("number", [b"null", b'"NaN"', b"-1e999"])
def test_a_log_prob_that_is_no_number_is_named(number):
    line = encode_trajectory(made("q#0")).replace(b"-0.5", number)
    with pytest.raises(InputError, match="t.jsonl:1"):
        decode_trajectory(line, "t.jsonl", 1)
