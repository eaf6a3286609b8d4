"""Updates: packed or not, on one rank or two, and what moves the weights."""

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from swirl import train
from swirl.app.run_folder import RunFolder
from swirl.app.stages import Setup
from swirl.config import TrainConfig, sized
from swirl.errors import NonFiniteError, NothingToLearn
from swirl.learning import distributed
from swirl.learning.batches import shuffled
from swirl.trajectories.record import Question, Step, Trajectory
from swirl.tree.pack import pack
from tests.learning.updates import accumulate, gradients, some_actions, some_model
from tests.process import run_ranks

ROOT = Path(__file__).parents[2]


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def some_trajectories(seed, rewards=None, num=5):
    """Trajectories of one to three steps, each step with a normal reward, or with `rewards`."""
    rng = np.random.default_rng(seed)

    def ids(most):
        return tuple(rng.integers(0, 64, rng.integers(1, most)).tolist())

    def step():
        reward = float(rng.normal()) if rewards is None else rewards
        reward = None if reward != reward else reward
        return Step(action="", action_ids=ids(5), observation_ids=ids(6), reward=reward)

    question = Question(id="q", task="own", question="?")
    return [
        Trajectory(
            id=f"{seed}-{i}", question=question, prompt="", prompt_ids=ids(7), stop="answer",
            steps=tuple(step() for _ in range(rng.integers(1, 4))),
        )
        for i in range(num)
    ]  # fmt: skip


def learn(model, updates, tmp_path, **changes):
    """The train loop on recorded actions: `updates` has the trajectories of each update. Returns its metrics."""
    settings = {"mode": "recorded", "reward": "recorded", "baseline": "none", "warmup": 0, "updates": len(updates)}
    config = sized(TrainConfig(out=tmp_path, **settings | changes), 0)
    source = [trajectory for of_update in updates for trajectory in of_update]
    bounds = np.cumsum([0, *map(len, updates)])
    setup = Setup(config, model, SimpleNamespace(engine=SimpleNamespace(model=model)), None, {})
    tmp_path.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, asyncio.Runner() as runner:
        patch.setattr(train, "shuffled", lambda *_: (range(a, b) for a, b in zip(bounds, bounds[1:])))
        so_far = {"logs": {}, "wall_s": 0.0}
        return train.learn(setup, source, None, RunFolder(config), runner, so_far)


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_packed_and_separate_updates_agree(kl, tokens):
    actions, packed, separate = some_actions(), some_model(), some_model()
    a = accumulate(packed, actions, packed=True, tokens_per_micro_batch=tokens, kl_coefficient=kl)
    b = accumulate(separate, actions, packed=False, kl_coefficient=kl)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
    assert a["computed_tokens"] <= b["computed_tokens"] == a["tokens"]
    for name, grad in gradients(separate).items():
        torch.testing.assert_close(gradients(packed)[name], grad, rtol=1e-9, atol=1e-12)


def test_the_loss_is_normalised_by_all_tokens_but_masked_ones():
    actions = some_actions()
    masked = [replace(action, advantage=float("nan")) if i % 3 == 0 else action for i, action in enumerate(actions)]
    present = [action for i, action in enumerate(actions) if i % 3]
    a, b = accumulate(some_model(), masked), accumulate(some_model(), present)
    assert a == b and a["action_tokens"] == sum(len(action.step.action_ids) for action in present)


def test_zero_advantages_are_counted_but_not_computed():
    idle = [replace(action, advantage=0.0) for action in some_actions()]
    metrics = accumulate(some_model(), idle)
    assert metrics["computed_tokens"] == 0
    assert metrics["action_tokens"] == sum(len(action.step.action_ids) for action in idle)


@pytest.mark.parametrize("reward", [0.0, float("nan")])
def test_momentum_and_decay_wait_for_something_to_learn(reward, tmp_path):
    busy, idle = some_trajectories(0), some_trajectories(1, rewards=reward)
    settings = {"weight_decay": 0.1, "learning_rate": 1e-2, "final_learning_rate": 1.0}
    once, waited, twice = some_model(), some_model(), some_model()
    learn(once, [busy], tmp_path / "once", **settings)
    *_, last = learn(waited, [busy, idle], tmp_path / "waited", **settings)
    learn(twice, [busy, busy], tmp_path / "twice", **settings)
    assert last["grad_norm"] == 0.0 and last["computed_tokens"] == 0 and "entropy" not in last
    assert last["idle"] == ("every reward is 0.00" if reward == 0 else "no action has a reward")
    for name, weight in weights(once).items():
        assert torch.equal(weights(waited)[name], weight)
        assert not torch.equal(weights(twice)[name], weight)


def test_three_updates_in_a_row_without_anything_to_learn_end_the_run(tmp_path):
    busy, idle = some_trajectories(0), some_trajectories(1, rewards=0.0)
    model = some_model()
    with pytest.raises(NothingToLearn, match="3 updates in a row had nothing to learn from: every reward is 0.00"):
        learn(model, [idle, idle, busy, idle, idle, idle, busy], tmp_path)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "checkpoint-6").is_dir()


@pytest.mark.parametrize(
    ("rewards", "goes_on"), [((1.0, 1.0, 1.0), True), ((0.5, 1.0, 0.5), True), ((0.5,) * 3, False)]
)
def test_a_run_goes_on_where_every_reward_is_as_good_as_can_be(rewards, goes_on):
    history = [{"idle": f"every reward is {reward:.2f}", "reward": reward} for reward in rewards]
    with nullcontext() if goes_on else pytest.raises(NothingToLearn):
        train.require_something_learned(history, None, smoke=False)


def test_a_non_finite_loss_is_refused_before_the_weights_are_touched(tmp_path):
    good, broken = some_trajectories(0), some_trajectories(1, rewards=float("inf"))
    once, twice = some_model(), some_model()
    learn(once, [good], tmp_path / "once", final_learning_rate=1.0)
    with pytest.raises(NonFiniteError, match="update 2: loss"):
        learn(twice, [good, broken], tmp_path / "twice", final_learning_rate=1.0)
    for name, weight in weights(once).items():
        assert torch.equal(weights(twice)[name], weight)


def test_updates_learn_to_prefer_the_better_action(tmp_path):
    state, good, bad = [1, 2, 3], (4, 5), (6, 7)
    question = Question(id="q", task="own", question="?")
    pair = [
        Trajectory(
            id=str(reward), question=question, prompt="", prompt_ids=tuple(state), stop="answer",
            steps=(Step(action="", action_ids=ids, reward=reward),),
        )
        for ids, reward in ((good, 1.0), (bad, -1.0))
    ]  # fmt: skip
    model = some_model(torch.float32)
    learn(model, [pair] * 30, tmp_path, learning_rate=1e-2)
    scores = model.sub_trajectory_log_probs(pack([(state, good), (state, bad)]))
    assert scores[0] > scores[1] + 5


def test_every_trajectory_is_taken_once_a_round():
    updates = list(islice(shuffled(7, 3, seed=5), 14))
    places = [place for update in updates for place in update]
    assert all(len(update) == 3 for update in updates)
    assert [sorted(places[k : k + 7]) for k in range(0, 42, 7)] == [[*range(7)]] * 6
    assert places[:7] != places[7:14] and updates == list(islice(shuffled(7, 3, seed=5), 14))


def test_trees_are_assigned_whole_and_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    costs = [9, 1, 1, 8, 7, 2, 2]
    assigned = distributed.assign(costs)
    assert sorted(i for indices in assigned for i in indices) == list(range(7))
    assert max(sum(costs[i] for i in indices) for indices in assigned) == 10
    assert distributed.assign([]) == [[], [], []]


WORKER = """
import sys, torch
from pathlib import Path

from swirl.config import TrainConfig
from swirl.learning import distributed
from swirl.learning.batches import assigned_here, micro_batches
from swirl.learning.objective import Objective
from swirl.learning.optimizer import make_optimizer
from tests.learning.test_updates import learn, some_trajectories
from tests.learning.updates import gradients, some_actions, some_model
torch.set_num_threads(1)
folder = Path({folder!r})
with distributed.process_group(torch.device("cpu")):
    updates = [some_trajectories(0), some_trajectories(1, num=1), some_trajectories(2)]
    model = some_model(torch.float32)
    metrics = learn(model, updates, folder / "one", kl_coefficient=0.1, warmup=1)
    once, idle = some_model(torch.float32), some_model(torch.float32)
    settings = {{"weight_decay": 0.1, "final_learning_rate": 1.0}}
    learn(once, updates[:1], folder / "once", **settings)
    learn(idle, [updates[0], some_trajectories(1, rewards=0.0)], folder / "idle", **settings)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), idle.parameters(), strict=True))
    whole = distributed.gather_shares(distributed.my_share(list(range(7))), int)
    assert whole == list(range(7)), whole
    assert distributed.from_main(distributed.rank()) == 0
    half, config = some_model(torch.bfloat16), TrainConfig(mode="recorded", packed=False)
    make_optimizer(half, learning_rate=1.0)
    objective = Objective(config, half)
    for batch, members in micro_batches(assigned_here(some_actions(), half.config), config):
        (objective(half, batch, members)[0] / 7).backward()
    distributed.sum_gradients(half)
    if distributed.is_main():
        torch.save((dict(model.named_parameters()), metrics, gradients(half)), folder / "done.pt")
"""


def test_two_ranks_make_the_update_of_one(tmp_path):
    results = []
    for processes in (1, 2):
        folder = tmp_path / f"{processes}"
        script = tmp_path / f"worker{processes}.py"
        script.write_text(WORKER.format(folder=str(folder)))
        for done in run_ranks(processes, str(script), cwd=tmp_path):
            assert done.returncode == 0, done.stderr[-2000:]
        results.append(torch.load(folder / "done.pt", weights_only=True))
    (one, one_metrics, one_half), (two, two_metrics, two_half) = results
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)
    for a, b in zip(one_metrics, two_metrics, strict=True):
        for key in ("loss", "grad_norm", "kl", "action_tokens", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key
    # In bfloat16 each action's own gradient is rounded, but the sums over actions and ranks are float32's.
    for name, gradient in one_half.items():
        assert gradient.dtype == two_half[name].dtype == torch.float32
        torch.testing.assert_close(two_half[name], gradient, rtol=1e-6, atol=1e-6 * gradient.abs().max().item())
