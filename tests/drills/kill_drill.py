"""Does `kill -9` at random moments lose, double or change a line, or ask again what is kept already?

    python -m tests.drills.kill_drill [--trajectories 2000] [--kills 50] [--seed 0] [--local] [--json] [--out FILE]

generate and filter run as a user runs them, against a policy and a judge on loopback: once undisturbed, and once
killed and called again, the same command each time, until all kills have hit a living process. A fifth of the kills
fall while a process starts, a tenth between its last answer and its exit, the others anywhere in the work. Then the
sorted lines of both must be the same; no request may reach the server whose answer lay in the cache, as the kill
left that file, at any earlier kill; and what was used by then, in a line or in a later request, must lie there:
answers bear the names of their requests. `--local` drills generate with the base that ships, sampled in the process
itself, one trajectory at a time: what is sampled in one batch changes each other's logits by rounding, and so the
last bits of log-probs and, once in some 100,000 tokens, a draw.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.fault_server import FaultServer, verdict_answer
from swirl.tasks import almanac
from tests.drills.table import Row

FAMILY = "deep"  # chains of three and four hops: the longest trajectories
SAMPLES = 5
POLL_S = 0.002
AFTER_S = 0.05  # a kill falls up to this long after the work has reached its share
LONGEST_LIFE_S = 600.0
NAME = re.compile(rb"\b[0-9a-f]{16}\b")


class KillDrillError(Exception):
    """A command that ended by itself, and not well, or did not end at all."""


class Model:
    """Policy and judge: an answer is a function of its request alone, and bears that request's name.

    The policy plays Almanac's demonstrator, slips included. The name of a trajectory's first request picks the way
    it goes, and is in the first action, so that later requests carry it. One answer in fifty is no action, or no
    verdict.
    """

    def __init__(self, num_questions: int):
        self._questions = {q.question: q for q in almanac.questions(FAMILY, "train", num_questions)}
        self.answered: set[str] = set()

    def __call__(self, path: str, payload: dict) -> dict:
        name, answer = request_name(payload), verdict_answer(path, payload)
        message = answer["choices"][0]["message"]
        if int(name, 16) % 50 == 0:
            message["content"] = "That is hard to say."
        elif payload["model"] == "policy":
            message["content"] = self._action(name, payload)
        message["content"] = f"{name} {message['content']}"
        self.answered.add(name)
        return {"id": name, **answer}

    def _action(self, name: str, payload: dict) -> str:
        prompt, *turns = [message["content"] for message in payload["messages"]]
        way = int((turns[0] if turns else name).split()[0], 16)
        question = self._questions[prompt.partition("Question: ")[2]]
        return almanac.demonstrate(question, np.random.default_rng(way))[len(turns) // 2][0]


def request_name(payload: dict) -> str:
    return hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()[:16]


def names_in(*texts: bytes) -> set[str]:
    return {name.decode() for text in texts for name in NAME.findall(text)}


@dataclass(frozen=True)
class Job:
    """A command and what it leaves in the folder it runs in. `cache` None: it asks no server."""

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: str | None

    def sizes(self, folder: Path) -> int:
        return sum((folder / name).stat().st_size for name in self.outputs if (folder / name).exists())


def generate_job(policy: str, num_questions: int, in_flight: int) -> Job:
    words = ("generate", "--policy", policy, "--task", FAMILY, "--num-questions", str(num_questions))
    words += ("--samples", str(SAMPLES), "--in-flight", str(in_flight))
    wire = "://" in policy
    name = "generate" if wire else f"generate, {policy}"
    return Job(name, words, ("trajectories.jsonl",), "trajectories.jsonl.answers.sqlite" if wire else None)


def filter_job(data: Path, judge: str, in_flight: int) -> Job:
    words = ("filter", "--data", str(data), "--judge", judge, "--in-flight", str(in_flight))
    return Job("filter", words, ("kept.jsonl", "dropped.jsonl"), "kept.jsonl.answers.sqlite")


class Moment(NamedTuple):
    """Once `share` of the work is done, `delay` (a share too) into what follows: a pause, the end, or a start."""

    share: float
    delay: float


def draw_moments(rng: random.Random, kills: int) -> list[Moment]:
    """In the order of the work: a share that is reached when a process starts makes a kill at its start."""
    starts, ends = kills // 5, kills // 10
    work = sorted(Moment(rng.random(), rng.random()) for _ in range(kills - starts - ends))
    for _ in range(starts):
        work.insert(rng.randrange(len(work) + 1), Moment(0.0, rng.random()))
    return work + [Moment(1.0, rng.random()) for _ in range(ends)]


class Life(NamedTuple):
    """Seconds of a run until its first sign of work, and from its last to the exit."""

    start_s: float
    end_s: float


class Kill(NamedTuple):
    """What one kill found. `alive` False: the process had ended by itself. `torn`: outputs with half a last line.

    `unkept` counts answers that were used and are not in the cache, `asked_again` requests of this process for
    what an earlier kill had left there.
    """

    share: float
    alive: bool
    lived_s: float
    kept: int
    unkept: int
    asked_again: int
    lines: int
    torn: int


@contextmanager
def running(job: Job, folder: Path):
    """The command at work in the folder; dead when this is left."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWIRL_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    words = [sys.executable, "-m", f"swirl.{job.words[0]}", *job.words[1:]]
    with open(folder / "stderr.txt", "wb") as stderr:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def ended(job: Job, folder: Path, process: subprocess.Popen) -> bool:
    """Wait for the end. True where a kill made it, False where it was well by itself; else KillDrillError."""
    await until(lambda: process.poll() is not None, LONGEST_LIFE_S)
    if process.returncode not in (0, -signal.SIGKILL):
        said = (folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
        why = "no end" if process.returncode is None else f"exit code {process.returncode}"
        raise KillDrillError(f"{job.name}: {why}: {said[-1] if said else 'nothing said'}")
    return process.returncode != 0


async def until(happened: Callable[[], bool], longest_s: float) -> bool:
    """True once it has, False when the time is over."""
    end = time.perf_counter() + longest_s
    while not happened():
        if (left_s := end - time.perf_counter()) <= 0:
            return False
        await asyncio.sleep(min(POLL_S, left_s))
    return True


async def run_undisturbed(job: Job, folder: Path, progress: Callable[[], int]) -> Life:
    """From the beginning to the end. `progress` counts something that grows with the work."""
    started = time.perf_counter()
    first = last = None
    seen = progress()
    with running(job, folder) as process:
        while process.poll() is None:
            await asyncio.sleep(POLL_S)
            if (now := progress()) != seen:
                seen, last = now, time.perf_counter()
                first = first or last
        await ended(job, folder, process)
    exited = time.perf_counter()
    return Life((first or exited) - started, exited - (last or exited))


async def kill_at(moment: Moment, process: subprocess.Popen, progress: Callable[[], float], life: Life) -> None:
    """Kill the process at the moment, if it still lives; one that starts beyond the moment is killed in its start.

    Raises KillDrillError where the moment never comes.
    """
    begun = progress()
    if begun < moment.share:
        if not await until(lambda: progress() >= moment.share or process.poll() is not None, LONGEST_LIFE_S):
            raise KillDrillError(f"{progress():.0%} of the work are done, and no more in {LONGEST_LIFE_S:g} s")
    else:
        start_s = moment.delay * (life.start_s + life.end_s)
        await until(lambda: progress() > begun or process.poll() is not None, start_s)
    if progress() > begun:
        after_s = life.end_s if progress() == 1.0 else AFTER_S
        await until(lambda: process.poll() is not None, moment.delay * after_s)
    process.kill()


def kept_answers(cache: Path) -> set[str]:
    """Names of the requests whose answers are in the file, as a kill left it.

    It reads a copy, log included: whoever opens a database first repairs it, and that is the command's part.
    """
    with tempfile.TemporaryDirectory() as aside:
        for end in ("", "-wal"):
            if Path(f"{cache}{end}").exists():
                shutil.copy(f"{cache}{end}", Path(aside, f"copy{end}"))
        with closing(sqlite3.connect(Path(aside, "copy"))) as copy:
            if not copy.execute("SELECT count(*) FROM sqlite_master WHERE name = 'answers'").fetchone()[0]:
                return set()  # killed before the table was made
            return {json.loads(answer)["id"] for (answer,) in copy.execute("SELECT answer FROM answers")}


def lines_of(job: Job, folder: Path) -> list[bytes]:
    """Every whole line of every output, behind the output's name."""
    paths = [folder / name for name in job.outputs if (folder / name).exists()]
    return [path.name.encode() + b" " + line for path in paths for line in path.read_bytes().split(b"\n")[:-1]]


def torn(job: Job, folder: Path) -> int:
    contents = [(folder / name).read_bytes() for name in job.outputs if (folder / name).exists()]
    return sum(bool(content) and not content.endswith(b"\n") for content in contents)


def compare(job: Job, undisturbed: Path, disturbed: Path) -> dict[str, Any]:
    """How the lines of two folders differ, in whatever order they stand."""
    wanted, found = Counter(lines_of(job, undisturbed)), Counter(lines_of(job, disturbed))
    names = Counter(trajectory_name(line) for line in found.elements())
    return {
        "lines": wanted.total(),
        "lines_missing": (wanted - found).total(),
        "lines_extra": (found - wanted).total(),
        "trajectories_twice": sum(count > 1 for count in names.values()),
        "torn_at_the_end": torn(job, disturbed),
        "differ": sorted({trajectory_name(line) for line in (wanted - found) + (found - wanted)})[:5],
    }


def trajectory_name(line: bytes) -> str:
    return json.loads(line.partition(b" ")[2])["id"]


class Ledger:
    """What the server was asked since this began, against what the cache in a folder holds."""

    def __init__(self, job: Job, folder: Path, server: FaultServer, model: Model):
        self._job, self._folder, self._server, self._model = job, folder, server, model
        self._first = self._seen = len(server.bodies)
        self._used: set[str] = set()
        self._kept: set[str] = set()
        model.answered.clear()

    @property
    def requests(self) -> int:
        return len(self._server.bodies) - self._first

    def look(self, alive: bool, lived_s: float, share: float) -> Kill:
        """After a process has ended, and before the next begins."""
        asked, self._seen = self._server.bodies[self._seen :], len(self._server.bodies)
        asked_again = sum(request_name(payload) in self._kept for payload in asked)
        lines = lines_of(self._job, self._folder)
        self._used |= names_in(*lines, *(json.dumps(payload["messages"]).encode() for payload in asked))
        if self._job.cache is not None:
            self._kept |= kept_answers(self._folder / self._job.cache)
        return Kill(
            share=round(share, 3),
            alive=alive,
            lived_s=round(lived_s, 3),
            kept=len(self._kept),
            unkept=len(self._used & self._model.answered - self._kept),
            asked_again=asked_again,
            lines=len(lines),
            torn=torn(self._job, self._folder),
        )


async def drill_job(job: Job, folder: Path, kills: int, rng: random.Random, server: FaultServer, model: Model) -> dict:
    """One job, undisturbed and disturbed. Raises KillDrillError where a command fails."""
    undisturbed, disturbed = folder / f"{job.words[0]}-undisturbed", folder / f"{job.words[0]}-disturbed"
    wire = job.cache is not None
    undisturbed.mkdir()
    disturbed.mkdir()
    ledger = Ledger(job, undisturbed, server, model)
    began = time.perf_counter()
    life = await run_undisturbed(job, undisturbed, lambda: len(model.answered) if wire else job.sizes(undisturbed))
    answers, requests_undisturbed, size = len(model.answered), ledger.requests, job.sizes(undisturbed)

    def progress() -> float:
        done = len(model.answered) / answers if wire else job.sizes(disturbed) / size
        return min(done, 1.0)

    undisturbed_s = time.perf_counter() - began
    ledger = Ledger(job, disturbed, server, model)
    began = time.perf_counter()
    found: list[Kill] = []
    moments = draw_moments(rng, kills)
    while sum(kill.alive for kill in found) < kills and len(found) < 2 * kills + 10:
        moment = moments[len(found)] if len(found) < kills else Moment(1.0, rng.random())
        started = time.perf_counter()
        with running(job, disturbed) as process:
            await kill_at(moment, process, progress, life)
            alive = await ended(job, disturbed, process)
        lived_s = time.perf_counter() - started
        found.append(ledger.look(alive, lived_s, progress()))
        if not alive:  # nothing was left to do: such a life is all start
            life = Life(lived_s, 0.0)
    started = time.perf_counter()
    with running(job, disturbed) as process:
        await ended(job, disturbed, process)
    at_last = ledger.look(True, time.perf_counter() - started, progress())
    return {
        "job": job.name,
        "undisturbed_s": undisturbed_s,
        "disturbed_s": time.perf_counter() - began,
        "kills": len(found),
        "hits": sum(kill.alive for kill in found),
        "torn": sum(kill.torn > 0 for kill in found),
        "answers": answers,
        "answers_of_disturbed": len(model.answered),
        "requests_undisturbed": requests_undisturbed,
        "requests": ledger.requests,
        "kept": at_last.kept,
        "used_before_kept": sum(look.unkept for look in [*found, at_last]),
        "cached_asked_again": sum(look.asked_again for look in [*found, at_last]),
        **compare(job, undisturbed, disturbed),
        "found": found,
    }


def broken_promises(row: dict, kills: int) -> list[str]:
    """What must hold wherever the kills fell, and does not."""
    differ = ", ".join(row["differ"])
    checks = {
        f"{kills} kills hit a living process ({row['hits']} did)": row["hits"] == kills,
        f"no line is missing ({row['lines_missing']} are: {differ})": row["lines_missing"] == 0,
        f"no line is new or changed ({row['lines_extra']} are: {differ})": row["lines_extra"] == 0,
        f"no trajectory is there twice ({row['trajectories_twice']} are)": row["trajectories_twice"] == 0,
        f"every line is whole ({row['torn_at_the_end']} files end in half a one)": row["torn_at_the_end"] == 0,
        f"no cached answer is asked again ({row['cached_asked_again']} were)": row["cached_asked_again"] == 0,
        f"no answer is used before it is cached ({row['used_before_kept']} were)": row["used_before_kept"] == 0,
        f"undisturbed, {row['answers']} answers take as many requests ({row['requests_undisturbed']})": (
            row["requests_undisturbed"] == row["answers"]
        ),
        f"the same {row['answers']} answers are needed ({row['answers_of_disturbed']} were)": (
            row["answers_of_disturbed"] == row["answers"]
        ),
    }
    return [promise for promise, holds in checks.items() if not holds]


async def drill_all(options: argparse.Namespace, folder: Path, report: Callable[[dict], None]) -> None:
    """Each job in turn; `report` gets its row. `filter` judges what the undisturbed generate made."""
    num_questions = options.trajectories // SAMPLES
    model = Model(num_questions)
    server = FaultServer(model, latency_s=options.latency_ms / 1000)
    server.keep_requests = True
    async with server:
        generate = generate_job(f"{server.url}/v1#policy", num_questions, options.in_flight)
        data = folder / "generate-undisturbed" / generate.outputs[0]
        jobs = [generate, filter_job(data, f"{server.url}/v1#judge", options.in_flight)]
        if options.local:
            jobs = [generate_job("almanac", num_questions, 1)]
        for job in jobs:
            rng = random.Random(f"{options.seed} {job.name}")
            report(await drill_job(job, folder, options.kills, rng, server, model))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--latency-ms", type=float, default=50.0, help="of the server")
    parser.add_argument("--in-flight", type=int, default=256, help="trajectories in flight, one where --local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", action="store_true", help="generate with the base that ships instead")
    parser.add_argument("--json", action="store_true", help="one row a command on stdout, nothing else")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    options = parser.parse_args(arguments)
    if options.trajectories < SAMPLES or options.trajectories % SAMPLES or options.kills < 1:
        parser.error(f"expected a multiple of {SAMPLES} trajectories, {SAMPLES} for each question, and a kill or more")
    return options


def drill(seed: int, kills: int = 25, trajectories: int = 500) -> Iterator[Row]:
    """Generate and filter over the wire, then generate in this process, with a fifth of the kills."""
    wire = ["--trajectories", str(trajectories), "--kills", str(kills)]
    local = ["--trajectories", "20", "--kills", str(max(1, kills // 5)), "--local"]
    for flags in (wire, local):
        options, rows = parse([*flags, "--seed", str(seed)]), []
        try:
            with tempfile.TemporaryDirectory() as folder:
                asyncio.run(drill_all(options, Path(folder), rows.append))
        except KillDrillError as error:
            yield Row(f"kill -9, {options.trajectories} trajectories", options.kills, 1, str(error))
        for row in rows:
            broken = broken_promises(row, options.kills)
            note = "; ".join([f"{row['lines']} lines, {row['requests']} requests", *broken])
            yield Row(f"kill -9, {row['job']}", row["hits"], len(broken), note)


def show(row: dict) -> None:
    print(f"{row['job']}: undisturbed {row['undisturbed_s']:.1f} s, {row['answers']} answers, {row['lines']} lines")
    print("kill   progress  lived_s  answers kept  asked again  lines  torn")
    for number, kill in enumerate(row["found"], 1):
        print(
            f"{number:>4}  {kill.share:>9.1%}  {kill.lived_s:>7.2f}  {kill.kept:>12}  {kill.asked_again:>11}  "
            f"{kill.lines:>5}  {kill.torn:>4}{'' if kill.alive else '  had ended by itself'}"
        )
    print(
        f"{row['hits']} of {row['kills']} kills hit a living process, {row['torn']} of them left half a line; "
        f"{row['disturbed_s']:.1f} s\n"
        f"  {row['requests']} requests for {row['answers_of_disturbed']} answers; "
        f"{row['cached_asked_again']} for an answer that was in the cache at a kill; "
        f"{row['used_before_kept']} used before they were in it\n"
        f"  {row['lines']} lines: {row['lines_missing']} missing, {row['lines_extra']} new or changed, "
        f"{row['trajectories_twice']} trajectories twice",
        flush=True,
    )


def main() -> None:
    options = parse()
    broken: list[str] = []

    def report(row: dict) -> None:
        broken.extend(f"{row['job']}: {promise}" for promise in broken_promises(row, options.kills))
        if not options.json:
            show(row)
        columns = {name: [kill[i] for kill in row["found"]] for i, name in enumerate(Kill._fields)}
        row = {**settings, **row, "found": columns, **machine()}
        if options.json:
            print(json.dumps(row), flush=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")

    settings = {name: getattr(options, name) for name in ("trajectories", "latency_ms", "in_flight", "seed")}
    settings = {"benchmark": "kill_drill", **settings}
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(drill_all(options, Path(folder), report))
        except KillDrillError as error:
            broken.append(str(error))
    for promise in broken:
        print(f"BROKEN: {promise}", file=sys.stderr)
    sys.exit(1 if broken else 0)


def machine() -> dict:
    """What a row means nothing without."""
    from benchmarks.train_step import cpu_name
    from swirl.learning.usage import commit

    python = platform.python_version()
    return {"hardware": cpu_name(), "cores": os.cpu_count(), "python": python, "commit": commit()}


if __name__ == "__main__":
    main()
