"""The objective against its definition: expectations by enumeration over a small softmax, gradients by autograd."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from msgspec import structs

from swirl.config import TrainConfig
from swirl.learning.objective import Objective, advantages_of, kl_loss, leave_one_out_advantages, policy_loss
from swirl.learning.optimizer import learning_rate_at
from swirl.sampling.engine import Engine
from swirl.tree.pack import pack
from tests.learning.updates import accumulate, gradients, some_actions, some_model, sub_trajectory

NAN = float("nan")


# Advantages.


def test_leave_one_out_by_hand():
    got = leave_one_out_advantages([[1.0, 0.0, 0.0, 1.0], [1, 1, 1, 1]])
    np.testing.assert_allclose(got, [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0]])


def test_a_masked_reward_is_never_a_zero():
    got = leave_one_out_advantages([[1.0, NAN, 0.0], [NAN, NAN, 1.0], [NAN, NAN, NAN]])
    np.testing.assert_allclose(got[0], [1.0, NAN, -1.0])
    assert np.isnan(got[1:]).all()


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1e-17])
@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("draws", range(2, 12))
def test_equal_rewards_have_an_advantage_of_exactly_0(draws, baseline, reward):
    advantages = advantages_of([[reward] * draws, [reward] * (draws - 1) + [NAN]], baseline)
    present = advantages[~np.isnan(advantages)]
    assert present.size >= 2 * draws - 2 and not present.any()


def test_baselines_by_hand():
    rewards = [[1.0, 0.0], [0.5, NAN]]
    np.testing.assert_array_equal(advantages_of(rewards, "none"), rewards)
    np.testing.assert_allclose(advantages_of(rewards, "mean"), [[0.5, -0.5], [0.0, NAN]])
    np.testing.assert_allclose(advantages_of(rewards, "leave_one_out"), [[1.0, -1.0], [NAN, NAN]])
    assert np.isnan(advantages_of([[NAN, NAN]], "mean")).all()


# The policy gradient, in expectation over all draws.

LOGITS = [0.3, -1.2, 0.8, 0.1]
REWARDS = torch.tensor([1.0, 0.0, 0.4, 0.4], dtype=torch.float64)


def logits():
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("G", [2, 3])
def test_the_leave_one_out_gradient_is_that_of_the_expected_reward(G):
    """Over all G-tuples of draws of a softmax of four."""
    exact, sampled = logits(), logits()
    (exact.softmax(0) * REWARDS).sum().backward()
    log_p = sampled.log_softmax(0)
    total = 0.0
    for draws in itertools.product(range(4), repeat=G):
        probability = log_p[list(draws)].sum().exp().detach()
        advantages = torch.from_numpy(leave_one_out_advantages(REWARDS[list(draws)][None].numpy()))[0]
        loss, _ = policy_loss(log_p[list(draws)], advantages)
        total = total - probability * loss / G
    total.backward()
    torch.testing.assert_close(sampled.grad, exact.grad, rtol=1e-12, atol=1e-14)


def test_decoupled_corrections_make_recorded_draws_those_of_the_proximal_policy():
    """Weights below their bound: in expectation over the behaviour policy, the gradient is the proximal policy's."""
    exact, corrected = logits(), logits()
    behaviour = torch.tensor([0.1, -0.8, 0.6, 0.3], dtype=torch.float64).log_softmax(0)
    (exact.softmax(0) * REWARDS).sum().backward()
    log_p = corrected.log_softmax(0)
    weights = (log_p.detach() - behaviour).exp()
    assert weights.max() < 2.0
    loss, measured = policy_loss(log_p, behaviour.exp() * REWARDS, log_p.detach(), weights=weights)
    (-loss).backward()
    torch.testing.assert_close(corrected.grad, exact.grad, rtol=1e-12, atol=1e-14)
    assert measured["ratio"] == 4 and measured["clipped"] == 0


def test_on_policy_gradient_is_that_of_advantage_times_log_prob():
    log_probs = torch.tensor([-0.1, -2.0, -0.7], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    for old in (None, log_probs.detach()):
        log_probs.grad = None
        loss, metrics = policy_loss(log_probs, advantages, old)
        loss.backward()
        torch.testing.assert_close(log_probs.grad, -advantages)
        assert metrics == ({} if old is None else {"ratio": 3, "clipped": 0})


def test_a_ratio_beyond_the_clip_earns_no_more_gradient():
    log_probs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    old = torch.tensor([-2.0, -2.0, 0.0, 0.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy_loss(log_probs, advantages, old, clip=0.2)
    loss.backward()
    ratio_up, ratio_down = np.exp(1), np.exp(-1)
    np.testing.assert_allclose(log_probs.grad, [0, ratio_up, -ratio_down, 0], rtol=1e-6)
    np.testing.assert_allclose(loss.item(), -(1.2 - ratio_up + ratio_down - 0.8), rtol=1e-6)
    assert metrics["clipped"] == 2


# The KL.


def kl_of(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_kl_of_one_token_has_the_gradient_of_kl_of_policy_to_reference():
    reference = torch.tensor([-0.5, 0.9, 0.2, -1.0], dtype=torch.float64).log_softmax(0)
    exact, ours, k3 = logits(), logits(), logits()
    kl_of(exact.log_softmax(0), reference).backward()
    log_p = ours.log_softmax(0)
    drawn = [kl_loss(kl_of(log_p, reference)[None], log_p[i][None], torch.tensor([0])) for i in range(4)]
    sum(p * loss for p, loss in zip(log_p.detach().exp(), drawn, strict=True)).backward()
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-12, atol=1e-14)
    gap = reference - k3.log_softmax(0)
    (k3.softmax(0).detach() * (gap.exp() - gap - 1)).sum().backward()  # what differentiating k3 gives
    assert (k3.grad - exact.grad).norm() > 0.3 * exact.grad.norm()


def test_the_kl_of_whole_actions_has_the_right_gradient():
    """Actions of two tokens, the second's distribution depending on the first: all nine, each as often as drawn."""
    torch.manual_seed(0)
    first, second = torch.randn(3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    q_first, q_second = torch.randn(3).double().log_softmax(0), torch.randn(3, 3).double().log_softmax(1)
    weights = {name: [first.clone().requires_grad_(), second.clone().requires_grad_()] for name in ("exact", "ours")}
    p_first, p_second = (w.log_softmax(-1) for w in weights["exact"])
    joint_p, joint_q = p_first[:, None] + p_second, q_first[:, None] + q_second
    (joint_p.exp() * (joint_p - joint_q)).sum().backward()
    p_first, p_second = (w.log_softmax(-1) for w in weights["ours"])
    total = 0.0
    for a, b in itertools.product(range(3), repeat=2):
        kl = torch.stack([kl_of(p_first, q_first), kl_of(p_second[a], q_second[a])])
        log_probs = torch.stack([p_first[a], p_second[a, b]])
        total = total + log_probs.detach().sum().exp() * kl_loss(kl, log_probs, torch.tensor([0, 0]))
    total.backward()
    for ours, exact in zip(weights["ours"], weights["exact"], strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-11, atol=1e-13)


def test_later_tokens_are_those_of_the_same_action():
    kl = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    log_probs = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = kl_loss(kl, log_probs, torch.tensor([0, 0, 0, 1, 1]))
    loss.backward()
    assert loss == 31 and log_probs.grad.tolist() == [6, 4, 0, 16, 0]
    assert kl_loss(kl, log_probs) == 31


@pytest.mark.parametrize("mode", ["sampled", "recorded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_model_s_kl_is_that_of_its_whole_distributions(mode, temperature):
    """Of advantage 0: the loss is the KL alone, its gradient autograd's through both softmaxes."""
    config = replace(TrainConfig(), mode=mode, kl_coefficient=0.3, temperature=temperature)
    model, naive = some_model(), some_model()
    objective = Objective(config, model)
    for one in (model, naive):
        with torch.no_grad():
            for weight in one.parameters():
                weight.add_(0.05 * torch.sin(torch.arange(weight.numel(), dtype=weight.dtype)).view(weight.shape))
    actions = [replace(action, advantage=0.0) for action in some_actions()]
    metrics = accumulate(model, actions, objective=objective)
    batch = pack([(a.state_ids, a.step.action_ids) for a in actions])

    def distributions(one):
        capped = one.config.final_logit_softcapping
        hidden = one.hidden(batch.input_ids, batch.position_ids, batch.subtree_end)[batch.source_rows]
        scores = hidden @ one.model.embed_tokens.weight.T
        T = temperature if mode == "sampled" else 1.0
        return (capped * torch.tanh(scores / capped) / T).log_softmax(-1)

    log_p = distributions(naive)
    kl = kl_of(log_p, distributions(objective.reference).detach())
    chosen = log_p.gather(1, batch.target_ids[:, None])[:, 0]
    within = batch.sub_trajectory if mode == "sampled" else None
    (0.3 * kl_loss(kl, chosen, within) / batch.num_action_tokens).backward()
    assert metrics["kl"] == pytest.approx(kl.mean().item(), rel=1e-9) and metrics["kl"] > 1e-4
    assert metrics["loss"] == pytest.approx(0.3 * metrics["kl"], rel=1e-9)
    for name, grad in gradients(naive).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-7, atol=1e-10)


# The modes.


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
def test_the_ratio_of_draws_from_the_policy_is_1_at_every_temperature(temperature):
    model = some_model()
    states = [[1, 2, 3], [4, 5, 6, 7]]
    drawn = Engine(model).sample(
        [state for state in states for _ in range(20)], seeds=range(40), max_new_tokens=5, temperature=temperature
    )
    actions = [sub_trajectory(i // 20, states[i // 20], c.ids, (-1.0) ** i, c.log_probs) for i, c in enumerate(drawn)]
    metrics = accumulate(model, actions, mode="sampled", temperature=temperature)
    assert metrics["ratio"] == pytest.approx(1.0, rel=1e-9) and metrics["clipped"] == 0
    if temperature != 1.0:
        other = accumulate(model, actions, mode="sampled")
        assert abs(other["ratio"] - 1) > 0.01


def without_log_probs(actions):
    return [replace(action, step=structs.replace(action.step, log_probs=None)) for action in actions]


@pytest.mark.parametrize("mode", ["recorded", "imitation"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_recorded_actions_are_bitwise_the_same_with_and_without_log_probs(mode, kl):
    actions, a, b = some_actions(), some_model(torch.float32), some_model(torch.float32)
    with_them = accumulate(a, actions, mode=mode, kl_coefficient=kl)
    assert with_them == accumulate(b, without_log_probs(actions), mode=mode, kl_coefficient=kl)
    assert "ratio" not in with_them and "clipped" not in with_them and ("kl" in with_them) == (kl > 0)
    assert all(torch.equal(gradients(a)[name], grad) for name, grad in gradients(b).items())


def test_recorded_actions_learn_reward_times_log_prob():
    actions, model, naive = some_actions(), some_model(), some_model()
    metrics = accumulate(model, actions, mode="recorded")
    batch = pack([(a.state_ids, a.step.action_ids) for a in actions])
    advantages = torch.tensor([a.advantage for a in actions], dtype=torch.float64)
    loss = -(advantages * naive.sub_trajectory_log_probs(batch)).sum() / batch.num_action_tokens
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10)
    for name, grad in gradients(naive).items():
        torch.testing.assert_close(gradients(model)[name], grad, rtol=1e-9, atol=1e-12)


def test_the_proximal_policy_is_refreshed_and_the_weights_are_bounded():
    model = some_model()
    objective = Objective(replace(TrainConfig(), mode="recorded", proximal_every=2), model)
    objective.refresh(model, 0)
    first = objective.proximal
    actions = some_actions()
    assert accumulate(model, actions, objective=objective)["ratio"] == pytest.approx(1.0, rel=1e-12)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.sin(torch.arange(weight.numel(), dtype=weight.dtype)).view(weight.shape))
    objective.refresh(model, 1)
    assert objective.proximal is first
    metrics = accumulate(model, actions, objective=objective)
    batch = pack([(a.state_ids, a.step.action_ids) for a in actions])
    log_p, proximal = (m.token_log_probs(batch).detach() for m in (model, first))
    behaviour = torch.tensor([value for a in actions for value in a.step.log_probs], dtype=torch.float64)
    weights, ratio = (proximal - behaviour).exp(), (log_p - proximal).exp()
    assert (weights > 2).any() and (weights < 2).any() and ((ratio - 1).abs() > 0.2).any()
    advantages = torch.tensor([a.advantage for a in actions], dtype=torch.float64)[batch.sub_trajectory]
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    assert metrics["loss"] == pytest.approx(-(weights.clamp(max=2) * gain).mean().item(), rel=1e-9)
    assert metrics["clipped"] == pytest.approx((ratio * advantages > gain).double().mean().item())
    again = Objective(replace(TrainConfig(), mode="recorded", proximal_every=2), model)
    again.load_state_tensors(objective.state_tensors(), model)  # as a resumed run does
    model.zero_grad(set_to_none=True)
    again.refresh(model, 1)
    assert accumulate(model, actions, objective=again) == metrics
    objective.refresh(model, 2)
    assert objective.proximal is not first


def test_the_entropy_is_that_of_the_whole_distribution():
    actions, model = some_actions(), some_model()
    metrics = accumulate(model, actions, mode="sampled", temperature=0.7)
    batch = pack([(a.state_ids, a.step.action_ids) for a in actions])
    cap = model.config.final_logit_softcapping
    hidden = model.hidden(batch.input_ids, batch.position_ids, batch.subtree_end)[batch.source_rows]
    log_p = (cap * torch.tanh(hidden @ model.model.embed_tokens.weight.T / cap) / 0.7).log_softmax(-1)
    assert metrics["entropy"] == pytest.approx(-(log_p.exp() * log_p).sum(-1).mean().item(), rel=1e-9)


@pytest.mark.parametrize("num_updates", [1, 2, 7, 60])
def test_the_learning_rate_rises_then_falls_to_its_floor(num_updates):
    rates = [learning_rate_at(u, num_updates, 1.0, warmup=2, floor=0.1) for u in range(num_updates)]
    assert rates[0] == 0.5 and max(rates) <= 1.0 and min(rates) > 0.0999
    assert num_updates <= 3 or rates[-1] == pytest.approx(0.1)
