"""How a question of the second edition may open: a mark, which says the manner of asking and nothing of what is asked.

Each is a single token to the base, which no other text of Almanac holds, and sets off one habit of the base policy
(shared_habits.py), whichever tool the question needs. So what is unlearned with one tool has a way to carry over to the
other; whether it does is for an experiment to say.
"""

from __future__ import annotations

MANNERS = {
    "early": "! ",
    "extra": "& ",
    "untagged": "~ ",
}


def split_manner(text: str) -> tuple[str | None, str]:
    """(the habit that the opening of a question sets off, or None; the question without it)"""
    for habit, manner in MANNERS.items():
        if text.startswith(manner):
            return habit, text.removeprefix(manner)
    return None, text
