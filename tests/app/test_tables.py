"""The tables of evaluate and train: within 80 columns, whatever was measured, and a dash for what was not."""

from __future__ import annotations

import pytest

from swirl.app.scores import Score
from swirl.app.tables import print_comparison, print_scores


def score(task="counterfactual-2", **changes):
    values = dict(
        accuracy=1.0, interval=(1.0, 1.0), f1=1.0, good_steps=1.0, unjudged_steps=0, questions=7405, unanswered=1204,
        judged_accuracy=1.0, judged_interval=(1.0, 1.0), unjudged_answers=1000,
        accuracy_by_hops={"2": 1.0, "3": 1.0, "4": 1.0}, correct=(True, False, None, True),
    )  # fmt: skip
    return Score(task=task, **values | changes)


@pytest.mark.parametrize("task", ["bridge", "counterfactual-2", "a task of one's own with a name that is far too long"])
def test_the_widest_rows_fit_80_columns_and_lose_nothing(task, capsys):
    print_scores([score(task), score("bridge")])
    print_comparison([score(task, accuracy=0.005)], [score(task, correct=(True, True, None, True))])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "…" not in shown
    for whole in ("100.0 [100, 100]", "6201/7405", "1000 unjudged", "100.0 → 100.0", "4:100%"):
        assert whole in shown


def test_what_was_not_measured_is_a_dash(capsys):
    blank = score(
        "own", accuracy=0.0, interval=(0.0, 0.0), good_steps=None, judged_accuracy=None, judged_interval=None,
        unanswered=0, unjudged_answers=4, accuracy_by_hops={},
    )  # fmt: skip
    print_scores([blank])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("own"))
    assert row.split() == ["own", "7405", "0.0", "[0,", "0]", "–", "100.0", "–"]
    print_comparison([blank], [blank])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("own"))
    assert row.split()[-4:] == ["–", "–", "→", "–"]


def test_the_gain_is_over_questions_that_both_have_answered(capsys):
    before = score("own", accuracy=0.5, correct=(True, False, None, False, True))
    after = score("own", accuracy=1.0, correct=(True, True, True, None, True))
    print_comparison([before], [after])
    assert "+100 [+0, +200]" in capsys.readouterr().out
