import numpy as np
import pytest
import torch

from swirl.learning.objective import leave_one_out_advantages, policy_loss
from swirl.learning.optimizer import learning_rate_at

NAN = float("nan")


def test_leave_one_out_by_hand():
    got = leave_one_out_advantages([[1.0, 0.0, 0.0, 1.0], [1, 1, 1, 1]])
    np.testing.assert_allclose(got, [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0]])


def test_a_masked_reward_is_never_a_zero():
    got = leave_one_out_advantages([[1.0, NAN, 0.0], [NAN, NAN, 1.0], [NAN, NAN, NAN]])
    np.testing.assert_allclose(got[0], [1.0, NAN, -1.0])
    assert np.isnan(got[1:]).all()


def test_on_policy_gradient_is_that_of_advantage_times_log_prob():
    log_probs = torch.tensor([-0.1, -2.0, -0.7], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    loss, metrics = policy_loss(log_probs, advantages)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages)
    assert metrics["ratio"] == 3 and metrics["clipped"] == 0


def test_a_ratio_beyond_the_clip_earns_no_more_gradient():
    log_probs = torch.tensor([-1.0, -1.0, -1.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-2.0, -2.0, 0.0, 0.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    loss, metrics = policy_loss(log_probs, advantages, behaviour_log_probs=behaviour, clip=0.2)
    loss.backward()
    ratio_up, ratio_down = np.exp(1), np.exp(-1)
    np.testing.assert_allclose(log_probs.grad, [0, ratio_up, -ratio_down, 0], rtol=1e-6)
    np.testing.assert_allclose(loss.item(), -(1.2 - ratio_up + ratio_down - 0.8), rtol=1e-6)
    assert metrics["clipped"] == 2


def test_kl_is_zero_at_the_reference_and_pulls_towards_it():
    reference = torch.tensor([-1.0, -3.0])
    loss, _ = policy_loss(reference.clone(), torch.zeros(2), reference_log_probs=reference, kl_coefficient=0.5)
    assert loss == 0
    log_probs = torch.tensor([-2.0, -1.0], requires_grad=True)
    loss, metrics = policy_loss(log_probs, torch.zeros(2), reference_log_probs=reference, kl_coefficient=0.5)
    loss.backward()
    assert log_probs.grad[0] < 0 < log_probs.grad[1]
    np.testing.assert_allclose(metrics["kl"], (np.e - 2) + (np.exp(-2) + 1), rtol=1e-6)
    np.testing.assert_allclose(loss.item(), 0.5 * metrics["kl"].item(), rtol=1e-6)


@pytest.mark.parametrize("num_updates", [1, 2, 7, 60])
def test_the_learning_rate_rises_then_falls_to_its_floor(num_updates):
    rates = [learning_rate_at(u, num_updates, 1.0, warmup=2, floor=0.1) for u in range(num_updates)]
    assert rates[0] == 0.5 and max(rates) <= 1.0 and min(rates) > 0.0999
    assert num_updates <= 3 or rates[-1] == pytest.approx(0.1)
