import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from swirl.config import TrainConfig
from swirl.errors import NonFiniteError
from swirl.learning import distributed
from swirl.learning.learner import Learner, ScoredAction
from swirl.model.gemma import Gemma, GemmaConfig
from swirl.sampling.engine import Engine
from swirl.tree.pack import pack

CONFIG = GemmaConfig(64, 32, 48, 2, 2, 1, head_dim=16, query_pre_attn_scalar=16, sliding_window=9)
ROOT = Path(__file__).parents[2]


def scored_actions(seed=0, trees=5):
    rng = np.random.default_rng(seed)
    made = []
    for tree in range(trees):
        state = rng.integers(0, 64, 6).tolist()
        for _ in range(int(rng.integers(1, 4))):
            for _ in range(3):
                action = tuple(rng.integers(0, 64, rng.integers(1, 5)).tolist())
                log_probs = tuple((-rng.random(len(action)) - 3.5).tolist())
                made.append(ScoredAction(tree, list(state), action, float(rng.normal()), log_probs))
            state += rng.integers(0, 64, 5).tolist()
    return made


def learner(dtype=torch.float64, **changes):
    model = Gemma(CONFIG).init_weights(1).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0)
    return Learner(replace(TrainConfig(), **changes), model)


def gradients(one):
    return {name: weight.grad.clone() for name, weight in one.model.named_parameters()}


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_packed_and_separate_updates_agree(kl, tokens):
    scored = scored_actions()
    packed = learner(packed=True, tokens_per_micro_batch=tokens, kl_coefficient=kl)
    separate = learner(packed=False, kl_coefficient=kl)
    a, b = packed.accumulate(scored), separate.accumulate(scored)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)
    assert a["computed_tokens"] <= b["computed_tokens"] == a["tokens"]
    for name, grad in gradients(separate).items():
        torch.testing.assert_close(gradients(packed)[name], grad, rtol=1e-9, atol=1e-12)


def test_the_loss_is_normalised_by_all_tokens_but_masked_ones():
    scored = scored_actions()
    masked = [replace(action, advantage=float("nan")) if i % 3 == 0 else action for i, action in enumerate(scored)]
    present = [action for action in scored if not any(action is s for s in scored[::3])]
    a, b = learner(), learner()
    assert a.accumulate(masked) == b.accumulate(present)
    assert a.accumulate(masked)["action_tokens"] == sum(len(action.action_ids) for action in present)


def test_zero_advantages_are_counted_but_not_computed():
    scored = scored_actions()
    idle = [replace(action, advantage=0.0) for action in scored]
    metrics = learner().accumulate(idle)
    assert metrics["computed_tokens"] == 0 and metrics["action_tokens"] == sum(len(a.action_ids) for a in scored)


def test_the_ratio_of_draws_from_the_policy_itself_is_1():
    scored = [replace(action, behaviour_log_probs=None) for action in scored_actions()]
    idle = [replace(action, advantage=0.0) if i % 3 else action for i, action in enumerate(scored)]
    metrics = learner().accumulate(idle)
    assert metrics["ratio"] == pytest.approx(1.0, rel=1e-12) and metrics["clipped"] == 0.0


def test_an_update_with_nothing_to_learn_leaves_the_weights():
    one = learner(weight_decay=0.0)
    before = {name: weight.clone() for name, weight in one.model.named_parameters()}
    metrics = one.update([replace(action, advantage=float("nan")) for action in scored_actions()], 0)
    assert metrics["grad_norm"] == 0.0
    for name, weight in one.model.named_parameters():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("advantage", [0.0, float("nan")])
def test_momentum_and_decay_wait_for_something_to_learn(advantage):
    one = learner(weight_decay=0.1, learning_rate=1e-2, warmup=0)
    one.update(scored_actions(), 0)
    before = {name: weight.clone() for name, weight in one.model.named_parameters()}
    one.update([replace(action, advantage=advantage) for action in scored_actions()], 1)
    for name, weight in one.model.named_parameters():
        assert torch.equal(weight, before[name])
    one.update(scored_actions(), 2)
    for name, weight in one.model.named_parameters():
        assert not torch.equal(weight, before[name])


def test_a_non_finite_loss_is_refused_before_the_weights_are_touched():
    one = learner()
    before = {name: weight.clone() for name, weight in one.model.named_parameters()}
    scored = [replace(action, advantage=float("inf")) for action in scored_actions()]
    with pytest.raises(NonFiniteError, match="update 4: loss"):
        one.update(scored, 3)
    for name, weight in one.model.named_parameters():
        assert torch.equal(weight, before[name])


def test_updates_learn_to_prefer_the_better_action():
    one = learner(torch.float32, learning_rate=1e-2, warmup=0, updates=30)
    state, good, bad = [1, 2, 3], (4, 5), (6, 7)
    for update in range(30):
        one.update([ScoredAction(0, state, good, 1.0), ScoredAction(0, state, bad, -1.0)], update)
    scores = one.model.sub_trajectory_log_probs(pack([(state, good), (state, bad)]))
    assert scores[0] > scores[1] + 5


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_ratio_corrects_for_the_temperature_of_the_draws(temperature):
    """Of one token drawn at each of many states: p / p_T, whose mean over draws from p_T is 1."""
    one = learner(clip=100.0)
    states = [[1, 2, 3], [4, 5, 6, 7]]
    drawn = Engine(one.model).sample(
        [state for state in states for _ in range(800)],
        seeds=range(1600), max_new_tokens=1, temperature=temperature,
    )  # fmt: skip
    scored = [ScoredAction(i, states[i // 800], c.ids, 1.0, c.log_probs) for i, c in enumerate(drawn)]
    every_token = pack([(state, [token]) for state in states for token in range(64)])
    log_p = one.model.token_log_probs(every_token).detach().view(2, 64)
    log_p_drawn = (log_p / temperature).log_softmax(-1)  # log p is the logits but for a constant
    ratio = torch.stack([(log_p - log_p_drawn)[i // 800, c.ids[0]] for i, c in enumerate(drawn)]).exp()
    metrics = one.accumulate(scored)
    assert metrics["ratio"] == pytest.approx(ratio.mean().item(), rel=1e-9)
    assert -metrics["loss"] == pytest.approx(ratio.mean().item(), rel=1e-9)
    assert metrics["ratio"] == pytest.approx(1.0, abs=0.1) and (ratio.std() > 0.1) == (temperature != 1)


def test_trees_are_dealt_whole_and_evenly(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    costs = [9, 1, 1, 8, 7, 2, 2]
    hands = distributed.deal(costs)
    assert sorted(i for hand in hands for i in hand) == list(range(7))
    assert max(sum(costs[i] for i in hand) for hand in hands) == 10
    assert distributed.deal([]) == [[], [], []]


WORKER = """
import sys, torch
from dataclasses import replace

from swirl.learning import distributed
from tests.learning.test_learner import learner, scored_actions
torch.set_num_threads(1)
with distributed.process_group(torch.device("cpu")):
    one = learner(torch.float32, updates=3, kl_coefficient=0.1, warmup=1)
    metrics = [one.update(scored_actions(seed, trees=1 if seed == 1 else 5), seed) for seed in range(3)]
    idle = learner(torch.float32, updates=2, weight_decay=0.1)
    idle.update(scored_actions(), 0)
    before = {{name: weight.clone() for name, weight in idle.model.named_parameters()}}
    idle.update([replace(action, advantage=0.0) for action in scored_actions()], 1)
    assert all(torch.equal(weight, before[name]) for name, weight in idle.model.named_parameters())
    whole = distributed.gather_shares(distributed.my_share(list(range(7))))
    assert whole == list(range(7)), whole
    assert distributed.from_main(distributed.rank()) == 0
    if distributed.is_main():
        torch.save((dict(one.model.named_parameters()), metrics), {out!r})
"""


def test_two_ranks_make_the_update_of_one(tmp_path):
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        script = tmp_path / f"worker{processes}.py"
        script.write_text(WORKER.format(out=str(out)))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(torch.load(out, weights_only=True))
    (one, one_metrics), (two, two_metrics) = results
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)
    for a, b in zip(one_metrics, two_metrics, strict=True):
        for key in ("loss", "grad_norm", "kl", "action_tokens", "tokens"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key
