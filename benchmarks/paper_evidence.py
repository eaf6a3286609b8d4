"""docs/evidence.md from the rows of benchmarks/results/paper.jsonl: a sentence with an interval, then the tables.

A row holds, by family, one letter a question: "1" where its answer was right. Two runs are compared on the same bases,
seeds and questions; the interval is the 95% bootstrap of the mean difference, bases and questions both drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import grid
from benchmarks.harness import read as read_rows
from benchmarks.paper_blocks import BASES, BLOCKS, CALCULATE, CONTROL, EVALUATED, FIRST, JUDGE, SEARCH, SEEDS, Run

Rows = dict[str, dict]
Side = list[Run]


class Difference(NamedTuple):
    """Percentage points: mean, and the 95% interval; over how many pairs of runs."""

    mean: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} points ({self.low:+.1f} to {self.high:+.1f}; {self.pairs} pairs)"

    @property
    def word(self) -> str:
        if self.low > 0:
            return "Yes"
        return "No, the reverse" if self.high < 0 else "Not decided"


def read(file: Path) -> Rows:
    """By key; of rows of one key the last counts."""
    return {row["key"]: row for row in read_rows(file)}


def right(row: dict, family: str) -> np.ndarray:
    """(questions,) 1.0 where the answer was right."""
    return np.array([letter == "1" for letter in row["families"][family]["right"]], dtype=float)


def difference(rows: Rows, ours: Side, theirs: Side, family: str, *, resamples: int = 4000) -> Difference | None:
    """How much more often `ours` are right than `theirs`, pair by pair; None where no pair has both rows."""
    pairs = [(rows[a.key], rows[b.key]) for a, b in zip(ours, theirs, strict=True) if {a.key, b.key} <= rows.keys()]
    if not pairs:
        return None
    table = 100 * np.stack([right(a, family) - right(b, family) for a, b in pairs])  # (pairs, questions)
    rng = np.random.default_rng(0)
    drawn_pairs = rng.integers(0, len(table), (resamples, len(table)))
    drawn_questions = rng.integers(0, table.shape[1], (resamples, table.shape[1]))
    means = [table[i][:, j].mean() for i, j in zip(drawn_pairs, drawn_questions, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(table.mean(), low, high, len(table))


def side(**what) -> Side:
    return [Run(base, **what) for base in BASES]


BASE = side(method="base", trained_on=())
STEP = side()
IMITATION = side(method="imitation")
LENIENT, LENIENT_IMITATION = side(judge="lenient"), side(method="imitation", judge="lenient")
CONTROLS = [Run(CONTROL, trained_on=("bridge",), evaluated_on=FIRST, seed=seed) for seed in SEEDS]
CONTROL_BASE = [Run(CONTROL, method="base", trained_on=(), evaluated_on=FIRST) for _ in SEEDS]


def _of_filter(kept: str, judge: str, method: str) -> Side:
    return side(method=method, filter=kept, judge=judge, num_trajectories=150)


# (question, ours, theirs, family)
QUESTIONS: list[tuple[str, Side, Side, str]] = [
    ("Does step reward teach anything at all?", STEP, BASE, SEARCH),
    ("Does step reward beat imitation of the same kept data?", STEP, IMITATION, SEARCH),
    ("… of the same kept data, on pages of another world?", STEP, IMITATION, "counterfactual-2"),
    ("Does it beat imitation given the same time (200 updates)?", STEP, [replace(r, updates=200) for r in IMITATION],
     SEARCH),
    ("Does it beat imitation of unfiltered data?", STEP, side(method="imitation", filter="none"), SEARCH),
    ("Does it beat online outcome RL?", STEP, side(method="outcome_rl", filter="none"), SEARCH),
    ("… online outcome RL, on pages of another world?", STEP, side(method="outcome_rl", filter="none"),
     "counterfactual-2"),
    ("Under the lenient judge: does step reward teach anything?", LENIENT, BASE, SEARCH),
    ("… does it beat imitation of the same kept data?", LENIENT, LENIENT_IMITATION, SEARCH),
    ("Do sampled actions beat recorded ones?", STEP, side(method="recorded", filter="none"), SEARCH),
    *[
        (f"Process against outcome filter, {judge} judge, {method}?", _of_filter("process", judge, method),
         _of_filter("outcome", judge, method), SEARCH)
        for judge in (JUDGE, "lenient") for method in ("sampled", "imitation")
    ],
    ("Does search carry over to the calculator, with shared habits?", STEP, BASE, CALCULATE),
    ("Does the calculator carry over to search, with shared habits?", side(trained_on=(CALCULATE,)), BASE, SEARCH),
    ("Does search carry over with habits of one tool (the control)?", CONTROLS, CONTROL_BASE, "arithmetic"),
    ("… and the calculator to search (the control)?",
     [replace(run, trained_on=("arithmetic",)) for run in CONTROLS], CONTROL_BASE, "bridge"),
    *[
        (f"Is a judge that is wrong about {share:.0%} of steps as good as the oracle?",
         side(judge=f"noisy:{share:g}", filter="none"), side(judge="rule", filter="none"), SEARCH)
        for share in (0.1, 0.2, 0.35)
    ],
    ("Is the lenient judge as good as the oracle?", side(judge="lenient", filter="none"),
     side(judge="rule", filter="none"), SEARCH),
]  # fmt: skip


def answers(rows: Rows) -> str:
    lines = []
    for question, ours, theirs, family in QUESTIONS:
        found = difference(rows, ours, theirs, family)
        lines.append([question, family, found.word if found else "not run", found or "–"])
    return grid(["question", "on", "answer", "difference in accuracy, paired"], lines)


def _mean(rows: Rows, runs: Iterable[Run], value: Callable[[dict], float | None], unit: float = 100) -> str:
    """The mean over the runs that have a row, the single values in brackets."""
    values = [value(rows[run.key]) for run in runs if run.key in rows]
    values = [unit * one for one in values if one is not None]
    if not values:
        return "–"
    digits = 1 if unit == 100 else 0
    single = f" ({', '.join(f'{one:.{digits}f}' for one in values)})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{single}"


def _by_family(rows: Rows, named: dict[str, Side], families=EVALUATED, key: str = "accuracy") -> str:
    lines = [
        [name, *(_mean(rows, runs, lambda row, f=family: row["families"][f][key]) for family in families)]
        for name, runs in named.items()
        if any(run.key in rows for run in runs)
    ]
    return grid(["", *families], lines) if lines else "Not run."


def methods(rows: Rows) -> str:
    named = {
        "base": BASE,
        "step reward, sampled actions, process filter": STEP,
        "imitation of what the process filter keeps": IMITATION,
        "imitation of it, 200 updates": [replace(run, updates=200) for run in IMITATION],
        "step reward, sampled actions, lenient judge": LENIENT,
        "imitation, lenient judge": LENIENT_IMITATION,
        "imitation of all": side(method="imitation", filter="none"),
        "online outcome RL": side(method="outcome_rl", filter="none"),
        "step reward, recorded actions, all of them": side(method="recorded", filter="none"),
    }
    cost = [
        [name, _mean(rows, runs, lambda row: row["sampled_tokens"] / 1000, 1),
         _mean(rows, runs, lambda row: row["train_s"], 1)]
        for name, runs in named.items() if runs is not BASE and any(run.key in rows for run in runs)
    ]  # fmt: skip
    return "\n\n".join([
        "Accuracy, mean over bases (single bases):", _by_family(rows, named),
        "Share of steps that the oracle, who neither filtered nor rewarded, calls GOOD:",
        _by_family(rows, named, key="good_steps"),
        "What it cost beyond the pool of trajectories, which all but outcome RL share:",
        grid(["", "sampled tokens, thousands", "training, s"], cost) if cost else "",
    ])  # fmt: skip


def headline(rows: Rows) -> str:
    """The table of the README: means over bases alone."""
    named = {
        "base": BASE,
        "**step reward on sampled actions** (the default mode)": STEP,
        "imitation of the same kept trajectories": IMITATION,
        "imitation of all trajectories": side(method="imitation", filter="none"),
        "online RL on the outcome (`--mode outcome-rl`), which sees golden answers":
            side(method="outcome_rl", filter="none"),
    }  # fmt: skip
    families = (SEARCH, "deep-2", "counterfactual-2")
    lines = [[name, *(f"{mean_accuracy(rows, runs, f):.1f}%" for f in families)] for name, runs in named.items()]
    return grid(["", *families], lines)


def mean_accuracy(rows: Rows, runs: Side, family: str) -> float:
    """In percent, over runs that all have a row."""
    return 100 * float(np.mean([rows[run.key]["families"][family]["accuracy"] for run in runs]))


def filters(rows: Rows) -> str:
    named = {
        f"{kept}, {judge}, {method}": _of_filter(kept, judge, method)
        for method in ("sampled", "imitation")
        for judge in (JUDGE, "lenient")
        for kept in ("none", "process", "outcome", "both")
    }
    return _by_family(rows, named)


def transfer(rows: Rows) -> str:
    calculated = side(trained_on=(CALCULATE,))
    both = side(trained_on=(SEARCH, CALCULATE))
    named = {"base": BASE, f"on {SEARCH}": STEP, f"on {CALCULATE}": calculated, "on both": both}
    control = {
        "base": CONTROL_BASE[:1],
        "on bridge": CONTROLS,
        "on arithmetic": [replace(run, trained_on=("arithmetic",)) for run in CONTROLS],
    }
    slips = [
        [name, *(_mean(rows, runs, lambda row, f=family, s=slip: row["families"][f]["slips"][s])
                 for family in (SEARCH, CALCULATE) for slip in SLIPS)]
        for name, runs in named.items() if any(run.key in rows for run in runs)
    ]  # fmt: skip
    return "\n\n".join([
        "Trajectories with one query too many, a habit that both tools share: "
        + "; ".join(_carried_over(rows, runs, on, family)
                    for runs, on, family in ((calculated, CALCULATE, SEARCH), (STEP, SEARCH, CALCULATE)))
        + ". Of a habit's share there is no interval: rows hold it by base alone.",
        "Shared habits:", _by_family(rows, named),
        "Habits of one tool (the control; one base, three seeds of training):",
        _by_family(rows, control, FIRST), "Trajectories with each slip, shared habits:",
        grid(["", *(f"{family}: {slip}" for family in (SEARCH, CALCULATE) for slip in SLIPS)], slips) if slips else "",
    ])  # fmt: skip


def _carried_over(rows: Rows, trained: Side, trained_on: str, family: str) -> str:
    """How often a query too many shows in a family, before training on another and after."""
    before, after = (
        _mean(rows, runs, lambda row: row["families"][family]["slips"]["too many"]) for runs in (BASE, trained)
    )
    return f"on {family}, {before}% before and {after}% after training on {trained_on}"


SLIPS = ("refused", "repeat", "too few", "too many")


def others(rows: Rows) -> str:
    """The blocks of one table each."""
    calculated = {"trained_on": (CALCULATE,)}
    tables = {
        "A noisy reward (all states; the judge only rewards)": {
            "oracle": side(judge="rule", filter="none"), "lenient": side(judge="lenient", filter="none"),
            **{f"wrong {s:.0%}": side(judge=f"noisy:{s:g}", filter="none") for s in (0.1, 0.2, 0.35)},
        },
        "Forgetting (trained on arithmetic-2)": {
            "no KL": side(**calculated), "KL 0.03": side(**calculated, kl=0.03), "KL 0.1": side(**calculated, kl=0.1),
            f"{SEARCH} mixed in": side(**calculated, mixed_in=(SEARCH,)),
        },
        "Data size (questions; paper, HotPotQA by eye: base .56, 100 → .59, 1,000 → .67, 10,000 → .71)": {
            "base": BASE, **{f"{num:,}": side(num_questions=num) for num in (20, 100, 400, 600, 2000)},
        },
        "Without tools (paper, HotPotQA: base .38 → .41, with tools .66 → .74)": {
            "base": side(method="base", trained_on=(), tools=False), "trained": side(tools=False),
            "base, with tools": BASE, "trained, with tools": STEP,
        },
        "Model size": {
            f"{size}, {name}": [replace(run, base=replace(run.base, hidden_size=size)) for run in runs]
            for size in (64, 128, 192) for name, runs in (("base", BASE), ("trained", STEP))
        },
    }  # fmt: skip
    return "\n\n".join(f"### {title}\n\n{_by_family(rows, named)}" for title, named in tables.items())


def status(rows: Rows) -> str:
    """Which blocks have been run, and how much of each."""
    lines = []
    for name, block in BLOCKS.items():
        runs = {run.key for run in block()}
        lines.append([f"`{name}`", len(runs), len(runs & rows.keys()) or "not run"])
    return grid(["block", "runs", "done"], lines)


def document(rows: Rows, cells: str) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in rows.values() if row.get("commit")))
    return f"""# Evidence

Made by `python -m benchmarks.paper --write` from {len(rows)} rows of benchmarks/results/paper.jsonl; edited by nobody.
All runs are on Almanac's second edition with policies of 1.1M parameters: they say what the method does to a small
policy in a small world, not what it does to Gemma 2 27B. Commits {commits or "–"}.

## The answers

Trained on {SEARCH}; filtered and rewarded by the judge `{JUDGE}`, wrong about a fifth of all steps, unless said
otherwise. The oracle evaluates, and has neither filtered nor rewarded.
A difference is paired by base, seed and question; its 95% interval draws bases and questions anew.

{answers(rows)}

## The world: sound and right are two things

Pages are stale in one fact of six, and one phrase of arithmetic has two readings: sound steps can lead to a wrong
answer. Bases ask once too often: unsound steps can lead to a right one. Sound is what the oracle calls sound in every
step; right is the golden answer. The demonstrator that bases imitate, over 400 questions: on bridge-2 17.5% sound and
right, 7.0% sound and wrong, 14.8% unsound and right, 60.8% unsound and wrong; on arithmetic-2 15.2, 6.8, 12.0 and
66.0%.
The bases themselves (`python -m benchmarks.paper cells`):

{cells}

Bases are made by imitation of a demonstrator on bridge-2, deep-2, mixed-2 and arithmetic-2, and have never seen
counterfactual-2, whose pages are those of another world (and up to date). All relations occur in all search families,
so from {SEARCH} to deep-2 is longer chains of known relations, not another skill. No path of a test question is in any
training question. The three bases share a start that has the skills, and differ in the seed of everything after it.
What was expected of each experiment was written down first, in [log.md](log.md).

## Methods

Paper, Figure 9 (base / supervised / SWiRL): HotPotQA .65/.50/.73, MuSiQue .45/.42/.50, CofCA .54/.48/.62. It has no
baseline of outcome RL. Table 3: GOOD steps 82.5 → 91.0% on HotPotQA, by the judge that filtered.

{methods(rows)}

## Filters

Paper, Figure 4 (base / outcome / process and outcome / none / process): HotPotQA .56/.63/.66/.69/.71, CofCA
.49/.57/.55/.59/.64. Here, as there, each filter trains on equally many trajectories (150).

{filters(rows)}

## Across tools

Paper, Table 2: trained on GSM8K alone, HotPotQA .65 → .71; trained on HotPotQA alone, GSM8K .65 → .76.

{transfer(rows)}

## The rest

{others(rows)}

## What was run

{status(rows)}
"""
