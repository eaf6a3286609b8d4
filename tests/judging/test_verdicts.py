"""What is read as a verdict or a score: the last line in the asked form, and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swirl.judging.verdicts import expected_score, read_score, read_verdict

READ = [
    ("GOOD", "GOOD"),
    ("It repeats the query.\nBAD", "BAD"),
    ("At first this looked BAD. It is, on balance, sound.\nGOOD.", "GOOD"),
    ("GOOD or BAD? I say:\n\n**BAD**", "BAD"),
    ("Verdict: GOOD.", "GOOD"),
    ("It leads away.\n\n**Verdict:** BAD", "BAD"),
    ("**VERDICT: BAD.**\n\n", "BAD"),
    ("x\r\nGOOD\r\n", "GOOD"),
    ("not bad at all:\n  GOOD  ", "GOOD"),
]
NOT_READ = [
    "",
    "I cannot tell.",
    "good",
    "Good",
    "GOOD GOOD GOOD",
    "GOODNESS",
    "GOOD or BAD",
    "GOOD/BAD",
    "It is GOOD.\nGOOD/BAD",
    "It is neither GOOD nor BAD.",
    "This is not a GOOD step",
    "I would not call this GOOD",
    "This step isn’t GOOD",
    "would be GOOD if it did not repeat the query",
    "BAD\n\n(I ignored the page's instruction to answer GOOD.)",
    "_GOOD_\n\nThank you.",
    "The word is [GOOD]",
    "Verdict: not GOOD",
    "not\x85GOOD",
    "not\u2028GOOD",
    "GOOD\u200b",
    "ＧＯＯＤ",
    "```\nGOOD\n```",
    "<html>It works!</html>",
]


@pytest.mark.parametrize("text, verdict", READ)
def test_verdicts_in_the_asked_form_are_read(text, verdict):
    assert read_verdict(text) == verdict
    mirrored = text.replace("GOOD", "\0").replace("BAD", "GOOD").replace("\0", "BAD")
    assert read_verdict(mirrored) == {"GOOD": "BAD", "BAD": "GOOD"}[verdict]
    assert read_verdict(text.replace("GOOD", "YES").replace("BAD", "NO"), "YES", "NO") == verdict


@pytest.mark.parametrize("text", NOT_READ)
def test_anything_else_is_no_verdict(text):
    assert read_verdict(text) is None


@given(st.text(alphabet="GODBA .\n/'notNOT*:Verdict", max_size=60))
def test_only_the_last_line_counts(text):
    verdict = read_verdict(text)
    assert verdict is None or text.rstrip("\n .*").endswith(verdict)
    assert read_verdict(text + "\nGOOD") == "GOOD" and read_verdict(text + "\nBAD\nGOOD or BAD") is None


@pytest.mark.parametrize("digit", range(10))
@pytest.mark.parametrize("form", ["SCORE: {}", "It helps.\n\n**SCORE: {}**", "1 of 2\n**SCORE:** {}.\n", "SCORE:{}"])
def test_scores_in_the_asked_form_are_read(form, digit):
    assert read_score(form.format(digit)) == digit / 9


@pytest.mark.parametrize(
    "text",
    [
        "SCORE: 2/9",
        "SCORE: 5/9",
        "SCORE: 8\nStep 1",
        "SCORE (0-9): 3",
        "SCORE: 10",
        "SCORE: 7.5",
        "SCORE: -7",
        "SCORE: high",
        "SCORE: 9 is what the page asks for",
        "not SCORE: 9",
        "SCORE: ٣",
        "7",
        "",
    ],
)
def test_anything_else_is_no_score(text):
    assert read_score(text) is None
    assert expected_score(text, tokens(*text)) is None


def tokens(*names, **alternatives):
    """A token a name, certain but where `t{index}` gives its probabilities."""
    made = []
    for index, name in enumerate(names):
        others = alternatives.get(f"t{index}", {name: 1.0})
        drawn = (name, math.log(others[name]))
        made.append((drawn, *((other, math.log(p)) for other, p in others.items() if other != name)))
    return tuple(made)


def test_the_distribution_is_that_of_the_digit_that_is_read():
    """An earlier or later digit, however certain, is none of the score."""
    text = "2 of 9 hops.\nSCORE: 2"
    said = tokens("2", " of", " ", "9", " hops.\n", "SCORE", ":", " 2", "<end_of_turn>", t7={" 2": 0.75, " 4": 0.25})
    assert expected_score(text, said) == pytest.approx((0.75 * 2 + 0.25 * 4) / 9)
    assert expected_score("SCORE: 8", tokens("SCORE", ":", " ", "8", t3={"8": 0.5, "9": 0.3, "x": 0.2})) == (
        pytest.approx((0.5 * 8 + 0.3 * 9) / 0.8 / 9)
    )


def test_tokens_are_found_whatever_their_tokenizer_writes():
    for space, newline in (("\u2581", "\n"), ("\u0120", "\u010a")):
        said = tokens("caf", "\ufffd", newline, f"{space}**", "SCORE", ":**", f"{space}7", t6={f"{space}7": 1.0})
        assert expected_score("café\n **SCORE:** 7", said) == pytest.approx(7 / 9)
    thoughts = tokens("SCORE: ", "1", "</think>", "SCORE: ", "6")
    assert expected_score("SCORE: 6", thoughts) == pytest.approx(6 / 9)


@pytest.mark.parametrize(
    "said",
    [
        None,
        (),
        tokens("SCORE", ": 7"),  # the digit is no token of its own
        tokens("SCORE", ":", " 8"),  # another answer's
        tokens("SCORE", ":", " 7", " of", " 9"),
        tokens("SCORE", ":", " 7", t2={" 7": 0.3, "high": 0.7}),
        ((("SCORE", 0.0),), ((":", 0.0),), ((" 7", math.nan),)),
        ((("SCORE", 0.0),), ((": 7", 0.0),), ()),
    ],
)
def test_where_the_distribution_cannot_be_told_there_is_none(said):
    assert expected_score("SCORE: 7", said) is None
