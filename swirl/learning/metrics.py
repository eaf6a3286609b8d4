"""What an update says of itself: its line in metrics.jsonl, and the words behind the progress bar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swirl.learning.batches import SubTrajectory, num_tokens, present

SUMS = ("loss", "kl", "clipped", "ratio", "tokens", "computed_tokens", "flops")


def reward_metrics(actions: Sequence[SubTrajectory]) -> dict:
    """Of all actions of an update: how many, how many without a reward, how many truncated, and the mean reward."""
    rewards = [action.step.reward for action in actions if action.step.reward is not None]
    return {
        "reward": float(np.mean(rewards)) if rewards else None,
        "actions": len(actions),
        "masked": len(actions) - len(rewards),
        "truncated": sum(action.step.truncated for action in actions),
    }


def per_token(sums: dict[str, float], actions: Sequence[SubTrajectory], computed: Sequence[SubTrajectory]) -> dict:
    """The loss and the KL for each action token of the update, ratio and clipped for each one that was computed."""
    num_action_tokens, num_computed = max(1, num_tokens(present(actions))), max(1, num_tokens(computed))
    return {
        "loss": sums["loss"] / num_action_tokens,
        "kl": sums["kl"] / num_action_tokens,
        "clipped": sums["clipped"] / num_computed,
        "ratio": sums["ratio"] / num_computed,
        "tokens": sums["tokens"],
        "computed_tokens": sums["computed_tokens"],
        "action_tokens": num_action_tokens,
    }


def log_line(metrics: dict) -> str:
    """One update in one line."""
    reward = "–" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
    if metrics["masked"]:
        reward += f" ({metrics['masked']} of {metrics['actions']} masked)"
    return (
        f"reward {reward}  loss {metrics['loss']:+.3f}  kl {metrics['kl']:.3f}  grad {metrics['grad_norm']:.2f}  "
        f"{metrics['tokens_per_s']:,.0f} tok/s  MFU {metrics['utilization']:.0%}  "
        f"{metrics['peak_bytes'] / 2**30:.1f} GB"
    )
