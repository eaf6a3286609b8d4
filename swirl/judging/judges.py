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
from typing import Any, Literal

import msgspec

from swirl.endpoints.address import EndpointLimits, open_policy
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, EndpointError, EndpointUnusable
from swirl.judging.prompts import CALCULATOR_PROCESS, OUTCOME, REWARD, SEARCH_PROCESS, JudgePrompt, read_prompt
from swirl.judging.verdicts import expected_score, read_score, read_verdict
from swirl.rollout.policy import PolicyState
from swirl.trajectories.record import Question, Step, TopLogProbs, Verdict

Kind = Literal["process", "outcome", "reward"]
NO_ANSWER = "no answer: "
_PROCESS_PROMPTS = ("search_prompt", "calculator_prompt")


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
    """A judge's word. `verdict` None: the judge failed, the step is masked and counted, never scored 0; the `reason`
    then begins with NO_ANSWER where a server gave none, which may be asked again, and not where its answer is none.

    `reward` is the graded score of the action in [0, 1] where the judge gives one, else None.
    """

    verdict: Verdict | None
    reason: str
    reward: float | None = None


def show_context(steps: Sequence[Step]) -> str:
    """The steps before the one that is judged, as a judge reads them."""
    if not steps:
        return "(nothing yet)"
    return "\n\n".join(
        f"MESSAGE {k}\n{step.action}\n\nRESULT {k}\n{step.observation or '(none)'}" for k, step in enumerate(steps, 1)
    )


class GenerativeJudge:
    """Judges the process: GOOD or BAD for one step. `policy` is the model that is asked (policy.py, or a
    local one).
    """

    def __init__(
        self,
        policy,
        *,
        search_prompt: JudgePrompt = SEARCH_PROCESS,
        calculator_prompt: JudgePrompt = CALCULATOR_PROCESS,
        max_new_tokens: int = 1024,
    ):
        self.policy, self.max_new_tokens = policy, max_new_tokens
        self.prompts = {"search": search_prompt, "calculator": calculator_prompt}
        versions = ",".join(f"{prompt.name}-v{prompt.version}" for prompt in self.prompts.values())
        self.name = f"{policy.name} ({versions})"

    async def judge(self, item: StepToJudge) -> Judgement:
        """Raises EndpointUnusable where the endpoint, not this one step, is at fault."""
        prompt = self.prompts["calculator" if item.tools == ("calculator",) else "search"]
        text = step_text(prompt, item)
        verdict, reason, _ = await _ask(self.policy, text, prompt.reminder, read_verdict, self.max_new_tokens)
        return Judgement(verdict=verdict, reason=reason)

    async def close(self) -> None:
        await _close(self.policy)


class OutcomeJudge:
    """Judges the outcome: GOOD where the model says YES, the final answer is the golden one; BAD where it
    says NO.
    """

    def __init__(self, policy, *, prompt: JudgePrompt = OUTCOME, max_new_tokens: int = 512):
        self.policy, self.prompt, self.max_new_tokens = policy, prompt, max_new_tokens
        self.name = f"{policy.name} ({prompt.name}-v{prompt.version})"

    async def judge(self, item: OutcomeToJudge) -> Judgement:
        """Raises EndpointUnusable where the endpoint, not this one answer, is at fault."""
        if item.question.answer is None:
            return Judgement(verdict=None, reason="the question has no golden answer")
        if not (item.prediction or "").strip():
            return Judgement(verdict="BAD", reason="no answer was given")
        golden = " or ".join([item.question.answer, *item.question.aliases])
        text = self.prompt.fill(question=item.question.question, answer=golden, prediction=item.prediction)
        verdict, reason, _ = await _ask(
            self.policy,
            text,
            self.prompt.reminder,
            lambda said: read_verdict(said, "YES", "NO"),
            self.max_new_tokens,
        )
        return Judgement(verdict=verdict, reason=reason)

    async def close(self) -> None:
        await _close(self.policy)


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
        score, reason, top_log_probs = await self._vote(text, 0)
        expected = None if score is None else expected_score(top_log_probs)
        if expected is not None:
            return self._judgement([expected], reason)
        others = await asyncio.gather(*(self._vote(text, draw) for draw in range(1, self.votes)))
        votes = [(score, reason), *((score, reason) for score, reason, _ in others)]
        scores = [score for score, _ in votes if score is not None]
        return self._judgement(scores, reason if scores else _why_none([reason for _, reason in votes]))

    def _vote(self, text: str, draw: int):
        return _ask(
            self.policy,
            text,
            self.prompt.reminder,
            read_score,
            self.max_new_tokens,
            self.temperature,
            2 * draw,
            20,
        )

    def _judgement(self, scores: list[float], reason: str) -> Judgement:
        if not scores:
            return Judgement(verdict=None, reason=reason)
        reward = sum(scores) / len(scores)
        return Judgement(verdict="GOOD" if reward >= 0.5 else "BAD", reason=reason, reward=reward)

    async def close(self) -> None:
        await _close(self.policy)


def step_text(prompt: JudgePrompt, item: StepToJudge) -> str:
    """The whole of what a judge of one step is told."""
    return prompt.fill(question=item.question.question, context=show_context(item.steps), action=item.step.action)


async def _ask(
    policy,
    text: str,
    reminder: str,
    read: Callable[[str], Any],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    top_log_probs: int = 0,
) -> tuple[Any, str, TopLogProbs | None]:
    """(what `read` makes of the answer, its text, its log-probs), or (None, why not, None)."""
    reasons = []
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
            reasons.append(f"{NO_ANSWER}{error.reason}")
            if error.status != 200:
                break  # no answer at all, and the client has tried what is worth trying
            continue
        value = None if step.truncated else read(step.action)
        if value is not None:
            return value, _shorten(step.action, 1000), step.top_log_probs
        why = "truncated after" if step.truncated else "the answer ends with"
        reasons.append(f"no verdict: {why} '{_shorten(step.action, 80)}'")
    return None, _why_none(reasons), None


def _why_none(reasons: list[str]) -> str:
    """The last, or the first that asking again might change."""
    return next((reason for reason in reasons if reason.startswith(NO_ANSWER)), reasons[-1])


def _shorten(text: str, characters: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= characters else "…" + text[1 - characters :]


async def _close(policy) -> None:
    if hasattr(policy, "close"):
        await policy.close()


def open_judge(
    spec: str,
    *,
    kind: Kind = "process",
    prompt: str | os.PathLike | None = None,
    votes: int = 4,
    client: Client | None = None,
    cache: str | os.PathLike | None = None,
    key_env: str | None = None,
    limits: EndpointLimits | None = None,
):
    """A judge over the wire, from a spec such as https://host/v1#model (policy.parse_spec). Raises
    ConfigError, and InputError as `judge_with` does.

    Without a `client` it has its own, with the file `cache` (None keeps no answers), and `close` must be
    awaited.
    """
    policy = open_policy(spec, client=client, cache=cache, key_env=key_env, limits=limits, details=False)
    return judge_with(policy, kind, prompt=prompt, votes=votes)


def judge_with(policy, kind: Kind, *, prompt: str | os.PathLike | None = None, votes: int = 4):
    """The judge of that kind which asks `policy`, by a template of the user's where `prompt` is its file or its text.

    A template of the process serves both tools. `votes` are those of a reward model. Raises ConfigError, InputError.
    """
    match kind:
        case "process":
            own = {} if prompt is None else dict.fromkeys(_PROCESS_PROMPTS, read_prompt(prompt, SEARCH_PROCESS))
            return GenerativeJudge(policy, **own)
        case "outcome":
            return OutcomeJudge(policy, prompt=OUTCOME if prompt is None else read_prompt(prompt, OUTCOME))
        case "reward":
            prompt = REWARD if prompt is None else read_prompt(prompt, REWARD)
            return GenerativeRewardModel(policy, prompt=prompt, votes=votes)
    raise ConfigError(f"judge kind '{kind}' is unknown: expected process, outcome or reward")
