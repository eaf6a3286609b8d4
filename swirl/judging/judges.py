"""Judges: one verdict on one step, given only what came before it; those that are language models are here.

A judge is any object with a `name` and `async def judge(self, item) -> Judgement`; the process judges and the
reward model take a StepToJudge, the outcome judge an OutcomeToJudge. A language model judges by way of a
policy, over the wire or in this process: it is asked once, and once more where its answer holds no verdict;
then the step is masked.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from swirl.errors import ConfigError, EndpointError, EndpointUnusable
from swirl.judging.prompts import (
    CALCULATOR_PROCESS,
    OUTCOME,
    REWARD,
    SEARCH_PROCESS,
    TOOL_PROCESS,
    JudgePrompt,
    read_prompt,
)
from swirl.judging.verdicts import expected_score, read_score, read_verdict
from swirl.rollout.policy import PolicyState
from swirl.trajectories.record import Judged, Question, Step, TopLogProbs, Verdict

Kind = Literal["process", "outcome", "reward"]


class StepToJudge(msgspec.Struct, frozen=True, kw_only=True):
    """Action k in its state: the question, the `steps` before k with their observations, and step k, whose observation
    is not to be read.

    `tools` are the names of those on offer. A judge of the process must not read `question.answer`.
    """

    question: Question
    steps: tuple[Step, ...]
    step: Step
    tools: tuple[str, ...]


class OutcomeToJudge(msgspec.Struct, frozen=True, kw_only=True):
    """A final answer, None where there is none, to be held against `question.answer`."""

    question: Question
    prediction: str | None


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A judge's word. `verdict` None: there is none, the step is masked and counted, never scored 0; `judged` then says
    what became of the question, and `reason` why.

    `reward` is the graded score of the action in [0, 1] where the judge gives one, else None.
    """

    verdict: Verdict | None
    reason: str
    reward: float | None = None
    judged: Judged = Judged.ANSWERED


class _Reading(NamedTuple):
    """What an answer says, `value` None where it says nothing; `judged` and `reason` as of a Judgement."""

    value: Any
    reason: str
    judged: Judged = Judged.ANSWERED
    answer: str = ""
    top_log_probs: TopLogProbs | None = None


def show_context(steps: Sequence[Step]) -> str:
    """The steps before the one that is judged, as a judge reads them."""
    if not steps:
        return "(nothing yet)"
    return "\n\n".join(
        f"MESSAGE {k}\n{step.action}\n\nRESULT {k}\n{step.observation or '(none)'}" for k, step in enumerate(steps, 1)
    )


class GenerativeJudge:
    """Judges the process: GOOD or BAD for one step. `policy` is the model that is asked, over the wire or in this
    process; `prompt` a template for every tool in place of the built-in ones.
    """

    def __init__(self, policy, *, prompt: JudgePrompt | None = None, max_new_tokens: int = 1024):
        self.policy, self.max_new_tokens = policy, max_new_tokens
        self._prompts = {("search",): prompt or SEARCH_PROCESS, ("calculator",): prompt or CALCULATOR_PROCESS}
        self._prompt_of_others = prompt or TOOL_PROCESS
        prompts = [*self._prompts.values(), self._prompt_of_others]
        versions = ",".join(dict.fromkeys(f"{prompt.name}-v{prompt.version}" for prompt in prompts))
        self.name = f"{policy.name} ({versions})"

    async def judge(self, item: StepToJudge) -> Judgement:
        """Raises EndpointUnusable where the endpoint, not this one step, is at fault."""
        prompt = self._prompts.get(item.tools, self._prompt_of_others)
        said = await _ask(self.policy, step_text(prompt, item), prompt.reminder, read_verdict, self.max_new_tokens)
        return Judgement(verdict=said.value, reason=said.reason, judged=said.judged)


class OutcomeJudge:
    """Judges the outcome: GOOD where the model says YES, the final answer is the golden one; BAD where it says NO."""

    def __init__(self, policy, *, prompt: JudgePrompt = OUTCOME, max_new_tokens: int = 512):
        self.policy, self.prompt, self.max_new_tokens = policy, prompt, max_new_tokens
        self.name = f"{policy.name} ({prompt.name}-v{prompt.version})"

    async def judge(self, item: OutcomeToJudge) -> Judgement:
        """Raises EndpointUnusable where the endpoint, not this one answer, is at fault."""
        if item.question.answer is None:
            return Judgement(verdict=None, reason="the question has no golden answer", judged=Judged.UNREADABLE)
        if not (item.prediction or "").strip():
            return Judgement(verdict="BAD", reason="no answer was given")
        golden = " or ".join([item.question.answer, *item.question.aliases])
        said = await _ask(
            self.policy,
            self.prompt.fill(question=item.question.question, answer=golden, prediction=item.prediction),
            self.prompt.reminder,
            lambda answer: read_verdict(answer, "YES", "NO"),
            self.max_new_tokens,
        )
        return Judgement(verdict=said.value, reason=said.reason, judged=said.judged)


class GenerativeRewardModel:
    """Scores one step in [0, 1]: the expected score where the model gives log-probs, else the mean of `votes`
    draws.

    The scale of ten digits, the number of votes and their temperature are ours; the paper does not report its
    own. The verdict is GOOD from 0.5 on.
    """

    def __init__(
        self,
        policy,
        *,
        prompt: JudgePrompt = REWARD,
        votes: int = 4,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
    ):
        if votes < 1:
            raise ConfigError(f"a reward model needs at least one vote, got {votes}")
        self.policy, self.prompt, self.votes = policy, prompt, votes
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.name = f"{policy.name} ({prompt.name}-v{prompt.version}, {votes} votes)"

    async def judge(self, item: StepToJudge) -> Judgement:
        """Raises EndpointUnusable where the endpoint, not this one step, is at fault."""
        text = step_text(self.prompt, item)
        first = await self._vote(text, 0)
        expected = expected_score(first.answer, first.top_log_probs)
        if expected is not None:
            return _graded([expected], first.reason)
        votes = [first, *await asyncio.gather(*(self._vote(text, draw) for draw in range(1, self.votes)))]
        scores = [vote.value for vote in votes if vote.value is not None]
        if scores:
            return _graded(scores, first.reason)
        none = _why_none(votes)
        return Judgement(verdict=None, reason=none.reason, judged=none.judged)

    def _vote(self, text: str, draw: int):
        return _ask(
            self.policy,
            text,
            self.prompt.reminder,
            read_score,
            self.max_new_tokens,
            temperature=self.temperature,
            seed=2 * draw,
            top_log_probs=20,
        )


def _graded(scores: list[float], reason: str) -> Judgement:
    reward = sum(scores) / len(scores)
    return Judgement(verdict="GOOD" if reward >= 0.5 else "BAD", reason=reason, reward=reward)


def step_text(prompt: JudgePrompt, item: StepToJudge) -> str:
    """The whole of what a judge of one step is told."""
    return prompt.fill(question=item.question.question, context=show_context(item.steps), action=item.step.action)


async def _ask(
    policy,
    text: str,
    reminder: str,
    read: Callable[[str], Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    top_log_probs: int = 0,
) -> _Reading:
    """What `read` makes of the model's answer, which is asked for once more where it makes nothing of the first."""
    readings = []
    for attempt, prompt in enumerate((text, f"{text}\n\n{reminder}")):
        state = PolicyState(
            prompt=prompt,
            seed=seed + attempt,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            top_log_probs=top_log_probs,
        )
        try:
            step = await policy.act(state)
        except EndpointUnusable:
            raise
        except EndpointError as error:
            readings.append(_Reading(None, error.reason, Judged.UNANSWERED))
            if error.status != 200:
                break  # no answer at all, and the client has tried what is worth trying
            continue
        value = None if step.truncated else read(step.action)
        if value is not None:
            return _Reading(value, _shorten(step.action, 1000), answer=step.action, top_log_probs=step.top_log_probs)
        why = "truncated after" if step.truncated else "the answer ends with"
        readings.append(_Reading(None, f"{why} '{_shorten(step.action, 80)}'", Judged.UNREADABLE))
    return _why_none(readings)


def _why_none(readings: list[_Reading]) -> _Reading:
    """The last, or the first that asking again might change."""
    return next((one for one in readings if one.judged is Judged.UNANSWERED), readings[-1])


def _shorten(text: str, characters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= characters else "…" + text[1 - characters :]


def judge_with(policy, kind: Kind, *, prompt: str | os.PathLike | None = None, votes: int = 4):
    """The judge of that kind which asks `policy`, by a template of the user's where `prompt` is its file or its text.

    A template of the process serves all tools. `votes` are those of a reward model. Raises ConfigError, InputError.
    """
    match kind:
        case "process":
            return GenerativeJudge(policy, prompt=None if prompt is None else read_prompt(prompt, SEARCH_PROCESS))
        case "outcome":
            return OutcomeJudge(policy, prompt=OUTCOME if prompt is None else read_prompt(prompt, OUTCOME))
        case "reward":
            prompt = REWARD if prompt is None else read_prompt(prompt, REWARD)
            return GenerativeRewardModel(policy, prompt=prompt, votes=votes)
    raise ConfigError(f"judge kind '{kind}' is unknown: expected process, outcome or reward")
