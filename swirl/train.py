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

from swirl import config as configs
from swirl.app import attempts, command, planning, resolve, stages, training_data
from swirl.app.background import BackgroundLoop
from swirl.app.model_card import CARD, model_card
from swirl.app.other_log_probs import other_log_probs
from swirl.app.progress import progress
from swirl.app.report.build import write_report
from swirl.app.resolve_tasks import require_named
from swirl.app.run_folder import RunFolder, open_run, settings_of
from swirl.app.run_records import EVALUATED, LOG_PROBS, SAMPLES, compared_answers, has_samples, sampled_groups
from swirl.app.scores import Score, compared, validation_metrics
from swirl.app.signals import deferred, exit_if_stopped, received, stop_on_signals
from swirl.app.stages import Setup
from swirl.app.tables import print_comparison
from swirl.app.tracking import require_trackers
from swirl.config import TrainConfig
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, EndpointUnusable, NothingToLearn, SwirlError
from swirl.learning import distributed, gradient, sharding, usage
from swirl.learning.batches import num_tokens, present, shuffled
from swirl.learning.checkpoints import Snapshot, restore, snapshot_of
from swirl.learning.metrics import log_line, loss_metrics, reward_metrics, why_idle
from swirl.learning.objective import Objective, advantages_of
from swirl.learning.optimizer import clip_grad_norm, learning_rate_at, make_optimizer, set_learning_rate
from swirl.model.lora import LoRA, add_lora, is_adapter, merge_lora
from swirl.sampling.local_policy import LocalPolicy
from swirl.storage.digest import checkpoint_digest
from swirl.storage.files import replace_file
from swirl.trajectories.files import TrajectoryFiles
from swirl.trajectories.log import read_trajectories, write_trajectories

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

    run.together = model.sharding is not None
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
    the judge graded none of the actions that it was asked about, else NothingToLearn, but in a smoke run: that is to
    go the whole way with a random model, too.
    """
    recent = history[-IDLE_UPDATES:]
    if len(recent) < IDLE_UPDATES:
        return
    if judge is not None and all(m["masked"] and m["masked"] + m["refused"] == m["actions"] for m in recent):
        raise EndpointUnusable(judge.name, f"graded none of the actions of {IDLE_UPDATES} updates in a row")
    if not smoke and all("idle" in metrics for metrics in recent):
        raise NothingToLearn(f"{IDLE_UPDATES} updates in a row had nothing to learn from: {recent[-1]['idle']}")


def evaluate_and_write(setup: Setup, run: RunFolder, loop: BackgroundLoop, when: str) -> list[Score]:
    """The scores on the test questions `when` (before, after); the answers are written down."""
    scores, answers = loop.run(stages.evaluate(setup, setup.config.evaluate_on, "test", f"evaluate {when}"))
    if scores and distributed.is_main():
        write_trajectories(run.path / EVALUATED[when], answers)
    return scores


def compare_policies(setup: Setup, run: RunFolder) -> None:
    """Write down what the base policy makes of the trained one's answers, and the other way round, of some questions.

    For the report alone, on the main rank: where it cannot be done the run ends without it, and says so.
    """
    config, files = setup.config, {when: run.path / name for when, name in EVALUATED.items()}
    if not (distributed.is_main() and all(file.exists() for file in files.values())):
        return
    try:
        pairs = compared_answers(*map(read_trajectories, files.values()))
        base, _ = resolve.load_model(
            config.model, device=setup.model.device, dtype=getattr(torch, config.dtype),
            attention=config.attention,
        )  # fmt: skip
        of_base, of_trained = ([pair[i] for pair in pairs] for i in (0, 1))
        trained = setup.policy.engine.model
        run.append_records(LOG_PROBS, other_log_probs(trained, "trained", files["before"].name, of_base, config))
        run.append_records(LOG_PROBS, other_log_probs(base, "base", files["after"].name, of_trained, config))
    except (SwirlError, OSError, torch.OutOfMemoryError) as error:
        command.warn(f"answers are not compared token by token ({error})")


def train(config: TrainConfig) -> dict | None:
    """The whole way: evaluate, generate, filter, learn, evaluate. Returns the summary on the main rank, None on the
    others. Raises SwirlError.
    """
    started = time.perf_counter()
    config = configs.smoke(config) if config.smoke else config
    device = distributed.local_device(resolve.device_for(config.device))
    files = TrajectoryFiles(config.data) if config.data else None
    seen = {} if files is None else training_data.looked_at(files)
    streamed = files is not None and len(seen) < len(files)
    tasks_of_data = {t.question.task for t in seen.values()} | set(config.task if streamed else ())
    config = configs.settled(config, None if files is None else tasks_of_data, device.type)
    config = configs.sized(config, resolve.num_weights(config.model))
    if config.lora and is_adapter(resolve.model_folder(config.model)):
        raise ConfigError(
            f"--lora {config.lora}: --model {config.model} holds adapters already; merge them (export) first"
        )
    if config.offload_optimizer and device.type == "cpu":
        command.warn("--offload-optimizer changes nothing on a CPU, whose memory is where it would go")
    if config.shard in ("node", "all") and is_adapter(resolve.model_folder(config.model)):
        raise ConfigError(f"--shard {config.shard}: --model {config.model} holds adapters; merge them (export) first")
    require_trackers(config.track)
    require_named(config.evaluate_on if config.data else (*config.task, *config.evaluate_on), config.tool)
    with (
        distributed.process_group(device, timeout_s=config.rank_timeout_s),
        BackgroundLoop(lambda: distributed.local_device(str(device))) as loop,
        ExitStack() as closing,
    ):
        say = command.note if distributed.is_main() else lambda line: None
        planned = planning.plan_run(config, device, say=say)
        closing.enter_context(planning.told_if_out_of_memory(planned))
        model, tokenizer = resolve.load_model(
            config.model, device=device, dtype=getattr(torch, config.dtype), attention=config.attention,
            prepare=lambda model: sharding.shard_as_asked(model, "none" if config.lora else config.shard, device.type),
        )  # fmt: skip
        model.activation_checkpointing = config.activation_checkpointing
        if config.lora:
            add_lora(model, LoRA(config.lora, config.lora_alpha), seed=config.seed)
        if files is not None:
            fit = training_data.Fitting(files, config, model.config, tokenizer)
            data = [fit(place, trajectory) for place, trajectory in seen.items()]
            training_data.require_rewards(data, config, files)
        settings = settings_of(
            config,
            model=checkpoint_digest(resolve.model_folder(config.model)),
            data="generated" if files is None else files.digest,
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
            before = evaluate_and_write(setup, run, loop, "before")
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
        elif streamed:
            source = training_data.Streamed(fit, tasks_of_data, rewarder)
        else:
            source = loop.run(training_data.with_rewards(data, config, rewarder))
        so_far["wall_s"] = time.perf_counter() - started
        history = learn(setup, source, rewarder if config.mode == "sampled" else None, run, loop, so_far)
        if config.lora:
            save_merged(setup, run)
        after = evaluate_and_write(setup, run, loop, "after")
        with setup.sampling():
            compare_policies(setup, run)
        if not distributed.is_main():
            return None
        trained_on = None if config.mode == "outcome-rl" else len(source)
        peaks = {"planned_peak_bytes": planned.plan.peak_bytes, "peak_bytes": usage.peak_bytes(device)}
        return _finish(config, run, before, after, history, started, trained_on, peaks)


def save_merged(setup: Setup, run: RunFolder) -> None:
    """Merge the adapters into the weights, in place and on every rank, and write those as the run's `checkpoint`.

    So what is evaluated from here on is what was written. Raises CheckpointError.
    """
    model = merge_lora(setup.policy.engine.model)
    if distributed.is_main():
        with deferred():
            model.save_pretrained(run.path / "checkpoint", setup.tokenizer)


def _finish(
    config: TrainConfig, run: RunFolder, before: list[Score], after: list[Score], history, started, num_trajectories,
    peaks: dict[str, int],
) -> dict:  # fmt: skip
    """Write the summary, the model card and the report, and show both."""
    summary = _summary(config, before, after, history, started) | peaks
    run.write("summary.json", summary)
    card = model_card(config, update=len(history), commit=summary["commit"], summary=summary, kept=num_trajectories)
    replace_file(run.path / "checkpoint" / CARD, card.encode())
    write_report([config.out])
    masked, actions = (sum(metrics[name] for metrics in history) for name in ("masked", "actions"))
    if masked:
        command.warn(f"{masked} of {actions} actions had no reward: they were masked, and taught nothing")
    if after:
        print_comparison(before, after)
    print(
        f"{len(history)} update{'s' * (len(history) != 1)} in {summary['wall_s']:.0f} s; everything is in "
        f"{config.out}/, the picture in {config.out}/report.html"
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
    with stop_on_signals():
        train(config)


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, TrainConfig, __doc__)


if __name__ == "__main__":
    run_command()
