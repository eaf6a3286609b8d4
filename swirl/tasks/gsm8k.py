"""GSM8K (arXiv 2110.14168): JSONL of {question, answer}; the answer ends in `#### 72`.

Its `<<48/2=24>>` annotations are calculator steps, so known trajectories can be had without any model:

    python -m swirl.tasks.gsm8k train.jsonl trajectories.jsonl [--limit N]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import msgspec

from swirl.errors import CalculatorError, InputError, SwirlError
from swirl.rollout.prompts import question_prompt
from swirl.tasks.reading import golden_answers, read_jsonl
from swirl.tasks.scoring import f1, same_number
from swirl.tools.calculator.calculate import calculate, calculator_tool
from swirl.tools.search import Page
from swirl.trajectories.actions import TAGS, action_text, observation_text
from swirl.trajectories.log import write_trajectories
from swirl.trajectories.record import Question, Step, Trajectory, with_calls

MAX_QUERIES = 10
INVALID = "[invalid]"

_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_ANNOTATION = re.compile(r"<<([^<>]*)>>")


class _Record(msgspec.Struct):
    question: str
    answer: str


def extract_answer(text: str) -> str:
    """The official rule: the first match of `#### (\\-?[0-9\\.\\,]+)` without commas, else "[invalid]"."""
    match = _ANSWER.search(text)
    return match[1].strip().replace(",", "") if match else INVALID


def _questions(path) -> Iterator[tuple[int, _Record, Question]]:
    name = Path(path).stem
    for line, record in read_jsonl(path, _Record):
        answer = extract_answer(record.answer)
        if answer == INVALID:
            raise InputError(path, "expected it to end in '#### ' and a number", line=line, field="answer")
        hops = len(_ANNOTATION.findall(record.answer)) or None
        question = Question(id=f"{name}-{line}", task="gsm8k", question=record.question, answer=answer, hops=hops)
        yield line, record, question


def load(path: str | os.PathLike) -> list[Question]:
    """All questions, named after file and line; `hops` is the number of annotations. Raises InputError."""
    return [question for _, _, question in _questions(path)]


def corpus(path: str | os.PathLike) -> Iterator[Page]:
    """No pages: the tool of GSM8K is the calculator."""
    return iter(())


def score(question: Question, answer: str) -> dict[str, float]:
    """`em` the official comparison of strings, `number` the paper's rule (10, 10.00 and $10 agree), and `f1`.

    A short answer is scored as if it stood after `#### `, where a solution's text would give it.
    Raises ConfigError where there is no golden answer.
    """
    golden = golden_answers(question)[0]
    extracted = extract_answer(answer if "####" in answer else f"#### {answer.strip()}")
    short = extracted if "####" in answer else answer
    return {
        "em": float(extracted == golden),
        "f1": f1(short, golden),
        "number": float(extracted == golden or same_number(short, golden)),
    }


def records(path: str | os.PathLike, dropped: Counter[str] | None = None) -> Iterator[Trajectory]:
    """Known trajectories: each annotation is a calculation, the prose before it the thought, then the answer.

    Text only, no token ids. Every step is GOOD with reward 1. Solutions without annotations, with more of
    them than a trajectory may have queries, or with one that is not what the calculator yields, are left
    out and counted in `dropped` by reason.
    """
    dropped = Counter() if dropped is None else dropped
    for _, record, question in _questions(path):
        steps = _steps(record.answer, question.answer)
        if isinstance(steps, str):
            dropped[steps] += 1
            continue
        made = Trajectory(
            id=f"{question.id}#0",
            question=question,
            prompt=question_prompt(question.question, [calculator_tool()], MAX_QUERIES),
            tools={"calculator": TAGS["calculator"]},
            steps=steps,
            stop="answer",
            prediction=question.answer,
            policy="gsm8k",
            outcome=True,
        )
        yield with_calls(made)


def _steps(solution: str, answer: str) -> tuple[Step, ...] | str:
    """The steps of a solution, or why it has none."""
    prose = _ANNOTATION.split(solution[: _ANSWER.search(solution).start()])
    thoughts, annotations = prose[::2], prose[1::2]
    if not annotations:
        return "no annotation"
    if len(annotations) > MAX_QUERIES:
        return f"more than {MAX_QUERIES} queries"
    steps = []
    for thought, annotation in zip(thoughts, annotations, strict=False):
        expression, _, claimed = annotation.rpartition("=")
        try:
            result = calculate(expression)
            if calculate(f"({claimed}) - ({expression})") != "0":
                return "annotation differs from the calculator"
        except CalculatorError:
            return "annotation the calculator refuses"
        thought = re.sub(r"[\s=$]+$", "", " ".join(thought.split()))
        action = f"{thought} {action_text('calculator', expression)}".lstrip()
        observation = observation_text(expression, result)
        steps.append(Step(action=action, observation=observation, verdict="GOOD", reward=1.0))
    action = f"{' '.join(thoughts[-1].split())} {action_text('answer', answer)}".lstrip()
    return (*steps, Step(action=action, verdict="GOOD", reward=1.0))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m swirl.tasks.gsm8k",
        description="Known trajectories from GSM8K's calculator annotations.",
    )
    parser.add_argument("questions", help="GSM8K's JSONL of {question, answer}")
    parser.add_argument("trajectories", help="where to write them, JSONL; replaced whole or not at all")
    parser.add_argument("--limit", type=int, default=None, help="at most so many trajectories")
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit: expected a number above 0")
    dropped: Counter[str] = Counter()
    try:
        made = list(islice(records(arguments.questions, dropped), arguments.limit))
        if not made:
            raise InputError(arguments.questions, "expected at least one solution whose annotations can be used")
        write_trajectories(arguments.trajectories, made)
    except SwirlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename}: cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    actions = sum(len(trajectory.steps) for trajectory in made)
    print(f"{len(made)} trajectories of {actions} actions in {arguments.trajectories}")
    for reason, count in dropped.most_common():
        print(f"{count} left out: {reason}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
