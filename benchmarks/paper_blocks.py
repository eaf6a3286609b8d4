"""The experiments of `benchmarks.paper`: each block is a list of runs, and a run is all that its row depends on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Literal

SEARCH, CALCULATE = "bridge-2", "arithmetic-2"
EVALUATED = (SEARCH, "deep-2", "counterfactual-2", CALCULATE)
SEEDS = (0, 1, 2)
JUDGE = "noisy:0.2"
"""Filters and rewards where a block does not say otherwise: the oracle, but wrong about a fifth of all steps."""

Method = Literal["base", "sampled", "recorded", "imitation", "outcome_rl"]
Filter = Literal["none", "process", "outcome", "both"]


@dataclass(frozen=True)
class Base:
    """A base policy: the `first` edition's ships with swirl; of the `second` there is one a seed of imitation.

    `hidden_size` other than 128, the shipped one's: made from scratch, since there is nothing to start from.
    """

    edition: Literal["first", "second"] = "second"
    seed: int = 0
    hidden_size: int = 128

    @property
    def name(self) -> str:
        size = "" if self.hidden_size == 128 else f"-{self.hidden_size}"
        return "shipped" if self.edition == "first" else f"second-{self.seed}{size}"


@dataclass(frozen=True)
class Run:
    """One training, or none (`base`), and its evaluation.

    Filter and reward go by `judge`, evaluation by the oracle. `outcome_rl` sees golden answers instead of a judge.
    """

    base: Base
    method: Method = "sampled"
    trained_on: tuple[str, ...] = (SEARCH,)
    filter: Filter = "process"
    judge: str = JUDGE
    num_questions: int = 400
    """Of each family trained on; 5 trajectories each."""
    num_trajectories: int | None = None
    """To draw from what the filter keeps, so that filters are compared at equal numbers, as in the paper."""
    updates: int = 60
    """Each of 24 trajectories; sampled actions and outcome RL draw about as many actions an update."""
    kl: float = 0.0
    mixed_in: tuple[str, ...] = ()
    """Families whose states are trained on beside the others', against forgetting."""
    seed: int = 0
    evaluated_on: tuple[str, ...] = EVALUATED
    tools: bool = True
    """Whether tools are at hand in evaluation."""

    @property
    def key(self) -> str:
        """The run in words: what differs from the default."""
        default, words = asdict(Run(self.base)), [self.base.name, self.method]
        for name, value in asdict(self).items():
            if name not in ("base", "method") and value != default[name]:
                words.append(f"{name}={'+'.join(value) if isinstance(value, tuple) else value}")
        return " ".join(words)


BASES = tuple(Base(seed=seed) for seed in SEEDS)
CONTROL = Base(edition="first")
FIRST = tuple(family.removesuffix("-2") for family in EVALUATED)


def _each(bases: Iterable[Base], **what) -> list[Run]:
    return [Run(base, **what) for base in bases]


def _untrained(bases: Iterable[Base] = BASES, **what) -> list[Run]:
    return _each(bases, method="base", trained_on=(), **what)


def headline() -> list[Run]:
    """Does step reward beat imitation of the same kept data, imitation of all of it, and online outcome RL?"""
    return [
        *_untrained(),
        *_each(BASES),
        *_each(BASES, method="imitation"),
        *_each(BASES, method="imitation", filter="none"),
        *_each(BASES, method="outcome_rl", filter="none"),
        *_each(BASES, judge="lenient"),
        *_each(BASES, method="imitation", judge="lenient"),
        *_each(BASES, method="recorded", filter="none"),
    ]


def equal_time() -> list[Run]:
    """Imitation draws nothing: in the time of 60 updates on sampled actions it does some 200."""
    return _each(BASES, method="imitation", updates=200)


def filters() -> list[Run]:
    """Which filter, under which judge? The same number of trajectories for each, on sampled actions and imitated."""
    return [
        run
        for judge in (JUDGE, "lenient")
        for kept in ("process", "outcome", "none", "both")
        for method in ("sampled", "imitation")
        for run in _each(BASES, method=method, filter=kept, judge=judge, num_trajectories=150)
    ]


def main() -> list[Run]:
    """Trained on one family, on the other, on both; evaluated on all."""
    return [
        *_untrained(),
        *_each(BASES),
        *_each(BASES, trained_on=(CALCULATE,)),
        *_each(BASES, trained_on=(SEARCH, CALCULATE)),
    ]


def transfer() -> list[Run]:
    """Does anything carry over to the other tool, with shared habits, and with those of one tool (the control)?"""
    control = []
    for seed in SEEDS:
        control += _each((CONTROL,), trained_on=("bridge",), evaluated_on=FIRST, seed=seed)
        control += _each((CONTROL,), trained_on=("arithmetic",), evaluated_on=FIRST, seed=seed)
    return [
        *_untrained(),
        *_each(BASES),
        *_each(BASES, trained_on=(CALCULATE,)),
        *_untrained((CONTROL,), evaluated_on=FIRST),
        *control,
    ]


def noise() -> list[Run]:
    """What does a judge cost that is wrong about a share of all steps? All states, so that it only rewards."""
    return [
        run
        for judge in ("rule", JUDGE, "lenient", "noisy:0.1", "noisy:0.35")
        for run in _each(BASES, judge=judge, filter="none")
    ]


def data_size() -> list[Run]:
    return [run for num in (20, 100, 600, 2000) for run in _each(BASES, num_questions=num)]


def model_size() -> list[Run]:
    sizes = [replace(base, hidden_size=size) for size in (64, 192) for base in BASES]
    return [*_untrained(sizes), *_each(sizes)]


def forgetting() -> list[Run]:
    """Trained on arithmetic alone: what keeps the search families?"""
    trained = {"trained_on": (CALCULATE,)}
    return [
        *_each(BASES, **trained, kl=0.03),
        *_each(BASES, **trained, kl=0.1),
        *_each(BASES, **trained, mixed_in=(SEARCH,)),
    ]


def tools() -> list[Run]:
    """With and without tools, before and after."""
    return [*_untrained(tools=False), *_each(BASES, tools=False)]


# In the order in which they are run: what decides the headline comes first.
BLOCKS = {
    block.__name__: block
    for block in (headline, filters, transfer, noise, main, equal_time, forgetting, data_size, tools, model_size)
}


def smoke(runs: Iterable[Run]) -> list[Run]:
    """The same kinds of runs, of one base each and far smaller: to show that all of it works."""
    kinds = {}
    for run in runs:
        small = replace(
            run, base=replace(run.base, seed=0), num_questions=min(run.num_questions, 6), updates=2, seed=0,
            num_trajectories=run.num_trajectories and 4, evaluated_on=run.evaluated_on[:1],
        )  # fmt: skip
        kinds.setdefault(small.key, small)
    return list(kinds.values())
