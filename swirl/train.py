"""Stage 2: step-wise RL. Every state of every kept trajectory is a place to act; each action has its own reward.

  python -m swirl.train --packed                     all of it, on Almanac: evaluate, generate, filter, train, evaluate
  python -m swirl.train --packed --data kept.jsonl   train on trajectories you have
  torchrun --nproc-per-node 2 -m swirl.train --packed

Writes config.json, trajectories.jsonl, kept.jsonl, metrics.jsonl, summary.json, report.html and checkpoint/ into --out;
a reward model's answers, each on disk before it is used, into answers.sqlite there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from swirl import config as configs
from swirl import tasks
from swirl.app import command, resolve
from swirl.app.progress import progress
from swirl.app.rewards import mean_reward, recorded_rewards, reward_metrics, rewards_of
from swirl.app.scores import Score, compared, score_trajectories
from swirl.config import TrainConfig
from swirl.endpoints.client import Client
from swirl.errors import ConfigError, EndpointUnusable, InputError
from swirl.evaluate import answer
from swirl.filter import filter_in_memory
from swirl.generate import collect, limits_for
from swirl.learning import distributed, usage
from swirl.learning.learner import Learner, ScoredAction
from swirl.learning.objective import leave_one_out_advantages
from swirl.report import print_comparison, write_report
from swirl.rollout.rollout import draw_seed, with_ids
from swirl.sampling.local_policy import LocalPolicy, completion_action
from swirl.storage.lock import take_lock
from swirl.trajectories.log import read_trajectories, write_trajectories
from swirl.trajectories.record import Trajectory

_UNGRADED_UPDATES = 3  # in a row: the reward model is at fault, and going on would only pay for more of the same
_TERMINATED = threading.Event()  # SIGTERM has come


class Actor:
    """The policy at work: it answers questions, makes trajectories, and draws actions to learn from.

    One event loop serves its whole life, since `client`, by which the judge asks, keeps its connections; use it in a
    `with`.
    """

    def __init__(self, config: TrainConfig, model, tokenizer, judge, client: Client):
        self.config, self.tokenizer, self.judge, self._client = config, tokenizer, judge, client
        self.policy = LocalPolicy(model, tokenizer, name=config.model)
        self._runner = asyncio.Runner()

    def __enter__(self) -> Actor:
        return self

    def __exit__(self, *exc) -> None:
        self._runner.run(resolve.close(self.judge, self._client))
        self._runner.close()

    def evaluate(self, families: tuple[str, ...], description: str, *, show: bool = True) -> list[Score]:
        """Greedy answers to each family's test questions, shared out over ranks."""
        if not families:
            return []
        opened = [tasks.open_task(family) for family in families]
        asked = [task.questions("test", self.config.test_questions) for task in opened]
        total = sum(len(distributed.my_share(questions)) for questions in asked)
        scores = []
        with progress(description, total, show=show and distributed.is_main()) as advance:
            for task, questions in zip(opened, asked, strict=True):
                share = answer(
                    distributed.my_share(questions),
                    task=task,
                    policy=self.policy,
                    coder=self.tokenizer,
                    judge=resolve.open_judge("rule"),
                    temperature=0.0,
                    max_new_tokens=self.config.max_new_tokens,
                    in_flight=1024,
                    seed=self.config.seed,
                    advance=advance,
                )
                scores.append(score_trajectories(task.name, distributed.gather_shares(self._runner.run(share))))
        return scores

    def generate(self) -> list[Trajectory]:
        """The policy's own trajectories on every task to train on, shared out over ranks."""
        config, made = self.config, []
        for name in config.task:
            task = tasks.open_task(name)
            questions = task.questions("train", config.num_questions)
            asked = distributed.my_share([(q, s) for q in questions for s in range(config.trajectories_per_question)])
            limits = limits_for(
                task,
                max_steps=None,
                max_new_tokens=config.max_new_tokens,
                temperature=config.generate_temperature,
            )
            with progress(f"generate {name}", len(asked), show=distributed.is_main()) as advance:
                playing = collect(
                    asked,
                    task=task,
                    policy=self.policy,
                    coder=self.tokenizer,
                    limits=limits,
                    seed=config.seed,
                    in_flight=1024,
                    advance=advance,
                )
                made += distributed.gather_shares(self._runner.run(playing))
        return made

    def filter(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """Those that pass `config.filter` by Almanac's judge, with its verdicts."""
        with progress("filter", len(trajectories), show=distributed.is_main()) as advance:
            judging = filter_in_memory(
                trajectories, judge=resolve.open_judge("rule"), mode=self.config.filter, advance=advance
            )
            kept, _ = self._runner.run(judging)
        return kept

    def sampled_actions(self, trajectories: list[Trajectory], update: int) -> tuple[list[ScoredAction], dict]:
        """G actions drawn at each state, each with its reward less its baseline. All ranks get all of them."""
        config = self.config
        states = [(tree, k) for tree, trajectory in enumerate(trajectories) for k in range(len(trajectory.steps))]
        state_ids = [trajectories[tree].state_ids(k) for tree, k in states]
        mine = distributed.my_share(states)
        G = config.samples_per_state
        seeds = [
            draw_seed(config.seed, "update", update, trajectories[tree].id, k, g) for tree, k in mine for g in range(G)
        ]
        completions = self.policy.engine.sample(
            [ids for ids in distributed.my_share(state_ids) for _ in range(G)],
            seeds=seeds,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_ids=self.policy.stop_ids,
        )
        actions = [completion_action(completion, self.tokenizer) for completion in completions]
        owners = [state for state in mine for _ in range(G)]
        rewards = self._runner.run(rewards_of(self.judge, trajectories, owners, actions))
        drawn = [(actions[i * G : i * G + G], rewards[i * G : i * G + G]) for i in range(len(mine))]
        drawn = distributed.gather_shares(drawn)

        table = np.array([row for _, row in drawn], dtype=np.float64).reshape(len(states), G)
        if config.baseline in ("auto", "leave_one_out"):
            advantages = leave_one_out_advantages(table)
        else:
            advantages = table - ((mean_reward(table) or 0.0) if config.baseline == "mean" else 0.0)
        scored = [
            ScoredAction(tree, ids, action.ids, float(advantage), action.log_probs)
            for (tree, _), ids, (draws, _), row in zip(states, state_ids, drawn, advantages, strict=True)
            for action, advantage in zip(draws, row, strict=True)
        ]
        cut_off = sum(not action.stopped for draws, _ in drawn for action in draws)
        return scored, {**reward_metrics(table), "cut_off": cut_off}

    def recorded_actions(self, trajectories: list[Trajectory]) -> tuple[list[ScoredAction], dict]:
        """The actions in the data with their recorded rewards; steps without one are masked."""
        table = recorded_rewards(trajectories, self.config.reward)
        advantages = table - ((mean_reward(table) or 0.0) if self.config.baseline == "mean" else 0.0)
        places = [(tree, k) for tree, t in enumerate(trajectories) for k in range(len(t.steps))]
        scored = [
            ScoredAction(
                tree,
                trajectories[tree].state_ids(k),
                trajectories[tree].steps[k].action_ids,
                float(advantage),
                trajectories[tree].steps[k].log_probs,
            )
            for (tree, k), advantage in zip(places, advantages, strict=True)
        ]
        return scored, reward_metrics(table)


def _require_rewards(config: TrainConfig, trajectories: list[Trajectory]) -> None:
    """Raises InputError where recorded actions have nothing to teach: not one of them is graded."""
    if config.actions == "recorded" and np.isnan(recorded_rewards(trajectories, config.reward)).all():
        if config.reward == "outcome":
            raise InputError(config.data, "no trajectory has an outcome or a golden answer: take --reward recorded")
        raise InputError(config.data, "no step has a reward or a verdict: filter it, or take --reward outcome")


def _with_ids(trajectories: list[Trajectory], tokenizer, file: Path) -> list[Trajectory]:
    """Trajectories whose ids fit this tokenizer: kept where they were made with it, made once from text otherwise."""
    made = []
    for trajectory in trajectories:
        if trajectory.prompt_ids is not None:
            if trajectory.tokenizer not in (None, tokenizer.fingerprint):
                raise InputError(
                    file, f"expected the tokenizer of the model ({tokenizer.fingerprint[:12]}), "
                    f"trajectory '{trajectory.id}' has ids of another", field="tokenizer",
                )  # fmt: skip
            top = max(max(ids) for s in trajectory.steps for ids in (s.action_ids, s.observation_ids or (0,)))
            if max(top, *trajectory.prompt_ids) >= tokenizer.vocab_size:
                raise InputError(
                    file, f"expected token ids below the vocabulary's {tokenizer.vocab_size}, "
                    f"trajectory '{trajectory.id}' has others", field="action_ids",
                )  # fmt: skip
            made.append(trajectory)
        else:
            made.append(with_ids(trajectory, tokenizer))
    return made


def _settle(config: TrainConfig, trajectories: list[Trajectory] | None) -> TrainConfig:
    """Replace every `auto` by what it means for this data."""
    on_almanac = trajectories is None or all(t.question.task in tasks.ALMANAC_FAMILIES for t in trajectories)
    reward = config.reward
    if reward == "auto":
        reward = "rule" if on_almanac and config.actions != "recorded" else "recorded"
    if reward == "rule" and not on_almanac:
        raise ConfigError("--reward rule: Almanac's judge knows no other questions; take recorded, outcome or a URL")
    actions = config.actions
    if actions == "auto":
        actions = "recorded" if reward in ("recorded", "outcome") else "sampled"
    if actions == "recorded" and reward not in ("recorded", "outcome"):
        raise ConfigError(f"--reward {reward}: recorded actions take recorded or outcome")
    if config.baseline == "leave_one_out" and actions == "recorded":
        raise ConfigError("--baseline leave_one_out: recorded actions have no other draws; take none or mean")
    if trajectories is None and reward == "recorded" and config.filter in ("none", "outcome"):
        raise ConfigError(f"--filter {config.filter}: gives no step a verdict; take process, both, or --reward outcome")
    return replace(config, reward=reward, actions=actions)


def _set_aside(out: Path) -> None:
    """Make room for the run: an earlier one moves to out.1, out.2, ...; what is no run is not touched."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "config.json").exists():
        raise ConfigError(f"--out {out}: is there already and is no run of swirl; name another folder")
    with _alone_in(out):
        pass
    number = 1
    while (aside := out.with_name(f"{out.name}.{number}")).exists():
        number += 1
    out.rename(aside)
    print(f"{out} is an earlier run: set aside as {aside}", file=sys.stderr)


@contextmanager
def _alone_in(out: Path):
    """Lock the folder while the body runs. Raises ConfigError where another run is at work."""
    folder = os.open(out, os.O_RDONLY)
    try:
        if not take_lock(folder):
            raise ConfigError(f"--out {out}: another run is at work there; name another folder, or stop it")
        yield
    finally:
        os.close(folder)


def _batches(num_trajectories: int, config: TrainConfig):
    """Indices of the trajectories of each update, forever: shuffled anew each time round, the same on every rank."""
    rng = np.random.default_rng(config.seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < config.trajectories_per_update:
            waiting += rng.permutation(num_trajectories).tolist()
        yield [waiting.pop(0) for _ in range(config.trajectories_per_update)]


def _generate(config: TrainConfig, actor: Actor) -> list[Trajectory]:
    """The policy's own trajectories, filtered; both are also written down."""
    made = actor.generate()
    kept = actor.filter(made)
    if distributed.is_main():
        write_trajectories(config.out / "trajectories.jsonl", made)
        write_trajectories(config.out / "kept.jsonl", kept)
        print(f"kept {len(kept)} of {len(made)} trajectories ({config.filter} filter)", file=sys.stderr)
    if not kept:
        raise ConfigError(f"--filter {config.filter} kept none of {len(made)} trajectories: nothing to train on")
    return kept


def _save(folder: Path, actor: Actor, what: str) -> None:
    actor.policy.engine.model.save_pretrained(folder, tokenizer=actor.tokenizer)
    print(f"{what}: {folder}", file=sys.stderr)


def _rescue(folder: Path, actor: Actor) -> None:
    """The weights as they are, if they are numbers. An error is on its way already: what fails here only warns."""
    what = "the weights of the last good update"
    try:
        with _deaf_to_sigterm():
            if all(weight.isfinite().all() for weight in actor.policy.engine.model.parameters()):
                _save(folder, actor, what)
            else:
                command.warn(f"{what} are not saved: some are NaN or infinite")
    except Exception as error:
        command.warn(f"{what} could not be saved ({error})")


@contextmanager
def _deaf_to_sigterm():
    """torchrun sends it to all ranks as soon as one has failed: just when the main rank saves its weights."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread hears signals
        return
    heard = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, heard)


def _train(config: TrainConfig, actor: Actor, learner: Learner, kept: list[Trajectory]) -> list[dict]:
    """All updates; returns the metrics of each. Whatever stops it on the way, the weights of the last one are kept."""
    history: list[dict] = []
    try:
        _loop(config, actor, learner, kept, history)
        _tell_masked(history)
    except BaseException:
        if distributed.is_main() and history:
            _rescue(config.out / f"checkpoint-{len(history)}", actor)
        raise
    return history


def _tell_masked(history: list[dict]) -> None:
    masked, actions = (sum(metrics[name] for metrics in history) for name in ("masked", "actions"))
    if masked and distributed.is_main():
        command.warn(f"{masked} of {actions} actions had no reward: they were masked, and taught nothing")


def _require_grades(config: TrainConfig, history: list[dict], judge) -> None:
    """A reward model that answers but grades nothing is at fault, like one that is down; all ranks see the same.

    Actions cut off are bad without being asked about, so they do not speak for it. Raises EndpointUnusable.
    """
    recent = history[-_UNGRADED_UPDATES:]
    ungraded = [m for m in recent if m["masked"] and m["masked"] + m.get("cut_off", 0) == m["actions"]]
    if config.actions == "sampled" and len(ungraded) == _UNGRADED_UPDATES:
        raise EndpointUnusable(judge.name, f"graded none of the actions of {_UNGRADED_UPDATES} updates in a row")


def _loop(config: TrainConfig, actor: Actor, learner: Learner, kept: list[Trajectory], history: list[dict]) -> None:
    """Evaluate? save? log; last? break; draw; update. Each update's metrics are appended to `history`."""
    batches, update, main = _batches(len(kept), config), 0, distributed.is_main()
    peak_flops = usage.measured_peak_flops(learner.model.device, learner.model.dtype) if main else 0.0
    with progress("train", config.updates, show=main) as advance:
        while True:
            last = update == config.updates
            if config.evaluate_every and update and not last and update % config.evaluate_every == 0:
                scores = actor.evaluate(config.task, "evaluate", show=False)
                history[-1]["accuracy"] = {score.task: score.accuracy for score in scores}
            if main and config.save_every and update and not last and update % config.save_every == 0:
                _save(config.out / f"checkpoint-{update}", actor, f"checkpoint of update {update}")
            if history and main:
                _append_json(config.out / "metrics.jsonl", history[-1])
            if last:
                break
            if _TERMINATED.is_set():
                sys.exit(128 + signal.SIGTERM)
            started = time.perf_counter()
            trajectories = [kept[i] for i in next(batches)]
            if config.actions == "sampled":
                scored, sampling = actor.sampled_actions(trajectories, update)
            else:
                scored, sampling = actor.recorded_actions(trajectories)
            sampled_s = time.perf_counter() - started
            metrics = {"update": update + 1, **sampling, **learner.update(scored, update)}
            wall_s = time.perf_counter() - started
            metrics["update_s"], metrics["sample_s"] = wall_s, sampled_s
            metrics["tokens_per_s"] = metrics["tokens"] / wall_s
            metrics["utilization"] = metrics.pop("flops") / (wall_s - sampled_s) / peak_flops if peak_flops else 0.0
            metrics["peak_bytes"] = usage.peak_bytes(learner.model.device)
            history.append(metrics)
            update += 1
            _require_grades(config, history, actor.judge)
            graded = "–" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
            graded += f" ({metrics['masked']} of {metrics['actions']} masked)" if metrics["masked"] else ""
            advance(note=(
                f"reward {graded}  loss {metrics['loss']:+.3f}  kl {metrics['kl']:.3f}  "
                f"grad {metrics['grad_norm']:.2f}  {metrics['tokens_per_s']:,.0f} tok/s  "
                f"MFU {metrics['utilization']:.0%}  {metrics['peak_bytes'] / 2**30:.1f} GB"
            ))  # fmt: skip


def _append_json(path: Path, value: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(value) + "\n")


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


def train(config: TrainConfig) -> dict | None:
    """The whole way. Returns the summary on the main rank, None on the others. Raises SwirlError."""
    started = time.perf_counter()
    config = configs.smoke(config) if config.smoke else config
    device = distributed.local_device(resolve.device_for(config.device))
    data = read_trajectories(config.data) if config.data is not None else None
    config = _settle(config, data)
    if data is not None:
        _require_rewards(config, data)
    with distributed.process_group(device):
        dtype = getattr(torch, config.dtype)
        model, tokenizer = resolve.load_model(config.model, device=device, dtype=dtype, attention=config.attention)
        model.recompute = config.recompute
        if data is not None:
            data = _with_ids(data, tokenizer, config.data)
            _require_context(data, model.config.max_position_embeddings, config.data)
        client, sampled = Client(config.out / "answers.sqlite"), config.actions == "sampled"
        judge = resolve.open_judge(config.reward, kind="reward", client=client) if sampled else None
        if distributed.is_main():
            _set_aside(config.out)
            config.out.mkdir(parents=True, exist_ok=True)
            (config.out / "config.json").write_bytes(command.config_to_json(config))
            ranks = f", {distributed.world_size()} ranks" if distributed.world_size() > 1 else ""
            print(f"{config.actions} actions, {config.reward} reward, {device}{ranks}", file=sys.stderr)
        distributed.from_main(None)  # before any rank writes into the folder, it is there, and new
        alone = _alone_in(config.out) if distributed.is_main() else nullcontext()
        with alone, Actor(config, model, tokenizer, judge, client) as actor:
            before = actor.evaluate(config.evaluate_on, "evaluate before")
            kept = data if data is not None else _generate(config, actor)
            history = _train(config, actor, Learner(config, model), kept)
            if distributed.is_main():
                model.save_pretrained(config.out / "checkpoint", tokenizer=tokenizer)
            after = actor.evaluate(config.evaluate_on, "evaluate after")
        if not distributed.is_main():
            return None
        summary = _summary(config, before, after, history, started)
        (config.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_report(config.out)
        if after:
            print_comparison(before, after)
        print(
            f"{len(history)} updates in {summary['wall_s']:.0f} s; everything is in {config.out}/, "
            f"the picture in {config.out}/report.html"
        )
        return summary


def _require_context(trajectories: list[Trajectory], limit: int, file: Path) -> None:
    for trajectory in trajectories:
        length = len(trajectory.state_ids(len(trajectory.steps)))
        if length > limit:
            raise InputError(
                file,
                f"trajectory '{trajectory.id}' has {length} tokens, expected at most the model's {limit}",
            )


def main(config: TrainConfig) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if not distributed.launched_as_main():
        # one voice: the others' results would repeat the main rank's, their errors are the launcher's to show
        sys.stdout = open(os.devnull, "w")
    signal.signal(signal.SIGTERM, _terminated)
    train(config)


def _terminated(number: int, frame) -> None:
    """A scheduler's or torchrun's SIGTERM as an exception, so that what is under way is left in order.

    Raised in a finalizer it would be swallowed: hence the event, which the loop looks at before each update.
    """
    _TERMINATED.set()
    sys.exit(128 + number)


def run_command() -> None:
    """Flags, then the work, then the exit code."""
    command.run(main, TrainConfig, __doc__)


if __name__ == "__main__":
    run_command()
