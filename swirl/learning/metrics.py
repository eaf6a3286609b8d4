"""What an update says of itself: its line in metrics.jsonl, and the words behind the progress bar."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from swirl.learning.batches import SubTrajectory, num_tokens, present


def reward_metrics(rewards: np.ndarray, actions: Sequence[SubTrajectory]) -> dict:
    """Of the rewards (N, G) of groups that are compared, NaN where there is none, and of all actions of the update.

    What is not measured is left out: the variance of groups of one, the mean of no rewards of a kind. A reward that
    none of the actions has is None.
    """
    present_in_group = (~np.isnan(rewards)).sum(1)
    compared = rewards[present_in_group >= 2]
    metrics = {
        "reward": None if np.isnan(rewards).all() else float(np.nanmean(rewards)),
        "actions": len(actions),
        "masked": sum(action.step.reward is None for action in actions),
        "refused": sum(action.step.call is None for action in actions),
        "truncated": float(np.mean([action.step.truncated for action in actions])),
        "action_length": num_tokens(actions) / len(actions),
        "reward_by_step": _mean_rewards(actions, lambda action: str(action.k + 1)),
        "reward_by_kind": _mean_rewards(
            actions, lambda action: action.step.call.tool if action.step.call else "refused"
        ),
    }
    if len(compared):
        metrics["no_variance"] = float(np.mean(np.nanmax(compared, 1) == np.nanmin(compared, 1)))
    return metrics


def _mean_rewards(actions: Sequence[SubTrajectory], key) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for action in actions:
        if action.step.reward is not None:
            rewards.setdefault(key(action), []).append(action.step.reward)
    return {name: float(np.mean(values)) for name, values in sorted(rewards.items())}


def loss_metrics(
    sums: dict[str, float], actions: Sequence[SubTrajectory], computed: Sequence[SubTrajectory]
) -> dict[str, float]:
    """From sums over tokens to means: of the loss and the KL over the update's action tokens, of all else that was
    measured over those that were computed. Where none was, nothing but the loss, which is 0, is told.
    """
    num_action_tokens, num_computed = max(1, num_tokens(present(actions))), num_tokens(computed)
    means = {"loss": sums["loss"] / num_action_tokens}
    if num_computed:
        averaged = ("entropy", "ratio", "clipped", "sampler_gap")
        means |= {name: sums[name] / num_computed for name in averaged if name in sums}
        means |= {name: sums[name] for name in ("sampler_gap_max",) if name in sums}
        means |= {name: sums[name] / num_action_tokens for name in ("kl",) if name in sums}
    counts = {"tokens": sums["tokens"], "computed_tokens": sums["computed_tokens"], "action_tokens": num_action_tokens}
    return {**means, **counts}


def why_idle(rewards: np.ndarray, actions: Sequence[SubTrajectory]) -> str:
    """Why an update whose actions are all masked or of advantage 0 has nothing to learn from."""
    if all(action.step.reward is None for action in actions):
        return "no action has a reward"
    if all(action.step.truncated for action in actions):
        return "every action is truncated"
    if not present(actions):
        return "no two actions with a reward can be compared"
    if np.nanmin(rewards) == np.nanmax(rewards):
        return f"every reward is {np.nanmin(rewards):.2f}"
    return "rewards are equal wherever they are compared"


def log_line(metrics: dict) -> str:
    """One update in one line; what was not measured is left out."""
    reward = "–" if metrics["reward"] is None else f"{metrics['reward']:.2f}"
    if metrics["masked"]:
        reward += f" ({metrics['masked']} of {metrics['actions']} masked)"
    words = [f"reward {reward}"]
    if "idle" in metrics:
        words.append(f"nothing to learn: {metrics['idle']}")
    else:
        words.append(f"loss {metrics['loss']:+.3f}")
    if "kl" in metrics:
        words.append(f"kl {metrics['kl']:.3f}")
    if "entropy" in metrics:
        words.append(f"entropy {metrics['entropy']:.2f}")
    if "sampler_gap" in metrics:
        words.append(f"sampler gap {metrics['sampler_gap']:.0e}")
    if "no_variance" in metrics:
        words.append(f"no variance {metrics['no_variance']:.0%}")
    if metrics["truncated"]:
        words.append(f"truncated {metrics['truncated']:.0%}")
    words.append(f"grad {metrics['grad_norm']:.2f}")
    words.append(f"{metrics['computed_tokens_per_s']:,.0f} computed tok/s, separately {metrics['tokens_per_s']:,.0f}")
    words.append(f"MFU {metrics['utilization']:.0%}")
    if metrics["balance"] < 1:
        words.append(f"balance {metrics['balance']:.0%}")
    words.append(f"{metrics['peak_bytes'] / 1e9:.1f} GB")
    return "  ".join(words)
