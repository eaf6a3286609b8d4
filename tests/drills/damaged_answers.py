"""Flips and truncations of the file that keeps answers: whatever is damaged is asked again, and nothing else comes out.

Each damaged file is opened, read and written as a run would. An answer that comes out must be the one that went in; a
file that cannot be opened is one line; and what was put into a damaged file must be there when it is opened again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from swirl.endpoints.cache import AnswerCache
from swirl.errors import InputError
from tests.drills.table import Row

ANSWERS = {
    hashlib.sha256(b"%d" % k).digest(): (b'{"choices":[{"message":{"content":"%d"}}]}' % k) * (1 + k % 40)
    for k in range(120)
}


async def make(path: Path) -> None:
    cache = AnswerCache(path)
    await asyncio.gather(*(cache.put(key, answer) for key, answer in ANSWERS.items()))
    await cache.close()


def damage(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if draw.random() < 0.2:
        del content[draw.randrange(len(content)) :]
    else:
        for _ in range(draw.choice((1, 1, 1, 4, 64))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


async def use(path: Path) -> str:
    """What became of one damaged file."""
    try:
        cache = AnswerCache(path)
    except InputError as error:
        return "refused in one line" if "\n" not in str(error) else "failed: more than a line"
    try:
        found = {key: cache.get(key) for key in ANSWERS}
        if any(answer not in (None, ANSWERS[key]) for key, answer in found.items()):
            return "failed: another answer"
        missing = [key for key, answer in found.items() if answer is None]
        await asyncio.gather(*(cache.put(key, ANSWERS[key]) for key in missing))
    except InputError as error:
        return "refused in one line" if "\n" not in str(error) else "failed: more than a line"
    finally:
        await cache.close()
    again = AnswerCache(path)
    try:
        lost = [key for key in missing if again.get(key) != ANSWERS[key]]
    finally:
        await again.close()
    if lost:
        return "failed: asked again at every run"
    return "asked again" if missing else "unharmed"


def drill(seed: int, count: int = 1000) -> list[Row]:
    draw, outcomes = random.Random(seed), Counter()
    logging.getLogger("swirl.client").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        whole, path = Path(folder) / "whole.sqlite", Path(folder) / "answers.sqlite"
        asyncio.run(make(whole))
        for _ in range(count):
            for old in Path(folder).glob("answers.sqlite*"):
                old.unlink()
            shutil.copyfile(whole, path)
            damage(path, draw)
            try:
                outcomes[asyncio.run(asyncio.wait_for(use(path), 60))] += 1
            except Exception as error:  # noqa: BLE001, any is a failure
                outcomes[f"failed: {type(error).__name__}: {error}"] += 1
    failures = sum(times for outcome, times in outcomes.items() if outcome.startswith("failed"))
    note = "; ".join(f"{times} {outcome}" for outcome, times in outcomes.most_common())
    return [Row("damaged files of answers", count, failures, note)]
