"""Draws that are judged as they end, one update ahead where that is asked for, and gone on with to the bit."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest

from swirl import train as loop
from swirl.app import attempts, resolve
from swirl.app.background import BackgroundLoop
from swirl.app.stages import Setup
from swirl.app.training_data import Fitting
from swirl.config import TrainConfig, sized
from swirl.errors import ConfigError
from swirl.judging.judges import Judgement
from swirl.learning import distributed
from swirl.sampling.engine import Engine
from swirl.sampling.local_policy import LocalPolicy
from swirl.train import train
from swirl.trajectories.log import write_trajectories
from tests.commands.test_train import fail_at_update, metrics_of, told
from tests.drills.resume_drill import result


class SlowJudge:
    """Takes its time, and remembers how many sequences were in flight when it was asked."""

    name = "slow"

    def __init__(self, engine):
        self.engine, self.in_flight, self.now, self.most_at_once = engine, [], 0, 0

    async def judge(self, item):
        self.in_flight.append(len(self.engine._running) + len(self.engine._waiting))
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        return Judgement(verdict="GOOD", reason="", reward=len(item.step.action) % 7 / 7)


@pytest.fixture(scope="module")
def setup():
    model, tokenizer = resolve.load_model("almanac")
    config = sized(TrainConfig(mode="sampled", reward="rule", updates=2, samples_per_state=3), 0)
    fitting = Fitting(None, config, model.config, tokenizer)
    trajectories = [fitting(place, trajectory) for place, trajectory in enumerate(told(6))]
    policy = LocalPolicy(model, tokenizer)
    return Setup(config, policy.engine.model, policy, tokenizer, {}), trajectories


def test_an_action_is_judged_the_moment_it_ends_and_drawn_as_if_alone(setup, monkeypatch):
    setup, trajectories = setup
    judge = SlowJudge(setup.policy.engine)
    undelayed = Engine._step

    def slow_step(*args):
        time.sleep(0.02)  # on a fast machine all is drawn before the judge's thread has its turn
        return undelayed(*args)

    monkeypatch.setattr(Engine, "_step", slow_step)
    with BackgroundLoop() as background:
        groups = attempts.Draws(setup, judge, background, lambda _: trajectories).groups(0)
    assert any(judge.in_flight), "every action was judged after the last was drawn"
    states = attempts.states_of(trajectories)
    assert [attempt.actions[0][0] for group in groups for attempt in group] == [s for s in states for _ in range(3)]
    state, step = groups[2][1].actions[0]
    seed = attempts.draw_seed(0, "update", 0, state.trajectory.id, state.k, 1)
    (alone,) = Engine(setup.policy.engine.model).sample(
        [state.ids()], seeds=[seed], max_new_tokens=48, stop_ids=setup.tokenizer.stop_ids
    )
    assert alone.ids == step.action_ids and alone.log_probs == pytest.approx(step.log_probs, abs=1e-5)
    for group in groups:
        for attempt in group:
            _, step = attempt.actions[0]
            assert attempt.reward == (len(step.action) % 7 / 7 if step.call else 0.0)


def test_ranks_draw_whole_trajectories_and_together_what_one_draws(setup, monkeypatch):
    setup, trajectories = setup
    whole = attempts.Draws(setup, SlowJudge(setup.policy.engine), asyncio.Runner(), lambda _: trajectories).groups(0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []

    def gather(share, kind):
        shares.append(share)
        raise InterruptedError

    monkeypatch.setattr(distributed, "gather_shares", gather)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        judge = SlowJudge(setup.policy.engine)
        with pytest.raises(InterruptedError):
            attempts.Draws(setup, judge, asyncio.Runner(), lambda _: trajectories).groups(0)
    assert [len(share) for share in shares] == [3, 3]
    together = [step for number in range(6) for step in shares[number % 2][number // 2]]
    apart = [attempt.actions[0][1] for group in whole for attempt in group]
    assert [step.action_ids for step in together] == [step.action_ids for step in apart]
    for one, other in zip(together, apart, strict=True):  # what is prefilled together decides how keys are rounded
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def run(tmp_path, name, **changed):
    write_trajectories(tmp_path / "data.jsonl", list(told(8)))
    settings = {"mode": "sampled", "updates": 3, "trajectories_per_update": 3, "samples_per_state": 4}
    settings |= {"max_new_tokens": 24, "temperature": 1.5, "learning_rate": 1e-3}
    settings |= {"evaluate_on": (), "reward": f"{__file__}:by_length"}
    config = TrainConfig(out=tmp_path / name, data=tmp_path / "data.jsonl", device="cpu", **settings | changed)
    train(config)
    return config.out


def by_length(question, steps, step):
    return len(step.action) % 7 / 7


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_goes_on_to_the_bit_with_what_was_drawn_ahead(tmp_path, monkeypatch, staleness):
    whole = run(tmp_path, "whole", staleness=staleness)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        fail_at_update(patch, 2, RuntimeError("stopped"))
        run(tmp_path, "cut", staleness=staleness)
    (left,) = (tmp_path / "cut").glob("checkpoint-*")
    state = json.loads((left / "training.json").read_text().splitlines()[0])["state"]
    assert left.name == "checkpoint-2" and (state["drawn"] is not None) == bool(staleness)
    assert result(run(tmp_path, "cut", staleness=staleness, resume="auto")) == result(whole)
    ratios = [abs(metrics["ratio"] - 1) for metrics in metrics_of(whole)]
    assert ratios[0] < 1e-5 and (max(ratios[1:]) > 1e-4) == bool(staleness)


def test_the_next_updates_actions_are_judged_while_this_one_is_computed(tmp_path, monkeypatch):
    """With staleness 1 the last answers come in while the main thread computes; with 0 all are in before it does."""
    waiting = {0: [], 1: []}
    for staleness in (0, 1):
        judges = []
        made = attempts.Draws.__init__

        def spied(self, setup, judge, *rest, judges=judges, made=made):
            judges.append(SlowJudge(setup.policy.engine))
            made(self, setup, judges[0], *rest)

        clip = loop.clip_grad_norm

        def clipped(*arguments, judges=judges, staleness=staleness, clip=clip):
            waiting[staleness].append(len(judges[0].in_flight))
            return clip(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(attempts.Draws, "__init__", spied)
            patch.setattr(loop, "clip_grad_norm", clipped)
            run(tmp_path, f"run-{staleness}", staleness=staleness, updates=3)
    assert waiting[1][0] > waiting[0][0] and waiting[1][-1] == waiting[1][-2]


def test_actions_that_end_at_their_tag_are_learned_from(tmp_path):
    out = run(tmp_path, "tags", stop_at_tag=True, max_new_tokens=40)
    metrics = metrics_of(out)
    assert all(abs(line["ratio"] - 1) < 1e-4 for line in metrics if "ratio" in line) and "ratio" in metrics[0]


def test_a_state_too_large_for_the_cache_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="tokens and 24 new ones exceed the cache's max_cache_tokens = 60"):
        run(tmp_path, "small", max_cache_tokens=60)


def test_only_drawn_actions_can_be_drawn_ahead():
    for mode in ("recorded", "imitation", "outcome-rl"):
        with pytest.raises(ConfigError, match="--staleness 1: expected 0: only --mode sampled"):
            replace(TrainConfig(), mode=mode, staleness=1)
