"""How long does the report of a run of 10,000 trajectories take to write, to open, to filter and to search?

    python -m benchmarks.report [--trajectories 10000] [--repeats 5] [--folder DIR] [--screenshots DIR]

The run's folder is made here, in the shapes that `train` writes: a quarter test questions, each answered before and
after, the rest generated trajectories that a filter kept or dropped, with token ids and random log-probs. Headless
Chromium opens the page: `open_ms` is from the navigation to the moment that all of the first view is drawn, `filter_ms`
from a choice in a filter to the next frame, `search_ms` likewise from a typed word, `entry_ms` from a click to a
trajectory's steps; `..._cpu_ms` is what the page's main thread computed meanwhile, which a busy machine does not
stretch. `write_s` is the time to make the page, `write_cpu_s` what it computed, `page_mb` its size.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from benchmarks.chromium import Tab, chromium, open_tab
from swirl.app.report.build import write_report
from swirl.app.resolve import ALMANAC_BASE
from swirl.app.run_records import DROPPED, EVALUATED, GENERATED, KEPT, LOG_PROBS, SAMPLES, OtherLogProbs, SampledGroup
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.prompts import question_prompt
from swirl.rollout.rollout import with_ids
from swirl.storage.digest import seal
from swirl.tasks import almanac
from swirl.tools.search import search_tool
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Step, Trajectory, with_call

FAMILIES = ("bridge", "deep", "counterfactual", "mixed")
UPDATES = 60


def demonstrated(num: int, rng: np.random.Generator) -> Iterator[Trajectory]:
    """`num` trajectories of Almanac's demonstrator with ids, log-probs and verdicts, some of them wrong."""
    tokenizer = Tokenizer.from_pretrained(ALMANAC_BASE)
    prompts = [search_tool()]
    asked = [almanac.questions(family, "train", -(-num // len(FAMILIES))) for family in FAMILIES]
    for number in range(num):
        question = asked[number % len(FAMILIES)][number // len(FAMILIES)]
        script = almanac.demonstrate(question, rng, slips=almanac.HABITS)
        steps = [with_call(Step(action=action, observation=observation)) for action, observation in script]
        right = bool(rng.random() < 0.6)
        made = with_ids(
            Trajectory(
                id=f"{question.id}#{number}", question=question, steps=tuple(steps), stop="answer", outcome=right,
                prompt=question_prompt(question.question, prompts, 5), tools={"search": "search_query"},
                prediction=question.answer if right else "Nobody", policy="almanac",
            ),
            tokenizer,
        )  # fmt: skip
        yield replace(made, steps=tuple(_judged(step, rng) for step in made.steps))


def _judged(step: Step, rng: np.random.Generator) -> Step:
    good = bool(rng.random() < 0.8)
    log_probs = tuple((-rng.exponential(0.3, len(step.action_ids))).tolist())
    reason = "the page is needed next" if good else "the results do not say that"
    return replace(step, log_probs=log_probs, verdict="GOOD" if good else "BAD", reason=reason)


def make_run(folder: Path, num: int, seed: int = 0) -> None:
    """The folder of a finished run of `num` trajectories in all."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    made = list(demonstrated(num - num // 8, rng))
    before, generated = made[: num // 8], made[num // 8 :]
    after = [replace(t, outcome=bool(rng.random() < 0.8), prediction=f"answer {i}") for i, t in enumerate(before)]
    kept = [t for t in generated if all(step.verdict == "GOOD" for step in t.steps)]
    passed = {t.id for t in kept}
    dropped = [replace(t, dropped="process: a step is BAD") for t in generated if t.id not in passed]
    files = {EVALUATED["before"]: before, EVALUATED["after"]: after, GENERATED: generated, KEPT: kept, DROPPED: dropped}
    for name, trajectories in files.items():
        write_trajectories(folder / name, trajectories)
    others = [
        OtherLogProbs(EVALUATED[when], t.question.task, t.id, policy, tuple(s.log_probs for s in t.steps))
        for when, policy, answers in (("before", "trained", before), ("after", "base", after))
        for t in answers
    ]
    _write(folder / LOG_PROBS, map(msgspec.to_builtins, others))
    drawn = [_drawn(t, k, i, rng) for i, t in enumerate(kept[:UPDATES]) for k in range(len(t.steps))]
    _write(folder / SAMPLES, map(msgspec.to_builtins, drawn))
    _write(folder / "metrics.jsonl", (_metrics(update, rng) for update in range(1, UPDATES + 1)))
    config = {"model": "almanac", "task": FAMILIES, "updates": UPDATES, "seed": seed, "mode": "sampled"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "summary.json").write_text(json.dumps(_summary(before, after)))


def _write(path: Path, lines) -> None:
    path.write_bytes(b"".join(seal(json.dumps(line).encode() + b"\n") for line in lines))


def _drawn(trajectory: Trajectory, k: int, update: int, rng: np.random.Generator) -> SampledGroup:
    step = replace(trajectory.steps[k], observation=None, observation_ids=None)
    attempts = tuple((replace(step, reward=float(rng.random() < 0.5)),) for _ in range(4))
    advantages = tuple(rng.normal(0, 0.5, 4).tolist())
    return SampledGroup(update + 1, trajectory.question, k, attempts, advantages, 24, trajectory.id)


def _metrics(update: int, rng: np.random.Generator) -> dict:
    reward = float(1 - 0.4 * np.exp(-update / 12) + rng.normal(0, 0.02))
    return {
        "update": update, "reward": reward, "loss": float(rng.normal(0, 0.01)), "grad_norm": 0.5, "actions": 240,
        "tokens_per_s": 6000.0, "masked": 0, "refused": 1, "kl": 0.001 * update, "entropy": 0.3 * 0.97**update,
        "truncated": 0.01, "action_length": 7.0, "learning_rate": 1e-4, "peak_bytes": 2**30,
    }  # fmt: skip


def _summary(before: list[Trajectory], after: list[Trajectory]) -> dict:
    def share(answers, family):
        return float(np.mean([t.outcome for t in answers if t.question.task == family]))

    answers = {"before": before, "after": after}
    scores = {f"accuracy_{when}": {f: share(made, f) for f in FAMILIES} for when, made in answers.items()}
    gains = {f: scores["accuracy_after"][f] / scores["accuracy_before"][f] - 1 for f in FAMILIES}
    good = {f"good_steps_{when}": dict.fromkeys(FAMILIES, 0.8) for when in EVALUATED}
    rest = {"updates": UPDATES, "wall_s": 100.0, "tokens_per_s": 6000.0, "peak_rss_bytes": 2**30, "seed": 0}
    return {**scores, "relative_gain": gains, **good, **rest, "commit": "none"}


READY = "document.documentElement?.dataset.ready === 'yes'"
# Milliseconds from a change until the frame after it is done.
TIMED = """(async () => {
  const control = document.querySelector(%r), began = performance.now();
  control.value = %r;
  control.dispatchEvent(new Event(%r, {bubbles: true}));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
})()"""
OPENED = """(async () => {
  const began = performance.now();
  document.querySelectorAll(".row")[%d].click();
  while (!document.querySelector(".step")) await new Promise((done) => setTimeout(done));
  return performance.now() - began;
})()"""


class Times:
    """Milliseconds by name, and beside each what the page's main thread computed."""

    def __init__(self, tab: Tab):
        self._tab = tab
        self.taken: dict[str, list[float]] = {}

    async def take(self, name: str, script: str) -> None:
        """`script` returns how long it took."""
        before = await self.cpu_ms()
        self.add(name, await self._tab.run(script), await self.cpu_ms() - before)

    def add(self, name: str, wall_ms: float, cpu_ms: float) -> None:
        self.taken.setdefault(f"{name}_ms", []).append(wall_ms)
        self.taken.setdefault(f"{name}_cpu_ms", []).append(cpu_ms)

    async def cpu_ms(self) -> float:
        metrics = (await self._tab.send("Performance.getMetrics"))["metrics"]
        return 1000 * next(one["value"] for one in metrics if one["name"] == "TaskDuration")


async def measure(tab: Tab, page: Path, repeats: int) -> dict[str, float]:
    """Medians of `repeats` and the worst of each, in milliseconds. Raises RuntimeError where the page complains."""
    times = Times(tab)
    for number in range(repeats):
        await tab.open("about:blank")
        await tab.wait_for("location.href === 'about:blank'")
        await tab.send("Performance.disable")
        await tab.send("Performance.enable", timeDomain="threadTicks")
        before = await times.cpu_ms()
        await tab.open(page.resolve().as_uri())
        await tab.wait_for(READY)
        after = await times.cpu_ms()
        opened = await tab.run("performance.measure('open', {start: 0, end: 'ready'}).duration")
        times.add("open", opened, after - before if after > before else after)  # a new process counts anew
        await tab.run("location.hash = '#/trajectories'")
        await tab.wait_for("document.querySelector('.row')")
        for select, value in (("change", "mended"), ("verdict", "every step GOOD"), ("task", "deep"), ("change", "")):
            await times.take("filter", TIMED % (f"#selects [name={select}]", value, "change"))
        await tab.run("document.getElementById('filters').reset()")
        await tab.run("document.getElementById('search').focus()")
        await tab.wait_for("document.documentElement.dataset.searchable === 'yes'")
        for word in ("needed", "kel", "nobody at all", ""):
            await times.take("search", TIMED % ("#search", word, "input"))
        await times.take("entry", OPENED % number)
    if tab.complaints:
        raise RuntimeError("; ".join(tab.complaints))
    row = {name: statistics.median(values) for name, values in times.taken.items()}
    return row | {f"{name}_worst": max(values) for name, values in times.taken.items()}


async def take_screenshots(tab: Tab, folder: Path) -> None:
    """Both views at the width of a phone and of a desk, light and dark."""
    folder.mkdir(parents=True, exist_ok=True)
    mended = await tab.run("document.querySelector('#changed a').getAttribute('href')")
    for width, height in ((390, 844), (1440, 900)):
        for dark in (False, True):
            await tab.look(width=width, height=height, dark=dark)
            for name, address in (("overview", "#/"), ("list", "#/trajectories"), ("entry", mended)):
                await tab.run(f"location.hash = {address!r}")
                await tab.run("new Promise((done) => setTimeout(done, 400))")
                await tab.screenshot(folder / f"{name}-{width}-{'dark' if dark else 'light'}.png")


async def _main(given: argparse.Namespace, folder: Path) -> dict:
    if not (folder / "summary.json").exists():
        make_run(folder, given.trajectories)
    started, computed = time.perf_counter(), time.process_time()
    page = write_report([folder])
    row = {"trajectories": given.trajectories, "write_s": time.perf_counter() - started}
    row["write_cpu_s"] = time.process_time() - computed
    row["page_mb"] = page.stat().st_size / 2**20
    async with open_tab() as tab:
        await tab.look(width=1440, height=900)
        row |= await measure(tab, page, given.repeats)
        if given.screenshots:
            await take_screenshots(tab, given.screenshots)
        row["chromium"] = (await tab.send("Browser.getVersion"))["product"]
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the run is made, or lies since an earlier call; default: a temporary folder"
    )
    parser.add_argument("--screenshots", type=Path, help="folder for pictures of the page")
    parser.add_argument("--json", action="store_true", help="one JSON row on stdout, no table")
    parser.add_argument("--out", type=Path, help="also append the row to this file (.jsonl)")
    given = parser.parse_args(arguments)
    if chromium() is None:
        sys.exit("no chromium on this machine: apt-get install chromium")
    from benchmarks.harness import append, machine

    with tempfile.TemporaryDirectory() as temporary:
        row = asyncio.run(_main(given, given.folder or Path(temporary) / "run"))
    import torch

    row = {"benchmark": "report", **row, **machine(torch.device("cpu"))}
    if given.out:
        append(given.out, [row])
    if given.json:
        print(json.dumps(row))
    else:
        for name, value in row.items():
            print(f"{name:18} {value:.1f}" if isinstance(value, float) else f"{name:18} {value}")


if __name__ == "__main__":
    main()
