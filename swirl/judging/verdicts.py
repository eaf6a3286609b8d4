"""What a judge's answer says: a verdict, a score, or neither.

A judge is asked to end with one line of a fixed form, and only that line is read. Words elsewhere, however plain they
look, are explanation: "BAD\\n\\n(I ignored the page's instruction to answer GOOD.)" names GOOD last and means BAD. An
answer that does not end in the asked form holds no verdict: to guess at prose is to invert some of it.
"""

from __future__ import annotations

import math
import re

from swirl.trajectories.record import TopLogProbs, Verdict

_SCORE = re.compile(r"SCORE\s*:\s*([0-9])\s*\.?")
# Some servers count the turn's end among the tokens of an answer, though its text is without it.
_TURN_ENDS = re.compile(r"(\s*<[^<>\s]+>)*\s*")


def read_verdict(text: str, good: str = "GOOD", bad: str = "BAD") -> Verdict | None:
    """GOOD or BAD where the last non-empty line is the word `good` or `bad`, as they are spelled; else None.

    Asterisks, "Verdict:" before the word and a full stop after it are passed over.
    """
    found = re.fullmatch(rf"((?i:verdict)\s*:)?\s*({good}|{bad})\s*\.?", _bare(_last_line(text)))
    return None if found is None else "GOOD" if found[2] == good else "BAD"


def read_score(text: str) -> float | None:
    """d / 9 where the last non-empty line is `SCORE: d`, d one digit, asterisks and a full stop aside; else None."""
    found = _SCORE.fullmatch(_bare(_last_line(text)))
    return None if found is None else int(found[1]) / 9


def expected_score(text: str, top_log_probs: TopLogProbs | None) -> float | None:
    """Mean digit / 9 under the model's own distribution at the token that `read_score` reads.

    None where the text holds no score, where the tokens are not this text's, where the digit is no token of its own,
    or where digits hold no more than half of the probability there.
    """
    found = _SCORE.fullmatch(_bare(_last_line(text)))
    at = _token_of_digit(_last_line(text), found[1], top_log_probs) if found and top_log_probs else None
    if at is None:
        return None
    mass: dict[int, float] = {}
    for name, log_prob in top_log_probs[at]:
        digit = _as_text(name).strip()
        if len(digit) == 1 and digit in "0123456789" and log_prob <= 0:  # NaN is not
            mass[int(digit)] = mass.get(int(digit), 0.0) + math.exp(log_prob)
    total = sum(mass.values())
    if total <= 0.5:
        return None
    return sum(digit * weight for digit, weight in mass.items()) / total / 9


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2].strip()


def _bare(line: str) -> str:
    return line.replace("*", "").strip()


def _token_of_digit(line: str, digit: str, top_log_probs: TopLogProbs) -> int | None:
    """Index of the token that is the digit of the `line` with which the answer ends; None where there is none.

    The line is found from the back, for servers may leave thoughts out of the text, and spell pieces of characters
    in many ways. It is ASCII.
    """
    tokens = [_as_text(alternatives[0][0]) if alternatives else "" for alternatives in top_log_probs]
    whole = "".join(tokens)
    start = whole.rfind(line)
    if start < 0 or not _TURN_ENDS.fullmatch(whole, start + len(line)):
        return None
    place = start + line.rindex(digit)
    for index, token in enumerate(tokens):
        if place < len(token):
            return index if token.strip() == digit else None
        place -= len(token)
    return None


def _as_text(token: str) -> str:
    """Tokenizers have their own signs for a leading space, ▁ and Ġ, and for a newline, Ċ."""
    return token.replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\n")
