"""Stage 2: step-wise RL. Every state of every kept trajectory is a place to act; each action has its own reward.

  python -m swirl.train --packed                     all of it, on Almanac: evaluate, generate, filter, train, evaluate
  python -m swirl.train --packed --data kept.jsonl   train on trajectories you have
  torchrun --nproc-per-node 2 -m swirl.train --packed

Writes config.json, trajectories.jsonl, kept.jsonl, metrics.jsonl, summary.json, report.html and checkpoint/ into --out;
a reward model's responses, each on disk before it is used, into answers.sqlite there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from swirl import config as configs
from swirl.app import command, resolve, stages, training_data
from swirl.app.progress import progress
from swirl.app.run_folder import RunFolder, open_run, settings_of
from swirl.app.scores import Score, compared
from swirl.app.signals import deferred, exit_if_stopped, stop_on_signals
from swirl.config import TrainConfig
from swirl.endpoints.client import Client
from swirl.errors import EndpointUnusable
from swirl.judging import rewards
from swirl.judging.filtering import step_to_judge
from swirl.learning import distributed, usage
from swirl.learning.batches import SubTrajectory, assigned_here, micro_batches, num_tokens, present, shuffled
from swirl.learning.checkpoints import Snapshot, restore, snapshot_of
from swirl.learning.metrics import SUMS, log_line, per_token, reward_metrics
from swirl.learning.objective import Objective, advantages_of
from swirl.learning.optimizer import clip_grad_norm, learning_rate_at, make_optimizer, set_learning_rate
from swirl.report import print_comparison, write_report
from swirl.rollout.rollout import draw_seed
from swirl.sampling.local_policy import LocalPolicy, completion_action
from swirl.storage.digest import checkpoint_digest, file_digest
from swirl.trajectories.actions import TAGS
from swirl.trajectories.log import read_trajectories
from swirl.trajectories.record import Step, Trajectory, with_call

UNGRADED_UPDATES = 3  # in a row: the reward model is at fault, and going on would only pay for more of the same


class State(NamedTuple):
    """State k (from 0) of a trajectory, the `tree`-th of its update."""

    tree: int
    trajectory: Trajectory
    k: int


def learn(
    config: TrainConfig,
    policy: LocalPolicy,
    tokenizer,
    judge,
    kept: list[Trajectory],
    run: RunFolder,
    runner: asyncio.Runner,
    so_far: dict,
) -> list[dict]:
    """All updates of the policy's model; returns the metrics of each. `kept` carries ids, and rewards where recorded
    actions are learned from; `so_far` is the JSON that its checkpoints carry along, and where the run goes on from one,
    that one's. Raises SwirlError; whatever stops it, the last update is saved.
    """
    model = policy.engine.model
    optimizer = make_optimizer(model, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    objective = Objective(config, model)
    peak_flops = usage.measured_peak_flops(model.device, model.dtype) if distributed.is_main() else 0.0
    history: list[dict] = list(so_far["logs"].get("metrics.jsonl", ()))
    update, began = len(history), time.perf_counter()
    if update:
        restore(run.resumed, model, optimizer)
    batches = islice(shuffled(len(kept), config.trajectories_per_update, config.seed), update, None)

    def snapshot(copy: bool = True) -> Snapshot:
        logs = {name: list(lines) for name, lines in run.logs.items()}
        state = {**so_far, "logs": logs, "wall_s": so_far["wall_s"] + time.perf_counter() - began}
        return snapshot_of(model, optimizer, tokenizer, update, state, copy=copy)

    bar = progress("train", config.updates, completed=update, show=distributed.is_main())
    with run.keeping_the_last_update(lambda: snapshot(copy=False) if update else None), bar as advance:
        while True:
            last = update == config.updates
            if config.evaluate_every and (last or update % config.evaluate_every == 0):
                scores = runner.run(
                    stages.evaluate(config, policy, tokenizer, config.task, "validation", f"validate at {update}")
                )
                accuracy = {score.task: score.accuracy for score in scores}
                run.append("validation.jsonl", {"update": update, "accuracy": accuracy})
            if last:
                run.finish(lambda: snapshot(copy=False))
                break
            run.save_if_due(update, snapshot)
            exit_if_stopped()
            started = time.perf_counter()

            # The actions to learn from: G of the policy's own at every state of some trajectories, or those recorded.
            trajectories = [kept[i] for i in next(batches)]
            states = [State(tree, t, k) for tree, t in enumerate(trajectories) for k in range(len(t.steps))]
            if config.mode == "sampled":
                steps = draw(config, policy, tokenizer, distributed.my_share(states), update)
                steps = runner.run(rewarded(judge, distributed.my_share(states), steps))
                steps = distributed.gather_shares(steps, list[Step])
            else:
                steps = [[state.trajectory.steps[state.k]] for state in states]
            actions = with_advantages(config, states, steps)
            drawn_s = time.perf_counter() - started

            # The gradient of the loss, summed over micro-batches and ranks. Actions without one are not computed, but
            # those of advantage 0 count among the action tokens.
            live = [action for action in actions if objective.has_gradient(action)]
            num_action_tokens = max(1, num_tokens(present(actions)))
            sums = dict.fromkeys(SUMS, 0.0)
            for batch, members in micro_batches(assigned_here(live), config):
                loss, measured = objective(model, batch.to(model.device), members)
                (loss / num_action_tokens).backward()
                measured |= {"tokens": batch.num_separate_tokens, "computed_tokens": batch.num_tokens}
                measured["flops"] = usage.update_flops(model.config, batch)
                for name, value in measured.items():
                    sums[name] += value
            sums = dict(zip(SUMS, distributed.sum_scalars(list(sums.values()), model.device), strict=True))
            distributed.sum_gradients(model)
            grad_norm = clip_grad_norm(model, config.max_grad_norm).item()
            distributed.require_finite(f"update {update + 1}: loss", sums["loss"] / num_action_tokens)
            distributed.require_finite(f"update {update + 1}: gradient norm", grad_norm)

            # The step. Where no rank computed anything there is none: momentum and weight decay wait, too.
            learning_rate = learning_rate_at(
                update, config.updates, config.learning_rate, warmup=config.warmup, floor=config.final_learning_rate
            )
            set_learning_rate(optimizer, learning_rate)
            with deferred():  # a signal finds an update that is done, weights and metrics, or not begun
                if sums["computed_tokens"]:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                update += 1
                metrics = {"update": update, **reward_metrics(actions), **per_token(sums, actions, live)}
                metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
                metrics |= usage.speed(model, sums, peak_flops, wall_s=time.perf_counter() - started, sample_s=drawn_s)
                history.append(metrics)
                run.append("metrics.jsonl", metrics)
            advance(note=log_line(metrics))
            _require_grades(config, history, judge)
    _tell_masked(history)
    return history


def draw(config: TrainConfig, policy: LocalPolicy, tokenizer, states: Sequence[State], update: int) -> list[list[Step]]:
    """G actions of the current policy at each state."""
    G = config.samples_per_state
    ids = [trajectory.state_ids(k) for _, trajectory, k in states]
    completions = policy.engine.sample(
        [state_ids for state_ids in ids for _ in range(G)],
        seeds=[draw_seed(config.seed, "update", update, t.id, k, g) for _, t, k in states for g in range(G)],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=policy.stop_ids,
    )
    steps = [completion_action(completion, tokenizer) for completion in completions]
    return [
        [with_call(step, trajectory.tools or TAGS) for step in steps[i * G : i * G + G]]
        for i, (_, trajectory, _) in enumerate(states)
    ]


async def rewarded(judge, states: Sequence[State], drawn: Sequence[Sequence[Step]]) -> list[list[Step]]:
    """The actions drawn at each state, each with its reward by `judge`. Raises EndpointUnusable."""
    asked = [
        [step_to_judge(trajectory, k, step) for step in steps]
        for (_, trajectory, k), steps in zip(states, drawn, strict=True)
    ]
    return list(await asyncio.gather(*(rewards.with_rewards(judge, of_state) for of_state in asked)))


def with_advantages(
    config: TrainConfig, states: Sequence[State], steps: Sequence[Sequence[Step]]
) -> list[SubTrajectory]:
    """The actions of each state, each with its reward less the baseline of the run."""
    table = [[np.nan if step.reward is None else step.reward for step in of_state] for of_state in steps]
    advantages = advantages_of(np.array(table), config.baseline)
    ids = [trajectory.state_ids(k) for _, trajectory, k in states]
    return [
        SubTrajectory(state.tree, state.k, state_ids, step, float(advantage))
        for state, state_ids, of_state, row in zip(states, ids, steps, advantages, strict=True)
        for step, advantage in zip(of_state, row, strict=True)
    ]


def _require_grades(config: TrainConfig, history: list[dict], judge) -> None:
    """A reward model that answers but grades nothing is at fault, like one that is down; all ranks see the same.

    Actions it is not asked about say nothing of it. Raises EndpointUnusable.
    """
    recent = history[-UNGRADED_UPDATES:]
    ungraded = [m for m in recent if m["masked"] and m["masked"] + m["truncated"] == m["actions"]]
    if config.mode == "sampled" and len(ungraded) == UNGRADED_UPDATES:
        raise EndpointUnusable(judge.name, f"graded none of the actions of {UNGRADED_UPDATES} updates in a row")


def _tell_masked(history: list[dict]) -> None:
    masked, actions = (sum(metrics[name] for metrics in history) for name in ("masked", "actions"))
    if masked and distributed.is_main():
        command.warn(f"{masked} of {actions} actions had no reward: they were masked, and taught nothing")


def train(config: TrainConfig) -> dict | None:
    """The whole way: evaluate, generate, filter, learn, evaluate. Returns the summary on the main rank, None on the
    others. Raises SwirlError.
    """
    started = time.perf_counter()
    config = configs.smoke(config) if config.smoke else config
    device = distributed.local_device(resolve.device_for(config.device))
    data = read_trajectories(config.data) if config.data is not None else None
    config = configs.settled(config, None if data is None else {t.question.task for t in data})
    with distributed.process_group(device, timeout_s=config.rank_timeout_s), asyncio.Runner() as runner:
        model, tokenizer = resolve.load_model(
            config.model, device=device, dtype=getattr(torch, config.dtype), attention=config.attention
        )
        model.recompute = config.recompute
        policy = LocalPolicy(model, tokenizer, name=config.model)
        if data is not None:
            data = training_data.fitted(data, model.config, tokenizer, config.data)
            data = training_data.with_rewards(data, config)
        client = Client(config.out / "answers.sqlite")
        judge = resolve.open_judge(config.reward, kind="reward", client=client) if config.mode == "sampled" else None
        settings = settings_of(
            config,
            model=checkpoint_digest(resolve.model_folder(config.model)),
            data="generated" if config.data is None else file_digest(config.data),
        )
        with open_run(config, settings) as run, ExitStack() as closing:
            closing.callback(lambda: runner.run(resolve.close(judge, client)))
            ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
            if distributed.is_main():
                print(f"{config.mode} actions, {config.reward} reward, {device}{ranks}", file=sys.stderr)
            so_far = distributed.from_main(run.resumed and run.resumed.state)
            if so_far is None:
                before = runner.run(
                    stages.evaluate(config, policy, tokenizer, config.evaluate_on, "test", "evaluate before")
                )
                if data is None:
                    data = runner.run(stages.generate_and_filter(config, policy, tokenizer, run))
                generated = config.data is None and distributed.is_main()
                kept = file_digest(run.path / stages.KEPT) if generated else None
                so_far = {"settings": settings, "before": msgspec.to_builtins(before), "kept": kept, "logs": {}}
            else:
                before = msgspec.convert(so_far["before"], list[Score])
                started -= so_far["wall_s"]
                if data is None:
                    data = stages.kept_before(run, so_far["kept"])
            if config.data is None:
                data = training_data.with_rewards(data, config)
            so_far["wall_s"] = time.perf_counter() - started
            history = learn(config, policy, tokenizer, judge, data, run, runner, so_far)
            after = runner.run(stages.evaluate(config, policy, tokenizer, config.evaluate_on, "test", "evaluate after"))
            if not distributed.is_main():
                return None
            summary = _summary(config, before, after, history, started)
            run.write("summary.json", summary)
            write_report(config.out)
            if after:
                print_comparison(before, after)
            print(
                f"{len(history)} updates in {summary['wall_s']:.0f} s; everything is in {config.out}/, "
                f"the picture in {config.out}/report.html"
            )
            return summary


def _summary(config: TrainConfig, before: list[Score], after: list[Score], history: list[dict], started: float) -> dict:
    busy_s = sum(metrics["update_s"] for metrics in history)
    return {
        **compared(before, after),
        "updates": len(history),
        "tokens_per_s": sum(metrics["tokens"] for metrics in history) / busy_s if busy_s else 0.0,
        "wall_s": time.perf_counter() - started,
        "peak_rss_bytes": usage.peak_rss_bytes(),
        "seed": config.seed,
        "commit": usage.commit(),
        "world_size": distributed.world_size(),
    }


def main(config: TrainConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not distributed.launched_as_main():
        # the others' results would repeat the main rank's, their errors are the launcher's to show
        sys.stdout = open(os.devnull, "w")
    stop_on_signals()
    train(config)


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, TrainConfig, __doc__)


if __name__ == "__main__":
    run_command()
