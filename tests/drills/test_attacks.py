"""The long attacks in miniature; `python -m tests.drills` runs the whole."""

from __future__ import annotations

import pytest

from tests.drills import calculator_fuzz, damaged_answers, damaged_files, hostile_server, verdicts


@pytest.mark.parametrize(
    "drill",
    [
        verdicts.drill,
        lambda seed: damaged_answers.drill(seed, 40),
        lambda seed: damaged_files.drill(seed, 20),
        lambda seed: hostile_server.drill(seed, 60),
        lambda seed: calculator_fuzz.drill(seed, 2000, 20),
    ],
    ids=["verdicts", "damaged_answers", "damaged_files", "hostile_server", "calculator_fuzz"],
)
def test_nothing_forged_nothing_inverted_nothing_stalled(drill):
    rows = list(drill(7))
    assert rows and all(row.attempts for row in rows)
    assert not [row for row in rows if row.failures]
