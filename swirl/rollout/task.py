"""What a rollout plays: questions, the tools on offer, the prompt, the limit on queries, the score of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from swirl.errors import ConfigError
from swirl.rollout.prompts import question_prompt
from swirl.rollout.tool import Tool, as_tools
from swirl.trajectories.record import Question

Questions = Mapping[str, Sequence[Question]] | Callable[[str, int | None], Sequence[Question]]
Score = Callable[[Question, str], dict[str, float] | float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One kind of question. `questions` are lists by split, or a function of (split, how many; None: all).

    `tools` may be plain functions; without any the model answers directly. `max_queries` is the limit that the prompt
    names (the paper's: 5 with search, 10 with the calculator). `prompt(question)` writes the first user turn in place
    of swirl's. `score(question, answer)` gives an answer's scores, or one number; an answer is correct where
    the score named `accuracy` is 1. Raises ConfigError where a tool cannot be used.
    """

    name: str
    questions: Questions
    score: Score
    tools: tuple[Tool | Callable, ...] = ()
    max_queries: int = 5
    prompt: Callable[[Question], str] | None = None
    accuracy: str = "em"

    def __post_init__(self):
        object.__setattr__(self, "tools", as_tools(self.tools))

    def take(self, split: str, num: int | None = None) -> list[Question]:
        """The first `num` questions of a split, all with None. Raises ConfigError where there are none."""
        if callable(self.questions):
            questions = self.questions(split, num)
        elif split in self.questions:
            questions = self.questions[split]
        else:
            raise ConfigError(f"task '{self.name}' has no split '{split}': expected {' or '.join(self.questions)}")
        if not questions:
            raise ConfigError(f"task '{self.name}' has no questions to ask in its split '{split}'")
        return list(questions[:num])

    def prompt_for(self, question: Question) -> str:
        """The first user turn: the task's own where it has one, else swirl's, with the rules of its tools."""
        if self.prompt is not None:
            return self.prompt(question)
        return question_prompt(question.question, self.tools, self.max_queries)

    def scores(self, question: Question, answer: str) -> dict[str, float]:
        """Each of the task's scores of an answer by name, from 0 to 1, such as `em` and `f1`."""
        given = self.score(question, answer)
        return given if isinstance(given, dict) else {self.accuracy: float(given)}

    def is_correct(self, question: Question, answer: str | None) -> bool | None:
        """None where the question has no golden answer; no answer is not correct."""
        if question.answer is None:
            return None
        if answer is None:
            return False
        scores = self.scores(question, answer)
        if self.accuracy not in scores:
            raise ConfigError(f"task '{self.name}': expected '{self.accuracy}' among its scores ({', '.join(scores)})")
        return scores[self.accuracy] == 1.0

    def without_tools(self) -> Task:
        """The same questions, to be answered directly."""
        return replace(self, tools=())
