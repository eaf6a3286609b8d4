"""What a judge's answer says: a verdict, a score, or neither."""

from __future__ import annotations

import functools
import math
import re

from swirl.trajectories.record import TopLogProbs, Verdict

_SENTENCE_END = re.compile(r"[.!?;\n]+")


@functools.cache
def _verdict_patterns(good: str, bad: str) -> tuple[re.Pattern, re.Pattern]:
    """(one of the words by itself, one of them denied)"""
    word = rf"(?:{good}|{bad})(?![^\W_])"
    return re.compile(rf"(?<![^\W_]){word}"), re.compile(rf"(?i:\b(?:not|never|neither|no)|n't)\W+{word}")


def read_verdict(text: str, good: str = "GOOD", bad: str = "BAD") -> Verdict | None:
    """The last GOOD or BAD (in capitals, a word of its own) as "GOOD" or "BAD"; None where none is clear.

    The sentence or line that holds the last such word is the final verdict: one that holds both words, or
    denies its word ("not GOOD"), is none.
    """
    word, denial = _verdict_patterns(good, bad)
    for sentence in reversed(_SENTENCE_END.split(text)):
        words = set(word.findall(sentence))
        if not words:
            continue
        if len(words) == 2 or denial.search(sentence):
            return None
        return "GOOD" if words == {good} else "BAD"
    return None


def read_score(text: str) -> float | None:
    """The last `SCORE: n` with one digit n, as n / 9; None where there is none."""
    scores = re.findall(r"SCORE\W*?([0-9]+(?:\.[0-9]+)?)", text)
    return int(scores[-1]) / 9 if scores and len(scores[-1]) == 1 else None


def expected_score(top_log_probs: TopLogProbs | None) -> float | None:
    """Mean digit / 9 under the model at the last token where digits hold most of the probability; None
    without one.
    """
    for alternatives in reversed(top_log_probs or ()):
        mass = {}
        for name, log_prob in alternatives:
            digit = name.strip(" \u2581\u0120")  # tokenizers' own spaces
            if len(digit) == 1 and digit in "0123456789":
                mass[int(digit)] = mass.get(int(digit), 0.0) + math.exp(min(0.0, log_prob))
        total = sum(mass.values())
        if total > 0.5:
            return sum(digit * weight for digit, weight in mass.items()) / total / 9
    return None
