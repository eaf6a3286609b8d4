"""Stage 2: step-wise RL. Every state of every kept trajectory is a place to act; each action has its own reward.

  python -m swirl.train --packed                     all of it, on Almanac: evaluate, generate, filter, train, evaluate
  python -m swirl.train --packed --data kept.jsonl   train on trajectories you have
  torchrun --nproc-per-node 2 -m swirl.train --packed

Writes config.json, trajectories.jsonl, kept.jsonl, dropped.jsonl, metrics.jsonl, summary.json, report.html and
checkpoint/ into --out; a reward model's responses, each on disk before it is used, into answers.sqlite there; for the
report the answers evaluated before and after, some of the actions that updates drew, and log-probs of both policies.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from itertools import islice

import msgspec
import torch

from swirl.app import attempts, command, finishing, planning, preparing, resolve, stages, training_data
from swirl.app.background import BackgroundLoop
from swirl.app.progress import progress
from swirl.app.run_folder import RunFolder, open_run, settings_of
from swirl.app.run_records import SAMPLES, has_samples, sampled_groups
from swirl.app.scores import Score, validation_metrics
from swirl.app.signals import deferred, exit_if_stopped, received, stop_on_signals
from swirl.app.stages import Setup
from swirl.config import TrainConfig
from swirl.endpoints.client import Client
from swirl.errors import EndpointUnusable, NothingToLearn
from swirl.learning import distributed, gradient, sharding, usage
from swirl.learning.batches import num_tokens, present, shuffled
from swirl.learning.checkpoints import Snapshot, restore, snapshot_of
from swirl.learning.metrics import log_line, loss_metrics, reward_metrics, why_idle
from swirl.learning.objective import Objective, advantages_of
from swirl.learning.optimizer import clip_grad_norm, learning_rate_at, make_optimizer, set_learning_rate
from swirl.model.lora import LoRA, add_lora
from swirl.sampling.local_policy import LocalPolicy
from swirl.storage.digest import checkpoint_digest

IDLE_UPDATES = 3  # in a row that learn nothing end the run


def learn(setup: Setup, source: Sequence, judge, run: RunFolder, loop: BackgroundLoop, so_far: dict) -> list[dict]:
    """All updates of the policy; returns the metrics of each. `judge` rewards actions that are drawn.

    `source` is what updates are made of: questions in outcome-rl, else trajectories with ids, and with rewards where
    recorded actions are learned from, all at hand or streamed. `so_far` is the JSON that the run's checkpoints carry
    along, and where it goes on from one, that one's. Raises SwirlError; whatever stops it, the last update is saved.
    """
    config, tokenizer, model = setup.config, setup.tokenizer, setup.model
    optimizer = make_optimizer(
        model,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        kind=config.optimizer,
        offload=config.offload_optimizer,
    )
    objective = Objective(config, model)
    (peak_flops,) = distributed.sum_scalars([usage.measured_peak_flops(model.device, model.dtype)], model.device)
    history: list[dict] = list(so_far["logs"].get("metrics.jsonl", ()))
    update, began = len(history), time.perf_counter()
    if update:
        restore(run.resumed, model, optimizer, objective)
    batches = list(islice(shuffled(len(source), config.items_per_update, config.seed), config.updates))

    def chosen(number: int) -> list:
        return loop.run(training_data.take(source, batches[number]))

    draws = attempts.Draws(setup, judge, loop, chosen)
    draws.restore(update, so_far.get("drawn"))

    def snapshot(copy: bool = True) -> Snapshot:
        logs = {name: list(lines) for name, lines in run.logs.items()}
        state = {**so_far, "logs": logs, "wall_s": so_far["wall_s"] + time.perf_counter() - began}
        state["drawn"] = draws.state(update)
        return snapshot_of(model, optimizer, objective, tokenizer, update, state, copy=copy)

    run.together = sharding.trains_shards(model)
    bar = progress("train", config.updates, completed=update, show=distributed.is_main())
    # ranks that hold parts of the weights must stop at the same place to save them: signals wait for an update's end
    waiting = deferred() if run.together else nullcontext()
    with run.keeping_the_last_update(lambda: snapshot(copy=False) if update else None), bar as advance, waiting:
        while True:
            last = update == config.updates
            if config.evaluate_every and (last or update % config.evaluate_every == 0):
                scores, _ = loop.run(stages.evaluate(setup, config.task, "validation", f"validate at {update}"))
                run.append("validation.jsonl", {"update": update, **validation_metrics(scores)})
            if last:
                run.finish(lambda: snapshot(copy=False))
                break
            run.save_if_due(update, snapshot)
            exit_if_stopped(distributed.most(received()) if run.together else received())
            started = time.perf_counter()

            # Sample and reward: groups of attempts at the same thing, each with its reward; then what each is worth.
            if config.mode == "outcome-rl":
                groups = attempts.played(loop.run(stages.play(setup, chosen(update), update)))
            elif config.mode == "sampled":
                groups = draws.groups(update)
            else:
                groups = attempts.recorded(attempts.states_of(chosen(update)))
            rewards = attempts.rewards_of(groups)
            advantages = advantages_of(rewards, config.baseline)
            actions = attempts.sub_trajectories(groups, advantages)
            sample_s = time.perf_counter() - started

            # Forward and backward: the gradient of the loss, summed over micro-batches and ranks. Actions without one
            # are not computed, but those of advantage 0 count among the action tokens.
            objective.refresh(model, update)
            live = [action for action in actions if objective.has_gradient(action)]
            num_action_tokens = max(1, num_tokens(present(actions)))
            sums = gradient.accumulate(model, objective, live, num_action_tokens, config)
            grad_norm = clip_grad_norm(model, config.max_grad_norm).item()
            distributed.require_finite(f"update {update + 1}: loss", sums["loss"] / num_action_tokens)
            distributed.require_finite(f"update {update + 1}: gradient norm", grad_norm)

            # The step. Where no rank computed anything there is none: momentum and weight decay wait, too.
            learning_rate = learning_rate_at(
                update, config.updates, config.learning_rate, warmup=config.warmup, floor=config.final_learning_rate
            )
            set_learning_rate(optimizer, learning_rate)
            with deferred():  # a signal finds an update that is done, weights and metrics, or not begun
                if live:
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                update += 1
                metrics = {"update": update, **reward_metrics(rewards, actions), **loss_metrics(sums, actions, live)}
                metrics |= {"balance": sums["balance"], "grad_norm": grad_norm, "learning_rate": learning_rate}
                metrics |= {} if live else {"idle": why_idle(rewards, actions)}
                metrics |= usage.speed(model, sums, peak_flops, wall_s=time.perf_counter() - started, sample_s=sample_s)
                history.append(metrics)
                run.append("metrics.jsonl", metrics)
            if has_samples(update, config.updates):
                shown = sampled_groups(groups, advantages, update, whole=config.mode == "outcome-rl")
                run.append_records(SAMPLES, shown)
            advance(note=log_line(metrics))
            require_something_learned(history, judge, smoke=config.smoke)
    return history


def require_something_learned(history: list[dict], judge, *, smoke: bool) -> None:
    """Several updates in a row that computed nothing end the run; all ranks see the same. Raises EndpointUnusable where
    the judge graded none of the actions that it was asked about, else NothingToLearn. Not where every reward is 1: that
    is what training is for, and other states may come. Nor in a smoke run, which is to go the whole way with a random
    model, too.
    """
    recent = history[-IDLE_UPDATES:]
    if len(recent) < IDLE_UPDATES:
        return
    if judge is not None and all(m["masked"] and m["masked"] + m["refused"] == m["actions"] for m in recent):
        raise EndpointUnusable(judge.name, f"graded none of the actions of {IDLE_UPDATES} updates in a row")
    if not smoke and all("idle" in metrics and metrics["reward"] != 1 for metrics in recent):
        raise NothingToLearn(f"{IDLE_UPDATES} updates in a row had nothing to learn from: {recent[-1]['idle']}")


def train(config: TrainConfig) -> dict | None:
    """The whole way: evaluate, generate, filter, learn, evaluate. Returns the summary on the main rank, None on the
    others. Raises SwirlError.
    """
    started = time.perf_counter()
    config, device, found = preparing.prepared(config)
    with (
        distributed.process_group(device, timeout_s=config.rank_timeout_s),
        BackgroundLoop(lambda: distributed.local_device(str(device))) as loop,
        ExitStack() as closing,
    ):
        say = command.note if distributed.is_main() else lambda line: None
        planned = planning.plan_run(config, device, say=say)
        closing.enter_context(planning.told_if_out_of_memory(planned))
        if planned.job.maps_blocks:
            usage.unmap_what_is_freed()
        model, tokenizer = resolve.load_model(
            config.model, device=device, dtype=getattr(torch, config.dtype), attention=config.attention,
            prepare=lambda model: sharding.shard_as_asked(
                model.requires_grad_(not config.lora), config.shard, device.type
            ),
        )  # fmt: skip
        model.activation_checkpointing = config.activation_checkpointing
        if config.lora:
            add_lora(model, LoRA(config.lora, config.lora_alpha), seed=config.seed)
        if found is not None:
            fit = training_data.Fitting(found.files, config, model.config, tokenizer)
            data = [fit(place, trajectory) for place, trajectory in found.seen.items()]
            training_data.require_rewards(data, config, found.files)
        settings = settings_of(
            config,
            model=checkpoint_digest(resolve.model_folder(config.model)),
            data="generated" if found is None else found.files.digest,
        )
        client = Client(config.out / "answers.sqlite")
        judge = stages.open_judge(config, "process", client)
        rewarder = stages.open_judge(config, "reward", client)
        run = closing.enter_context(open_run(config, settings))
        closing.callback(lambda: loop.run(client.close()))
        if distributed.is_main():
            ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
            ranks += f", weights in shards over {model.sharding.mesh.size(-1)}" if model.sharding else ""
            print(f"mode {config.mode}, reward {config.reward}, {device}{ranks}", file=sys.stderr)
        tasks = loop.run(stages.open_tasks(config, client))
        policy = LocalPolicy(
            sharding.sampler_of(model), tokenizer, name=config.model, max_cache_tokens=config.max_cache_tokens
        )
        setup = Setup(config, model, policy, tokenizer, tasks)

        so_far = distributed.from_main(run.resumed and run.resumed.state)
        if so_far is None:
            before = finishing.evaluate_and_write(setup, run, loop, "before")
            so_far = {"settings": settings, "before": msgspec.to_builtins(before), "kept": None, "logs": {}}
            if config.generates:
                data, so_far["kept"] = loop.run(stages.generate_and_filter(setup, judge, run))
        else:
            before = msgspec.convert(so_far["before"], list[Score])
            started -= so_far["wall_s"]
            if config.generates:
                data = stages.kept_before(run, so_far["kept"])
        if config.mode == "outcome-rl":
            source = stages.questions_to_play(setup)
        elif found is not None and found.streamed:
            source = training_data.Streamed(fit, found.tasks, rewarder)
        else:
            source = loop.run(training_data.with_rewards(data, config, rewarder))
        so_far["wall_s"] = time.perf_counter() - started
        history = learn(setup, source, rewarder if config.mode == "sampled" else None, run, loop, so_far)
        if config.lora:
            finishing.save_merged(setup, run)
        after = finishing.evaluate_and_write(setup, run, loop, "after")
        with setup.sampling():
            finishing.compare_policies(setup, run)
        if not distributed.is_main():
            return None
        trained_on = None if config.mode == "outcome-rl" else len(source)
        held = planned.held_against(history, usage.peak_bytes(device))
        summary = finishing.finish(config, run, before, after, history, started, trained_on, held)
        say(planning.outcome_line(held))
        return summary


def main(config: TrainConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not distributed.launched_as_main():
        # the others' results would repeat the main rank's, their errors are the launcher's to show
        sys.stdout = open(os.devnull, "w")
    with stop_on_signals():
        train(config)


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, TrainConfig, __doc__)


if __name__ == "__main__":
    run_command()
