"""The trajectories of a run as the page browses them: a row each for the list, and the details, which the page opens
only where somebody looks.

An entry is a question of the evaluation, with its answers before and after; or a trajectory of the training data; or,
in outcome-rl, what an update played of a question. What was drawn at its states stands with it as a tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from swirl.app.report.runs import Run, read_lines, records, unsealed
from swirl.app.report.tokens import Pieces, find_tokenizer
from swirl.app.resolve import model_folder
from swirl.app.run_records import (
    DROPPED,
    EVALUATED,
    GENERATED,
    KEPT,
    LOG_PROBS,
    SAMPLED_TREES,
    SAMPLES,
    OtherLogProbs,
    SampledGroup,
)
from swirl.trajectories.files import TrajectoryFiles
from swirl.trajectories.record import Question, Step, Trajectory, decode_trajectory

POLICIES = {"before": "base", "after": "trained"}


@dataclass
class Entry:
    """`row` is what the list shows, searches and filters by; `detail` all else."""

    row: dict
    detail: dict


@dataclass
class Browsed:
    """A run's entries, and in a sentence each what they lack."""

    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def browse(run: Run, limit: int) -> Browsed:
    """At most `limit` entries of a run, those of the evaluation first. Fills in `run.evaluated` and `run.counts`.

    Raises InputError where a file of the folder is not as swirl wrote it.
    """
    run.evaluated = {when: _trajectories(run.path / name, run) for when, name in EVALUATED.items()}
    encode = _Encoder(run)
    made = Browsed()
    data = _training_data(run, encode, made)  # counted whole, however few of them are shown
    for entry in _entries(run, encode, data):
        if len(made.entries) == limit:
            made.notes.append(f"the first {limit} entries are here, others are left out (--trajectories)")
            break
        made.entries.append(entry)
    for when, answers in run.evaluated.items():
        if not answers:
            made.notes.append(f"no answers of the {POLICIES[when]} policy to test questions")
    if encode.without_pieces:
        made.notes.append(f"{encode.without_pieces} actions are not shaded: their tokens are of another tokenizer")
    if encode.groups:
        groups = [group for of_entry in encode.groups.values() for group in of_entry]
        updates, trees = len({group["update"] for group in groups}), max(group["trees"] for group in groups)
        shown = f"{min(SAMPLED_TREES, trees)} of {trees} trees of {updates} updates"
        made.notes.append(f"what updates drew is here in part, {shown}")
    return made


def _entries(run: Run, encode: _Encoder, data: Iterable[tuple[Trajectory, bool | None]]) -> Iterator[Entry]:
    after = {(t.question.task, t.id): t for t in run.evaluated["after"]}
    for first in run.evaluated["before"]:
        yield _evaluated(encode, first, after.pop((first.question.task, first.id), None))
    for last in after.values():
        yield _evaluated(encode, None, last)
    for trajectory, kept in data:
        yield _recorded(encode, trajectory, kept)
    for key in sorted(encode.groups.keys() - encode.shown, key=str):  # trajectories that are nowhere to be found
        yield _played(encode, key)


def _evaluated(encode: _Encoder, first: Trajectory | None, last: Trajectory | None) -> Entry:
    answers = [(when, t) for when, t in (("before", first), ("after", last)) if t is not None]
    shown = answers[-1][1]
    row = _row("evaluated", shown, [t.prediction for _, t in answers])
    row["before"] = None if first is None else first.outcome
    row["change"] = change_of(first, last)
    detail = {"prompt": shown.prompt, "answers": [encode.answer(t, POLICIES[w], EVALUATED[w]) for w, t in answers]}
    return Entry(row, detail)


def change_of(first: Trajectory | None, last: Trajectory | None) -> str | None:
    """What training did to an answer; None where it cannot be said."""
    if first is None or last is None or None in (first.outcome, last.outcome):
        return None
    return {(False, True): "mended", (True, False): "broken", (True, True): "still right"}.get(
        (first.outcome, last.outcome), "still wrong"
    )


def _training_data(run: Run, encode: _Encoder, made: Browsed) -> Iterable[tuple[Trajectory, bool | None]]:
    """(trajectory, whether it was kept) of what the run was given, else of what the filter dropped and kept, else of
    what was generated; `run.counts` is filled in.
    """
    given = run.config.get("data") or []
    if given:
        return _given(run, made, [given] if isinstance(given, str) else given)
    kept, dropped = (_trajectories(run.path / name, run) for name in (KEPT, DROPPED))
    generated = [] if kept or dropped else _trajectories(run.path / GENERATED, run)
    chosen = {t.id for t in kept}
    refused = {t.id for t in dropped}
    run.counts.update(generated=len(generated) or len(chosen | refused), kept=len(kept))
    run.counts.update(f"dropped:{_rule(t)}" for t in dropped)
    both = [*(t for t in kept if t.id not in refused), *dropped, *generated]
    both.sort(key=lambda t: (t.question.task, t.id) not in encode.groups)  # what has samples comes first
    return [(trajectory, None if generated else trajectory.id in chosen) for trajectory in both]


def _given(run: Run, made: Browsed, files: list[str]) -> Iterable[tuple[Trajectory, bool]]:
    """Of the files that the run was given as far as they are there: they may be too many to be read whole."""
    there = [file for file in files if Path(file).is_file()]
    if there != files:
        missing = ", ".join(file for file in files if file not in there)
        made.notes.append(f"the training data, {missing}, is not there")
    if not there:
        return ()
    trajectories = TrajectoryFiles(there)
    run.counts["kept"] = len(trajectories)
    return ((trajectory, True) for trajectory in trajectories)


def _rule(dropped: Trajectory) -> str:
    """By which rule, and at which step where a verdict decided."""
    rule = (dropped.dropped or "no reason given").partition(": ")[0]
    bad = next((k for k, step in enumerate(dropped.steps, 1) if step.verdict == "BAD"), None)
    return f"{rule}, step {bad} is BAD" if rule == "process" and bad else rule


def _recorded(encode: _Encoder, trajectory: Trajectory, kept: bool | None) -> Entry:
    row = _row("training data", trajectory, [trajectory.prediction])
    key = (trajectory.question.task, trajectory.id)
    groups = encode.groups_of(key)
    row |= {"kept": kept, "branches": any(len(group["attempts"]) > 1 for group in groups)}
    answer = encode.answer(trajectory, "recorded")
    for group in groups:  # a recorded action that was learned from is no branch: its reward is the step's own
        if len(group["attempts"]) == 1 and group["k"] < len(answer["steps"]):
            step = group["attempts"][0]["steps"][0]
            answer["steps"][group["k"]] |= {
                "reward": step.get("reward"),
                "advantage": group["attempts"][0]["advantage"],
            }
    detail = {"prompt": trajectory.prompt, "answers": [answer]}
    detail["groups"] = [group for group in groups if len(group["attempts"]) > 1]
    return Entry(row, detail)


def _played(encode: _Encoder, key: tuple) -> Entry:
    question, groups = encode.question[key], encode.groups_of(key)
    row = _question_row("played" if key[2:] else "training data", question)
    row |= {"id": str(key[1]) if not key[2:] else f"{key[1]} update {key[2]}", "branches": True}
    return Entry(row, {"prompt": question.question, "answers": [], "groups": groups})


def _question_row(kind: str, question: Question) -> dict:
    return {"kind": kind, "task": question.task, "question": question.question, "gold": question.answer}


def _row(kind: str, trajectory: Trajectory, predictions: list[str | None]) -> dict:
    verdicts = {step.verdict for step in trajectory.steps}
    verdict = "BAD" if "BAD" in verdicts else None if None in verdicts else "GOOD"
    return _question_row(kind, trajectory.question) | {
        "id": trajectory.id,
        "predictions": predictions,
        "outcome": trajectory.outcome,
        "stop": trajectory.stop,
        "verdict": verdict,
        "steps": len(trajectory.steps),
    }


class _Encoder:
    """Steps and answers as the page reads them, what is None left out; log-probs in thousandths of a nat, as integers,
    since a page of 10,000 trajectories holds a million of them.
    """

    def __init__(self, run: Run):
        checkpoints = [run.path / "checkpoint", *sorted(run.path.glob("checkpoint-*"))]
        model = run.config.get("model")
        folders = [*checkpoints, *([model_folder(model)] if model else [])]
        self._pieces = Pieces(find_tokenizer([folder for folder in folders if folder.is_dir()]))
        self._others = {
            (one.file, one.task, one.trajectory): one.log_probs
            for one in records(run.path / LOG_PROBS, OtherLogProbs, "log-probs of a trajectory", finished=run.finished)
        }
        self.without_pieces = 0
        self.groups, self.question, self.shown = {}, {}, set()
        for group in records(run.path / SAMPLES, SampledGroup, "what an update drew", finished=run.finished):
            own = (group.trajectory,) if group.trajectory else (group.question.id, group.update)
            key = (group.question.task, *own)
            self.question[key] = group.question
            self.groups.setdefault(key, []).append(self._group(group))

    def groups_of(self, key: tuple) -> list[dict]:
        self.shown.add(key)
        return self.groups.get(key, [])

    def _group(self, group: SampledGroup) -> dict:
        attempts = [
            {"advantage": advantage, "steps": [self._step(step) for step in steps]}
            for steps, advantage in zip(group.attempts, group.advantages, strict=True)
        ]
        return {"update": group.update, "k": group.k, "trees": group.trees, "attempts": attempts}

    def answer(self, trajectory: Trajectory, policy: str, file: str = "") -> dict:
        """`file` is where the trajectory stands, if there are log-probs of another policy for what stands there."""
        others = self._others.get((file, trajectory.question.task, trajectory.id)) or [None] * len(trajectory.steps)
        same = trajectory.tokenizer in (None, self._pieces.fingerprint)
        steps = [self._step(step, other, same) for step, other in zip(trajectory.steps, others, strict=False)]
        made = {
            "policy": policy, "by": trajectory.policy, "stop": trajectory.stop, "prediction": trajectory.prediction,
            "outcome": trajectory.outcome, "dropped": trajectory.dropped, "steps": steps,
        }  # fmt: skip
        return {name: value for name, value in made.items() if value is not None}

    def _step(self, step: Step, other: tuple[float, ...] | None = None, same: bool = True) -> dict:
        made = {
            "action": step.action, "observation": step.observation, "verdict": step.verdict, "reason": step.reason,
            "judged": step.judged and step.judged.value, "reward": step.reward, "invalid": step.invalid,
            "call": step.call and [step.call.tool, step.call.argument],
        }  # fmt: skip
        made = {name: value for name, value in made.items() if value is not None}
        if step.truncated:
            made["truncated"] = True
        if step.log_probs is not None:
            lengths = self._pieces.lengths(step.action, step.action_ids) if same else None
            if lengths is None:
                self.without_pieces += 1
            else:
                made |= {"pieces": lengths, "log_probs": _thousandths(step.log_probs)}
                if other is not None and len(other) == len(lengths):
                    made["other"] = _thousandths(other)
        return made


def _thousandths(log_probs: Iterable[float]) -> list[int]:
    return [round(1000 * value) for value in log_probs]


def _trajectories(path: Path, run: Run) -> list[Trajectory]:
    def read(line: bytes, number: int) -> Trajectory:
        return decode_trajectory(unsealed(line, path, number), path, number)

    return read_lines(path, read, finished=run.finished)
