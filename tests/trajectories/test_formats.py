import json
import random
import sys
from pathlib import Path

import msgspec
import pytest

from swirl.app import formats
from swirl.errors import ConfigError, InputError
from swirl.tasks import gsm8k, musique
from swirl.trajectories.formats import from_messages, from_trl, read_any, to_messages, to_trl
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Question, Step, Trajectory, encode_trajectory, with_calls
from swirl.trajectories.rows import write_rows
from tests.process import run_module

FIXTURES = Path(__file__).parents[1] / "fixtures"


def known():
    return [*gsm8k.records(FIXTURES / "gsm8k.jsonl"), *musique.records(FIXTURES / "musique.jsonl")]


def odd():
    """What has no plain chat form: thoughts with spaces, broken calls, two tags, results of another form."""
    question = Question(id="q", task="own", question="Where?", answer="There", aliases=("Yonder",), hops=2)
    steps = (
        Step(
            action="Hm. \n <search_query>a b</search_query>",
            observation="a b -> x\n-> y",
            verdict="GOOD",
            reward=0.5,
        ),
        Step(
            action="<search_query> padded </search_query>",
            observation="padded -> z",
            verdict="BAD",
            reason="why",
        ),
        Step(action="<search_query>q</search_query>", observation="lost the arrow", verdict="GOOD"),
        Step(action="<search_query>1</search_query><answer>2</answer>", observation="", verdict="BAD"),
        Step(action="no tag é \u2028 🙂", verdict="BAD", reward=0.0),
    )
    made = Trajectory(
        id="q#3",
        question=question,
        prompt="Where?\n",
        steps=steps,
        stop="invalid_action",
        sample=3,
        policy="p",
        outcome=False,
        dropped="process: step 2 is BAD",
    )
    return with_calls(made)


def with_ids():
    steps = (
        Step(
            action="<search_query>a</search_query>",
            observation="a -> b",
            action_ids=(5,),
            observation_ids=(7, 8),
        ),
        Step(action="<answer>b</answer>", action_ids=(10, 11), log_probs=(-0.5, -0.25)),
    )
    question = Question(id="q", task="own", question="?")
    made = Trajectory(
        id="i",
        question=question,
        prompt="?",
        prompt_ids=(1,),
        tokenizer="f",
        steps=steps,
        stop="answer",
        prediction="b",
    )
    return with_calls(made)


def test_messages_are_openais_chat_form():
    row = to_messages(known()[0])
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    call = row["messages"][1]
    assert call["content"] == "Mara picks 12*5 "
    assert call["tool_calls"][0]["function"] == {"name": "calculator", "arguments": '{"expression":"12*5"}'}
    assert row["messages"][2] == {
        "role": "tool",
        "tool_call_id": "call_0",
        "name": "calculator",
        "content": "60",
    }
    assert row["messages"][-1]["content"] == "30 apples. <answer>30</answer>"
    (tool,) = json.loads(row["tools"])
    assert tool["function"]["name"] == "calculator"


def test_a_chat_template_takes_the_messages():
    """A chat template takes the messages as they are."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    message = "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}|"
    template = ImmutableSandboxedEnvironment().from_string(f"{{% for m in messages %}}{message}{{% endfor %}}")
    rendered = template.render(messages=to_messages(known()[0])["messages"])
    assert "assistant:Mara picks 12*5 [calculator]|tool:60|" in rendered


def test_there_and_back_loses_nothing_but_ids():
    for trajectory in [*known(), odd()]:
        row = msgspec.json.decode(msgspec.json.encode(to_messages(trajectory)))
        assert from_messages(row) == trajectory
        row = msgspec.json.decode(msgspec.json.encode(to_trl(trajectory)))
        assert from_trl(row) == trajectory
    bare = from_messages(to_messages(with_ids()))
    assert bare.prompt_ids is None and [step.action for step in bare.steps] == [s.action for s in with_ids().steps]


def test_a_tool_of_ones_own_is_a_tool_call_there_and_back():
    """By the tools that the trajectory stores: name `sql`, tag `query`."""
    steps = (
        Step(action="Count. <query>SELECT 1</query>", observation="SELECT 1 -> 1", verdict="GOOD"),
        Step(action="<answer>1</answer>", verdict="GOOD"),
    )
    question = Question(id="q", task="own", question="?")
    made = with_calls(
        Trajectory(
            id="i", question=question, prompt="?", steps=steps, stop="answer", prediction="1", tools={"sql": "query"}
        )
    )
    assert made.steps[0].call.tool == "sql"
    row = to_messages(made)
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "sql", "arguments": '{"argument":"SELECT 1"}'}
    assert row["messages"][2]["content"] == "1" and json.loads(row["tools"])[0]["function"]["name"] == "sql"
    assert from_messages(row) == made and from_trl(to_trl(made)) == made
    of_others = {key: value for key, value in row.items() if key != "swirl"}  # no tag is told: it is the name
    read = from_messages(of_others)
    assert read.tools == {"sql": "sql"} and read.steps[0].action == "Count. <sql>SELECT 1</sql>"
    with pytest.raises(InputError, match="field 'messages\\[1\\]': expected a call of search or calculator, got 'sql'"):
        from_messages({"messages": row["messages"]})
    with pytest.raises(InputError, match="field 'tools': expected a list of tools in OpenAI's form"):
        from_messages(of_others | {"tools": '{"sql": 1}'})


def test_trl_completions_end_with_their_action():
    row = to_trl(known()[0])
    assert row["completions"] == [
        "Mara picks 12*5 <math_exp>12*5</math_exp>",
        "12*5 -> 60\n60 apples. She keeps 60/2 <math_exp>60/2</math_exp>",
        "60/2 -> 30\n30 apples. <answer>30</answer>",
    ]
    assert row["labels"] == [True] * 3
    assert to_trl(with_ids()) is None  # steps without a verdict have no label


def test_messages_of_others_are_read():
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who wrote Salt Roads?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "search", "arguments": {"q": "Salt Roads"}}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "A novel by Una Kell."},
            {"role": "assistant", "content": "Una Kell"},
        ],
        "anything": 3,
    }
    made = from_messages(row, "f", 7)
    assert made.id == "line-7" and made.prompt == "Be brief.\n\nWho wrote Salt Roads?"
    assert made.steps[0].action == "<search_query>Salt Roads</search_query>"
    assert made.steps[0].observation == "Salt Roads -> A novel by Una Kell."
    assert made.stop == "answer" and made.prediction == "Una Kell"
    assert from_messages({"messages": row["messages"][:-1]}).stop == "step_limit"


def test_trl_rows_of_others_are_read():
    completions = ["2*2=4.", "2+4=7. The answer is 7"]
    made = from_trl({"prompt": "2+2*2?", "completions": completions, "labels": [True, False]})
    assert [(s.verdict, s.reward) for s in made.steps] == [("GOOD", 1.0), ("BAD", 0.0)]
    assert made.prediction == completions[1] and made.prompt == "2+2*2?"


USER, CALL = {"role": "user", "content": "?"}, {"name": "search", "arguments": '{"query": "a"}'}


def calls(*functions):
    return {"role": "assistant", "tool_calls": [{"function": function} for function in functions]}


@pytest.mark.parametrize(
    "row, field",
    [
        ({}, None),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages[0]"),
        ({"messages": [USER]}, "messages[1]"),
        ({"messages": [USER, USER]}, "messages[1]"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "messages[1].content"),
        ({"messages": [USER, calls(CALL, CALL)]}, "messages[1]"),
        ({"messages": [USER, calls(CALL), calls(CALL)]}, "messages[2]"),
        ({"messages": [USER, calls({"name": "bash", "arguments": "{}"})]}, "messages[1]"),
        ({"messages": [USER, calls({"name": "search", "arguments": "not json"})]}, "messages[1]"),
        ({"messages": [USER, calls({"name": "search", "arguments": "[]"})]}, "messages[1]"),
        ({"messages": [USER, calls({"name": "search", "arguments": {"a": "x", "b": "y"}})]}, "messages[1]"),
        (
            {"messages": [USER, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "y"}]},
            "messages[2]",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "x"}], "swirl": "{}"}, "swirl"),
    ],
)
def test_bad_messages_are_refused_by_row_and_field(row, field):
    with pytest.raises(InputError) as error:
        from_messages(row, "data.jsonl", 4)
    assert (error.value.file, error.value.line, error.value.field) == ("data.jsonl", 4, field)


@pytest.mark.parametrize(
    "row, field",
    [
        ({"prompt": "p", "completions": ["a"], "labels": []}, "labels"),
        ({"prompt": "p", "completions": [], "labels": []}, "completions"),
        ({"prompt": "p", "completions": ["a"], "labels": ["yes"]}, "labels[0]"),
        ({"completions": ["a"], "labels": [True]}, None),
        ({"prompt": "p", "completions": ["a"], "labels": [True], "swirl": "nonsense"}, "swirl"),
    ],
)
def test_bad_trl_rows_are_refused_by_row_and_field(row, field):
    with pytest.raises(InputError) as error:
        from_trl(row, "data.jsonl", 4)
    assert (error.value.line, error.value.field) == (4, field)


@pytest.mark.parametrize("kind", ["swirl", "messages", "trl"])
def test_parquet_and_jsonl_hold_the_same(tmp_path, kind):
    pytest.importorskip("pyarrow")
    trajectories = [*known(), odd()] + ([with_ids()] if kind == "swirl" else [])
    rows = {"swirl": msgspec.to_builtins, "messages": to_messages, "trl": to_trl}[kind]
    for name in ("t.parquet", "t.jsonl"):
        assert write_rows(tmp_path / name, map(rows, trajectories * 300), kind) == 300 * len(trajectories)
        assert list(read_any(tmp_path / name, kind)) == trajectories * 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.jsonl", "t.parquet"]


def test_parquet_that_cannot_be_read(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    for path in (tmp_path / "t.parquet", tmp_path / "absent.parquet"):
        with pytest.raises(InputError, match="Parquet"):
            list(read_any(path, "swirl"))


def test_without_pyarrow_parquet_is_refused_in_words(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="pip install"):
        write_rows(tmp_path / "t.parquet", [msgspec.to_builtins(odd())], "swirl")
    assert list(tmp_path.iterdir()) == []


def test_the_command_converts_there_and_back(tmp_path, capsys):
    data, out, back = (tmp_path / name for name in ("t.jsonl", "m.jsonl", "b.jsonl"))
    write_trajectories(data, [*known(), odd()])
    formats.main(formats.FormatsConfig(data=data, out=out, read="swirl", write="messages"))
    formats.main(formats.FormatsConfig(data=out, out=back, read="messages", write="swirl"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"written": 5, "read": 5}
    assert data.read_bytes() == back.read_bytes()
    data.write_bytes(encode_trajectory(with_ids()))
    formats.main(formats.FormatsConfig(data=data, out=tmp_path / "trl.jsonl", write="trl"))
    assert json.loads(capsys.readouterr().out) == {"written": 0, "read": 1, "left_out_unjudged": 1}


def test_a_failing_command_is_one_line_and_loses_nothing(tmp_path):
    data, out = tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    data.write_bytes(encode_trajectory(odd()) + b"{]\n")
    out.write_text("precious")
    done = run_module("swirl.app.formats", "--data", data, "--out", out, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and f"{data}:2" in done.stderr
    assert out.read_text() == "precious" and len(list(tmp_path.iterdir())) == 2
    data.write_text("")
    with pytest.raises(InputError, match="empty"):
        formats.main(formats.FormatsConfig(data=data, out=out))
    with pytest.raises(ConfigError, match="different"):
        formats.main(formats.FormatsConfig(data=out, out=out))
    assert out.read_text() == "precious"


@pytest.mark.parametrize("kind", ["swirl", "messages", "trl"])
@pytest.mark.parametrize("end", ["parquet", "jsonl"])
def test_no_flipped_bit_changes_a_row_unseen(tmp_path, kind, end):
    path, rng = tmp_path / f"t.{end}", random.Random(0)
    rows = {"swirl": msgspec.to_builtins, "messages": to_messages, "trl": to_trl}[kind]
    write_rows(path, [rows(odd()) for _ in range(3)], kind)
    content, wanted = path.read_bytes(), list(read_any(path, kind))
    for _ in range(60):
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            assert list(read_any(path, kind)) == wanted
        except InputError as error:
            assert "\n" not in str(error)


CALLS = [("search", {"query": "Ada"}), ("calculator", {"expression": "1+1"})]


def rows_of_others():
    """Two rows whose calls have arguments of different names, which no one struct of columns holds."""
    for number, (name, arguments) in enumerate(CALLS):
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}
        yield {
            "id": f"r{number}",
            "messages": [
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "There."},
                {"role": "assistant", "content": "There"},
            ],
        }


def calls(trajectories):
    return [(t.steps[0].call.tool, t.steps[0].call.argument, t.prediction) for t in trajectories]


EXPECTED = [("search", "Ada", "There"), ("calculator", "1+1", "There")]


@pytest.mark.parametrize("whole", [False, True], ids=["each message", "the whole column"])
def test_messages_as_json_in_parquet(tmp_path, whole):
    """Arrow's own extension type, by pyarrow alone."""
    import pyarrow as pa
    import pyarrow.parquet

    messages = [row["messages"] for row in rows_of_others()]
    texts = [json.dumps(one if whole else message) for one in messages for message in ([one] if whole else one)]
    column = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts))
    if not whole:
        column = pa.ListArray.from_arrays(pa.array([0, 4, 8], pa.int32()), column)
    pa.parquet.write_table(pa.table({"id": ["r0", "r1"], "messages": column}), tmp_path / "rows.parquet")
    assert calls(read_any(tmp_path / "rows.parquet", "messages")) == EXPECTED


def test_json_that_is_none_is_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    storage = pa.array(['{"role": "user"'])
    column = pa.ExtensionArray.from_storage(pa.json_(), storage)
    pa.parquet.write_table(pa.table({"messages": column}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        list(read_any(tmp_path / "rows.parquet", "messages"))


@pytest.mark.parametrize("how", [{}, {"on_mixed_types": "use_json"}], ids=["columns", "json"])
def test_messages_that_datasets_wrote(tmp_path, how):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(list(rows_of_others()), **how).to_parquet(tmp_path / "rows.parquet")
    assert calls(read_any(tmp_path / "rows.parquet", "messages")) == EXPECTED


def test_prompts_and_completions_of_trl_are_read():
    row = next(rows_of_others())
    made = from_trl({"prompt": row["messages"][:1], "completion": row["messages"][1:]})
    assert made == from_messages({"messages": row["messages"]})
    plain = from_trl({"prompt": "Where?", "completion": "<answer>There</answer>"})
    assert plain.prompt == "Where?" and plain.prediction == "There" and plain.steps[0].verdict is None


@pytest.mark.parametrize(
    "row, field",
    [
        ({"prompt": "Where?", "completion": []}, "completion[0]"),
        ({"prompt": "Where?", "completion": 3}, "completion"),
        ({"prompt": [{"role": "tool", "content": "x"}], "completion": "y"}, "prompt[0]"),
        ({"prompt": [{"role": "user"}, {"role": "assistant"}, {"role": "user"}], "completion": "y"}, "prompt"),
        ({"prompt": "x", "completion": [{"role": "assistant"}, {"role": "assistant"}]}, "completion[1]"),
    ],
)
def test_bad_prompts_and_completions_are_refused_by_row_and_field(row, field):
    with pytest.raises(InputError) as caught:
        from_trl(row, "rows.jsonl", 7)
    assert (caught.value.line, caught.value.field) == (7, field)
