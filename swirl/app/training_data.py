"""Trajectories to train on: given token ids and rewards, and refused where they cannot be trained on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec.structs import replace

from swirl import tasks
from swirl.config import TrainConfig
from swirl.errors import InputError
from swirl.judging.filtering import step_to_judge
from swirl.judging.rewards import ask_rewards, graded, with_one_reward, with_recorded_rewards
from swirl.learning import distributed
from swirl.model.gemma import GemmaConfig
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.rollout import with_ids
from swirl.trajectories.record import Trajectory


def fitted(trajectories: list[Trajectory], model: GemmaConfig, tokenizer: Tokenizer, file: Path) -> list[Trajectory]:
    """The trajectories with the ids of this tokenizer: kept where they were made with it, made once from text
    otherwise. Raises InputError where they are another tokenizer's, or too many for the model.
    """
    made = [_with_ids(trajectory, tokenizer, file) for trajectory in trajectories]
    for trajectory in made:
        length = len(trajectory.state_ids(len(trajectory.steps)))
        if length > model.max_position_embeddings:
            raise InputError(
                file,
                f"trajectory '{trajectory.id}' has {length} tokens, expected at most the model's "
                f"{model.max_position_embeddings}",
            )
    return made


def _with_ids(trajectory: Trajectory, tokenizer: Tokenizer, file: Path) -> Trajectory:
    if trajectory.prompt_ids is None:
        return with_ids(trajectory, tokenizer)
    if trajectory.tokenizer not in (None, tokenizer.fingerprint):
        raise InputError(
            file,
            f"expected the tokenizer of the model ({tokenizer.fingerprint[:12]}), trajectory '{trajectory.id}' has ids "
            "of another",
            field="tokenizer",
        )
    highest = max(max(ids) for step in trajectory.steps for ids in (step.action_ids, step.observation_ids or (0,)))
    if max(highest, *trajectory.prompt_ids) >= tokenizer.vocab_size:
        raise InputError(
            file,
            f"expected token ids below the vocabulary's {tokenizer.vocab_size}, trajectory '{trajectory.id}' has "
            "others",
            field="action_ids",
        )
    if trajectory.tokenizer is not None and (field := _disagreement(trajectory, tokenizer)):
        raise InputError(file, f"trajectory '{trajectory.id}': expected ids and text of one another", field=field)
    return trajectory


def _disagreement(trajectory: Trajectory, tokenizer: Tokenizer) -> str | None:
    """The first field whose ids are not those of its text under the tokenizer that made them; None where there is none.

    A drawn action may be spelled in ids that no encoder would choose, so it is held to what they decode to.
    """
    if tuple(tokenizer.prompt_ids(trajectory.prompt)) != trajectory.prompt_ids:
        return "prompt_ids"
    for k, step in enumerate(trajectory.steps):
        if trajectory.retokenized:
            same = tuple(tokenizer.action_ids(step.action))[: len(step.action_ids)] == step.action_ids
        else:
            ended = step.action_ids[-1] in tokenizer.stop_ids
            same = tokenizer.decode(step.action_ids[:-1] if ended else step.action_ids) == step.action
        if not same:
            return f"steps[{k}].action_ids"
        observation = tokenizer.observation_ids(step.observation or "")
        if step.observation_ids is not None and step.observation_ids != tuple(observation):
            return f"steps[{k}].observation_ids"
    return None


def require_rewards(trajectories: list[Trajectory], config: TrainConfig) -> None:
    """Raises InputError where recorded actions have nothing to teach, or no log-probs that a correction needs."""
    if config.proximal_every:
        for trajectory in trajectories:
            if any(step.log_probs is None for step in trajectory.steps):
                why = f"trajectory '{trajectory.id}' has none, which --proximal-every corrects by: leave that out"
                raise InputError(config.data, why, field="log_probs")
    if config.mode != "recorded":
        return
    steps = [step for trajectory in trajectories for step in trajectory.steps]
    if config.reward == "recorded" and all(graded(step) is None for step in steps):
        raise InputError(config.data, "no step has a reward or a verdict: filter it, or take --reward outcome")
    scored = (trajectory.outcome is not None or trajectory.question.answer is not None for trajectory in trajectories)
    if config.reward == "outcome" and not any(scored):
        raise InputError(config.data, "no trajectory has an outcome or a golden answer: take --reward recorded")


async def with_rewards(trajectories: list[Trajectory], config: TrainConfig, judge) -> list[Trajectory]:
    """The trajectories with the reward of each recorded action, in the modes that learn from those: each `judge`'s,
    where the reward is neither in the data nor the outcome. Same on every rank.
    """
    if config.mode == "sampled":
        return trajectories
    if config.mode == "imitation":
        return [with_one_reward(trajectory, 1.0) for trajectory in trajectories]
    if config.reward == "recorded":
        return [with_recorded_rewards(trajectory) for trajectory in trajectories]
    if config.reward == "outcome":
        return [with_one_reward(trajectory, _outcome(trajectory)) for trajectory in trajectories]
    mine = distributed.my_share(trajectories)
    made = await asyncio.gather(*(_asked(trajectory, judge) for trajectory in mine))
    return distributed.gather_shares(made, Trajectory)


async def _asked(trajectory: Trajectory, judge) -> Trajectory:
    steps = await ask_rewards(judge, [step_to_judge(trajectory, k, step) for k, step in enumerate(trajectory.steps)])
    return replace(trajectory, steps=tuple(steps))


def _outcome(trajectory: Trajectory) -> float | None:
    """1 or 0 as the data says, else as the rule of its data set does; None where there is no golden answer."""
    outcome = trajectory.outcome
    if outcome is None and trajectory.question.answer is not None:
        outcome = tasks.is_correct(trajectory.question, trajectory.prediction)
    return None if outcome is None else float(outcome)
