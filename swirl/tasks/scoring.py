"""The official scores of the five data sets, quirks included, and their averages.

Sources: hotpot_evaluate_v1.py (HotPotQA), SQuAD 2's evaluate (MuSiQue), BeerQA's eval, grade-school-math's
dataset.py.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_CLOSED = ("yes", "no", "noanswer")
_NUMBER = re.compile(r"(?<![\d.])-?\s?[$£€]?-?(?:\d+(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|-?\.\d+")
_SCALE = re.compile(r"\b(hundred|thousand|million|billion|trillion|dozen|k|m|bn)\b", re.IGNORECASE)


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: in this order."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golden: str) -> float:
    """1.0 where both normalise to the same text."""
    return float(normalize_answer(prediction) == normalize_answer(golden))


def _overlap(prediction: list[str], golden: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(golden)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(golden)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str, golden: str) -> float:
    """HotPotQA's F1 over bags of words: 0 where one side is yes, no or noanswer and they differ, or both
    are empty.
    """
    ours, theirs = normalize_answer(prediction), normalize_answer(golden)
    if ours != theirs and (ours in _CLOSED or theirs in _CLOSED):
        return 0.0
    return _overlap(ours.split(), theirs.split())


def f1_squad(prediction: str, golden: str) -> float:
    """SQuAD 2's F1, which MuSiQue uses: no rule for yes and no; an empty side scores 1 only against
    another.
    """
    ours, theirs = normalize_answer(prediction).split(), normalize_answer(golden).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _overlap(ours, theirs)


def read_number(text: str) -> Fraction | None:
    """The one number of a short answer ("$1,000.50", "10 dollars", "1/2"), None where there is none, or
    several.
    """
    text = text.replace("−", "-").strip()
    if len(text) > 200 or _SCALE.search(text):
        return None
    found = [match.group() for match in _NUMBER.finditer(text) if match.group().isascii()]
    if len(found) != 1:
        return None
    over, _, under = re.sub(r"[$£€,\s]", "", found[0]).partition("/")
    if under and int(under) == 0:
        return None
    return Fraction(over.replace("--", "-")) / int(under or 1)


def same_number(prediction: str, golden: str) -> bool:
    """The paper's rule for numbers: 10, 10.00 and $10 agree. False where either side is not one number."""
    ours, theirs = read_number(prediction), read_number(golden)
    return ours is not None and ours == theirs


def mean_scores(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of every score, and `count`; the micro average. A missing prediction must be there as
    zeros.
    """
    scores = list(scores)
    totals: Counter[str] = Counter()
    for score in scores:
        totals.update(score)
    return {name: total / len(scores) for name, total in totals.items()} | {"count": len(scores)}
