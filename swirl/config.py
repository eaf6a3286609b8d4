"""The config of a training run. Defaults the paper leaves open are ours, and each says so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from swirl.errors import ConfigError
from swirl.tasks import ALMANAC_FAMILIES, FIRST_EDITION

Mode = Annotated[
    Literal["auto", "sampled", "recorded", "imitation"],
    tyro.conf.arg(aliases=["--actions"]),
]


@dataclass(frozen=True)
class TrainConfig:
    out: Path = Path("run")
    """The run's folder. One that is already there is set aside as run.1, run.2, ..., never overwritten."""
    model: str = "almanac"
    """`almanac` (the 1M-parameter base policy that ships with swirl) or a Hugging Face folder of a Gemma 2."""
    data: Path | None = None
    """Trajectories to train on, JSONL; default: generate them with the model on --task and filter them."""
    task: tuple[str, ...] = ("bridge",)
    """Almanac families to generate trajectories on: bridge, deep, counterfactual, mixed, arithmetic."""
    evaluate_on: tuple[str, ...] = FIRST_EDITION
    """Almanac families to evaluate on before and after; `--evaluate-on` with no value: none."""
    packed: bool = True
    """All sub-trajectories of a micro-batch as one packed tree; --no-packed runs each alone (the baseline)."""
    mode: Mode = "auto"
    """What is learned from (docs/objective.md): sampled, actions drawn from the current policy at each recorded state
    (the paper's formula); recorded, the actions in the data, weighted by their rewards; imitation, the actions in the
    data, all alike. auto: sampled where the reward can score a new action, else recorded."""
    reward: str = "auto"
    """Who rewards an action: `rule` (Almanac's judge), `recorded` (the data's rewards or verdicts), `outcome` (recorded
    actions, 1 where the trajectory's answer is correct, else 0), or the URL of a reward model. An action without a
    reward is masked; a reward model that is down, or grades nothing for 3 updates, ends the run.
    auto: rule on Almanac, else recorded."""
    updates: int = 60
    """Optimizer calls. Ours."""
    seed: int = 0
    smoke: bool = False
    """Shrink everything: the whole way in under 40 s on two cores."""

    filter: Literal["none", "process", "outcome", "both"] = "process"
    """Which generated trajectories to keep (the paper's best: process)."""
    num_questions: int = 600
    """Questions to generate trajectories of, per task. Ours; the paper takes 10,000."""
    samples: int = 5
    """Trajectories per question (the paper's 5)."""
    generate_temperature: float = 1.0
    """Ours."""
    evaluate_num_questions: int = 200
    """Questions to evaluate on, per task."""

    trajectories_per_update: int = 24
    """Ours. Each gives as many states as it has steps."""
    samples_per_state: int = 4
    """Actions drawn at each state. Ours."""
    temperature: float = 1.0
    """Of those draws. Ours; other than 1 the draws are off-policy, and the ratio corrects for it, within the clip."""
    max_new_tokens: int = 48
    """Tokens in an action at most."""
    baseline: Literal["auto", "none", "mean", "leave_one_out"] = "auto"
    """Subtracted from the reward: mean of the update, or of the other draws at the state.
    auto: leave_one_out when sampled, none when recorded. Ours."""
    learning_rate: float = 1e-4
    """Ours, as are warm-up, decay and clipping below. Three times as much learns no better and forgets far more."""
    warmup: int = 5
    final_learning_rate: float = 0.1
    """As a share of the peak, reached linearly."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    clip: float = 0.2
    """PPO's clip of the ratio to the behaviour policy."""
    kl_coefficient: float = 0.0
    """Beta of the KL to the reference policy (the model before training), per action token. Ours."""

    tokens_per_micro_batch: int = 8192
    """Packed tokens in one backward pass at most."""
    attention: Literal["tree", "flash", "xformers"] = "tree"
    """Who computes attention in an update: tree (swirl's own), or flash-attn or xformers (extras `flash`, `xformers`),
    on CUDA in bfloat16, for chains alone: recorded actions, nothing shared between trajectories. xformers has no
    softcap, so no Gemma 2 as published. Never chosen by itself: nothing is measured that would choose."""
    recompute: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    resume: str | None = None
    """`auto`: go on from the last whole checkpoint in --out, or start where there is none. A checkpoint's folder: from
    that one. Without it an earlier run in --out is set aside. Settings that decide the weights must be the same."""
    save_minutes: float = 5.0
    """Save a checkpoint about every so many minutes, while training goes on; 0: never."""
    save_every: int = 0
    """And after every so many updates; 0: never. Whatever stops a run, its last update is saved."""
    keep: int = 2
    """Checkpoints to keep, the last ones."""
    rank_timeout_s: float = 600.0
    """Seconds that ranks wait for one another before the job ends and names the one that is missing."""
    evaluate_every: int = 0
    """Also evaluate every so many updates (on --task's families); 0: before and after alone."""
    device: str = "auto"
    """auto, cpu, or cuda (under torchrun each rank's own)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes in bfloat16 and steps on float32 copies of the weights."""

    def __post_init__(self):
        def require(holds: bool, flag: str, expected: str):
            if not holds:
                raise ConfigError(f"--{flag.replace('_', '-')} {getattr(self, flag)}: expected {expected}")

        for flag in ("updates", "trajectories_per_update", "max_new_tokens", "tokens_per_micro_batch", "num_questions",
                     "samples", "evaluate_num_questions", "keep"):  # fmt: skip
            require(getattr(self, flag) >= 1, flag, "at least 1")
        for flag in (
            "save_minutes",
            "save_every",
            "evaluate_every",
            "warmup",
            "weight_decay",
            "kl_coefficient",
            "generate_temperature",
        ):
            require(getattr(self, flag) >= 0, flag, "0 or more")
        for flag in ("learning_rate", "max_grad_norm", "clip", "temperature", "rank_timeout_s"):
            require(0 < getattr(self, flag) < float("inf"), flag, "more than 0, and finite")
        require(0 <= self.final_learning_rate <= 1, "final_learning_rate", "a share between 0 and 1")
        if self.attention != "tree":
            require(self.device != "cpu", "attention", "tree on a CPU")
            require(self.dtype != "float32", "attention", "--dtype bfloat16 beside it, as it has no float32")
            require(self.mode != "sampled" or not self.packed, "attention",
                    "--mode recorded (or --no-packed) beside it, as it computes chains alone and sampled actions "
                    "fork at every state")  # fmt: skip
        for flag in ("task", "evaluate_on"):
            for name in getattr(self, flag):
                require(name in ALMANAC_FAMILIES, flag, f"of {', '.join(ALMANAC_FAMILIES)}")
        require(bool(self.task) or self.data is not None, "task", "at least one family, or --data")
        sampled = self.mode == "sampled"
        require(not sampled or self.samples_per_state >= 2 or self.baseline == "none" or self.baseline == "mean",
                "samples_per_state", "at least 2, since the other draws are the baseline")  # fmt: skip
        require(not (sampled and self.reward in ("recorded", "outcome")), "reward",
                "rule or a URL: sampled actions have no recorded reward")  # fmt: skip


def settled(config: TrainConfig, tasks_of_data: set[str] | None) -> TrainConfig:
    """Every `auto` replaced by what it means for this data; `tasks_of_data` None: for Almanac's own trajectories.

    Raises ConfigError on flags that contradict one another.
    """
    on_almanac = tasks_of_data is None or tasks_of_data <= set(ALMANAC_FAMILIES)
    mode, reward, baseline = config.mode, config.reward, config.baseline
    if reward == "auto":
        reward = "rule" if on_almanac and mode in ("auto", "sampled") else "recorded"
    if reward == "rule" and not on_almanac:
        raise ConfigError("--reward rule: Almanac's judge knows no other questions; take recorded, outcome or a URL")
    if mode == "auto":
        mode = "recorded" if reward in ("recorded", "outcome") else "sampled"
    if mode == "recorded" and reward not in ("recorded", "outcome"):
        raise ConfigError(f"--reward {reward}: recorded actions take recorded or outcome")
    if baseline == "auto":
        baseline = "leave_one_out" if mode == "sampled" else "none"
    if baseline == "leave_one_out" and mode == "recorded":
        raise ConfigError("--baseline leave_one_out: recorded actions have no other draws; take none or mean")
    if mode == "recorded" and tasks_of_data is None and reward == "recorded" and config.filter in ("none", "outcome"):
        raise ConfigError(f"--filter {config.filter}: gives no step a verdict; take process, both, or --reward outcome")
    return replace(config, mode=mode, reward=reward, baseline=baseline)


def smoke(config: TrainConfig) -> TrainConfig:
    """The same run, shrunk: a few questions, a few updates."""
    return replace(
        config,
        updates=min(config.updates, 4),
        num_questions=min(config.num_questions, 12),
        samples=min(config.samples, 3),
        evaluate_num_questions=min(config.evaluate_num_questions, 10),
        trajectories_per_update=min(config.trajectories_per_update, 6),
    )
