"""A small model, actions to learn from, and the gradient of an update: what tests of an update begin with."""

import numpy as np
import torch

from swirl.config import TrainConfig, sized
from swirl.learning import gradient
from swirl.learning.batches import SubTrajectory, num_tokens, present
from swirl.learning.metrics import loss_metrics
from swirl.learning.objective import Objective
from swirl.model.gemma import Gemma, GemmaConfig
from swirl.trajectories.record import Step

CONFIG = GemmaConfig(64, 32, 48, 2, 2, 1, head_dim=16, query_pre_attn_scalar=16, sliding_window=9)


def sub_trajectory(tree, state_ids, action_ids, advantage, log_probs=None):
    step = Step(action="", action_ids=tuple(action_ids), log_probs=log_probs)
    return SubTrajectory(tree, 0, state_ids, step, advantage)


def some_actions(seed=0, trees=5):
    """Three actions at each of a few states of each tree, drawn by some other policy."""
    rng = np.random.default_rng(seed)
    made = []
    for tree in range(trees):
        state = rng.integers(0, 64, 6).tolist()
        for _ in range(int(rng.integers(1, 4))):
            for _ in range(3):
                action = rng.integers(0, 64, rng.integers(1, 5)).tolist()
                log_probs = tuple((-rng.random(len(action)) - 3.5).tolist())
                made.append(sub_trajectory(tree, list(state), action, float(rng.normal()), log_probs))
            state += rng.integers(0, 64, 5).tolist()
    return made


def some_model(dtype=torch.float64):
    model = Gemma(CONFIG).init_weights(1).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0)
    return model


def accumulate(model, actions, *, objective=None, **changes):
    """Add the gradient of the update's loss to the weights' `grad`; returns what an update logs of it."""
    config = sized(TrainConfig(**{"mode": "recorded", **changes}), 0)
    objective = objective or Objective(config, model)
    computed = [action for action in actions if objective.has_gradient(action)]
    sums = gradient.accumulate(model, objective, computed, max(1, num_tokens(present(actions))), config)
    return loss_metrics(sums, actions, computed)


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}
