"""The config of a training run. Defaults the paper leaves open are ours, and each says so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from swirl.endpoints.address import EndpointLimits
from swirl.errors import ConfigError
from swirl.tasks import ALMANAC_FAMILIES, FIRST_EDITION, flags_of, is_almanac_judge

Mode = Annotated[
    Literal["auto", "sampled", "recorded", "imitation", "outcome-rl"], tyro.conf.arg(aliases=["--actions"])
]
ON_POLICY = ("sampled", "outcome-rl")
MAX_CACHE_TOKENS = 1 << 18  # in every command that samples in its process


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The run: who is trained, and where everything goes. Defaults are ours; the paper trains Gemma 2 27B."""

    model: str = "almanac"
    """`almanac` (the 1M-parameter base policy that ships with swirl), a Hugging Face folder of a Gemma, or its name on
    the hub, such as google/gemma-3-270m-it, with @REVISION where one is meant."""
    out: Path = Path("run")
    """The run's folder. One that is already there is set aside as run.1, run.2, ..., never overwritten."""
    seed: int = 0
    """Of all draws, and of the order of the data."""
    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that are given each update's numbers besides metrics.jsonl: tensorboard (into `tensorboard/` of the
    run's folder), wandb, trackio (extras of those names)."""
    smoke: bool = False
    """Shrink everything: the whole way in under 40 s on two cores."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveFlags:
    """What is learned from, and who rewards it. The formula, and a reward for every step, are the paper's; defaults are
    ours.
    """

    data: tuple[Path, ...] = ()
    """Trajectories to train on, one or more JSONL files; default: generate them with the model on --task and filter
    them. More than 64 MiB are streamed."""
    mode: Mode = "auto"
    """What is learned from (docs/objective.md). sampled: actions drawn from the current policy at each recorded state,
    each with its own reward (the paper's formula). recorded: the actions in the data, weighted by their rewards.
    imitation: the actions in the data, all alike. outcome-rl: whole trajectories played anew in each update, rewarded
    by their outcome. auto: sampled where --reward can score a new action, else recorded."""
    reward: str = "auto"
    """Who rewards an action: the URL of a reward model, its checkpoint folder, or one of Almanac's own judges: `rule`
    (the oracle), `lenient` (anything grounded is GOOD), `noisy:0.2` (the oracle, wrong about that share). In recorded
    mode also `recorded` (the data's rewards or verdicts) and `outcome` (1 where the trajectory's answer is correct,
    else 0). An action without a reward is masked; one that the environment refuses has 0 and is not asked about.
    auto: rule on Almanac, else recorded."""
    reward_prompt: Path | None = None
    """File of another template for a reward model: text with {question}, {context} and {action}."""
    votes: int = 4
    """Draws that a reward is the mean of, where the model gives no log-probs to take the expected score from."""
    baseline: Literal["auto", "none", "mean", "leave_one_out"] = "auto"
    """Subtracted from the reward: mean of the update, or of the other draws. auto: leave_one_out where actions are
    drawn, none where they are recorded."""
    temperature: float = 1.0
    """Of the actions that an update draws, and of the distribution that is trained."""
    clip: float = 0.2
    """PPO's clip of the ratio to the policy that drew the actions, or to the proximal policy."""
    proximal_every: int = 0
    """Correct recorded actions for the policy that drew them (decoupled PPO): weigh them against a proximal policy, a
    copy of the policy refreshed every so many updates, to which the clip holds it. The data must carry log-probs.
    0: no correction, no ratio."""
    kl_coefficient: float = 0.0
    """Beta of the KL to the reference policy (the model before training), per action token."""


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """What is asked, and which tools are on offer. Defaults are ours, but where the paper is named."""

    task: tuple[str, ...] = ()
    """What to generate trajectories on: Almanac families (bridge, deep, counterfactual, mixed, arithmetic) or data sets
    with --questions. Default: bridge; with --data, what the data answers."""
    questions: Path | None = None
    """File of the data set's questions to train on; Almanac needs none."""
    num_questions: int = 600
    """Questions to train on, per task; the paper takes 10,000."""
    without_easy: bool = False
    """Leave out HotPotQA's easy questions, as the paper does to train."""
    tool: tuple[str, ...] = ()
    """Tools on offer in place of the tasks' own: search, calculator, module:object, file.py:object,
    mcp+http://host/mcp, mcp+stdio:COMMAND."""
    corpus: Path | None = None
    """Pages to search: JSONL of {title, text}, or a folder of its index; default: those of the questions' own files."""
    retriever: str = "bm25"
    """What searches them: `bm25`; `dense+http://host/v1#model`, by embeddings of that server, indexed once beside the
    file; or http://host:port/retrieve, a server of Search-R1's form with pages of its own."""
    top_k: int = 1
    """Pages returned for a query (the paper's 1)."""
    malformed: Literal["end", "continue"] = "end"
    """What an action that is neither a call nor an answer does to a trajectory: end it (ours), or count as a thought,
    after which the model is asked again (as the paper's pseudo-code does)."""
    max_new_tokens: int | None = None
    """Tokens in an action at most; default: 48 for a model of up to 10M weights, 512 for a larger one."""
    stop_at_tag: bool = False
    """End an action at its closing tag: nothing can follow it, and the end of turn is context, not drawn or learned."""


@dataclass(frozen=True, kw_only=True)
class GenerateFlags:
    """How the model's own trajectories are made and filtered; of no use beside --data. Defaults are ours, but where the
    paper is named.
    """

    samples: int = 5
    """Trajectories per question (the paper's 5)."""
    generate_temperature: float = 1.0
    """Sampling temperature of those trajectories."""
    filter: Literal["none", "process", "outcome", "both"] = "process"
    """Which generated trajectories to keep (the paper's best: process)."""
    judge: str = "auto"
    """Who says which steps are GOOD, for --filter process or both: the URL of a server's model, a checkpoint folder, or
    one of Almanac's own (rule, lenient, noisy:0.2). auto: rule on Almanac. Evaluation never asks it."""
    judge_prompt: Path | None = None
    """File of another template for that model: text with {question}, {context} and {action}."""
    in_flight: int = 1024
    """Trajectories in flight at a time."""


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """What it is measured on, before and after. Defaults are ours."""

    evaluate_on: tuple[str, ...] = ("auto",)
    """Tasks to evaluate on before and after; with no value: none. auto: the first five Almanac families where trained
    on those; with --data, the data's own of them; other tasks where --evaluate-questions is given."""
    evaluate_questions: Path | None = None
    """File of a data set's questions to evaluate on."""
    evaluate_num_questions: int = 200
    """Questions to evaluate on, per task."""
    evaluate_every: int = 0
    """Also evaluate every so many updates, on --task's validation split, into validation.jsonl; 0: not at all. The
    figures before and after are those of the test split, which nothing else reads."""


@dataclass(frozen=True, kw_only=True)
class UpdateFlags:
    """The updates: how much goes into one, and AdamW. The paper reports none of it; defaults are ours."""

    updates: int = 60
    """Optimizer calls."""
    lora: int = 0
    """Rank of adapters on all linear layers (LoRA), which are trained while the weights stay as they are; 0: train the
    weights. The run writes them as `adapter`, in PEFT's format, and merged into the weights as `checkpoint`."""
    lora_alpha: float = 32.0
    """Adapters count with a factor of this over their rank."""
    trajectories_per_update: int = 24
    """Each gives as many states as it has steps."""
    samples_per_state: int = 4
    """Actions drawn at each state; in outcome-rl, trajectories of each question."""
    staleness: Literal[0, 1] = 0
    """Updates that drawn actions may be behind. 1: the next update's are drawn while this one's are judged, so that a
    slow reward model is not waited for; the clipped ratio corrects for it."""
    learning_rate: float | None = None
    """The peak; default: 1e-4 for a model of up to 2M weights, and less by the square root of how many times as many a
    larger one has (2.8e-6 for 2b); ten times that for --lora. For the 1M model three times as much learns no better and
    forgets far more; the rest is a rule of thumb that nothing here has measured."""
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """AdamW with float32 moments, 8 bytes a weight, or with moments in blocks of 8 bits, 2 bytes (bitsandbytes)."""
    warmup: int = 5
    """Updates in which the learning rate rises to its peak."""
    final_learning_rate: float = 0.1
    """As a share of the peak, reached linearly."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """A longer gradient is clipped to this length."""


@dataclass(frozen=True, kw_only=True)
class ComputeFlags:
    """Where and how it is computed: it changes what is learned by rounding alone. Defaults are ours."""

    device: str = "auto"
    """auto, cpu, or cuda (under torchrun each rank's own). A checkpoint that judges runs there too."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 computes in bfloat16 and steps on float32 copies of the weights. auto: bfloat16 on CUDA, float32 on
    CPUs."""
    packed: bool = True
    """All sub-trajectories of a micro-batch as one packed tree; --no-packed runs each alone (the baseline)."""
    tokens_per_micro_batch: int | None = None
    """Packed tokens in one backward pass at most; default: 8192, and 4096 for a model of more than 4B weights."""
    attention: Literal["tree", "flash", "xformers"] = "tree"
    """Who computes attention in an update: tree (swirl's own), or flash-attn or xformers (extras `flash`, `xformers`),
    on CUDA in bfloat16, for chains alone: recorded actions, nothing shared between trajectories. xformers has no
    softcap, so no Gemma 2 as published. Never chosen by itself: nothing is measured that would choose."""
    activation_checkpointing: Literal["none", "cheap", "layers"] = "none"
    """What the backward pass computes again, for less memory: nothing; what is cheap, which is a quarter of what is
    kept for next to no time; or whole layers, all but what lies between them, for about a third more time."""
    offload_optimizer: bool = False
    """The optimizer's state, and the float32 copies of bfloat16 weights, in the host's memory, where steps are then
    made: a GPU holds weights, gradients and activations alone. On a CPU it changes nothing."""
    shard: Literal["auto", "none", "node", "all"] = "auto"
    """How weights, gradients and optimizer state lie on the ranks of a job. none: whole on each. all: in shards over
    all ranks (FSDP2). node: in shards over the ranks of a host, the same on every host (HSDP). auto: none on one rank,
    with --lora, and for models of less than a billion weights; else node. With --lora the frozen weights lie in shards,
    adapters whole on each rank."""
    max_cache_tokens: int = MAX_CACHE_TOKENS
    """Tokens whose keys and values the sampler holds at most, of all sequences in flight and of finished ones."""
    memory_check: bool = True
    """Refuse a run that cannot fit into memory, by its plan (`plan --help`); --no-memory-check tries all the same."""
    rank_timeout_s: float = 600.0
    """Seconds that ranks wait for one another before the job ends and names the one that is missing."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """How a run is saved, and goes on. Defaults are ours."""

    resume: str | None = None
    """`auto`: go on from the last whole checkpoint in --out, or start where there is none. A checkpoint's folder: from
    that one. Without it an earlier run in --out is set aside. Settings that decide the weights must be the same."""
    save_minutes: float = 5.0
    """Save a checkpoint about every so many minutes, while training goes on; 0: never."""
    save_every: int = 0
    """And after every so many updates; 0: never. Whatever stops a run, its last update is saved."""
    keep: int = 2
    """Checkpoints to keep, the last ones."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunFlags,
    ObjectiveFlags,
    TaskFlags,
    GenerateFlags,
    EvaluateFlags,
    UpdateFlags,
    ComputeFlags,
    CheckpointFlags,
):
    """All flags of `train`, in the groups that it inherits."""

    endpoint: EndpointLimits = EndpointLimits()

    def __post_init__(self):
        one = isinstance(self.data, str | Path)  # a path alone stands for a tuple of one, None for none
        object.__setattr__(self, "data", (Path(self.data),) if one else tuple(self.data or ()))

        def require(holds: bool, flag: str, expected: str):
            if not holds:
                value = getattr(self, flag)
                shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
                raise ConfigError(f"--{flag.replace('_', '-')} {shown}: expected {expected}")

        def at_least(least: float, *flags: str):
            for flag in flags:
                value = getattr(self, flag)
                require(value is None or value >= least, flag, f"at least {least}" if least else "0 or more")

        at_least(1, "updates", "trajectories_per_update", "samples_per_state", "max_new_tokens", "num_questions",
                 "tokens_per_micro_batch", "samples", "evaluate_num_questions", "votes", "top_k", "in_flight",
                 "keep", "max_cache_tokens")  # fmt: skip
        at_least(0, "save_minutes", "save_every", "evaluate_every", "warmup", "weight_decay", "kl_coefficient",
                 "proximal_every", "generate_temperature", "lora")  # fmt: skip
        for flag in ("learning_rate", "lora_alpha", "max_grad_norm", "clip", "temperature", "rank_timeout_s"):
            value = getattr(self, flag)
            require(value is None or 0 < value < float("inf"), flag, "more than 0, and finite")
        require(0 <= self.final_learning_rate <= 1, "final_learning_rate", "a share between 0 and 1")
        if self.attention != "tree":
            require(self.device != "cpu", "attention", "tree on a CPU")
            require(self.dtype != "float32", "attention", "--dtype bfloat16 beside it, as it has no float32")
            require(self.mode not in ON_POLICY or not self.packed, "attention",
                    "--mode recorded (or --no-packed) beside it, as it computes chains alone and sampled actions "
                    "fork at every state")  # fmt: skip
        self._require_sense(require)

    @staticmethod
    def in_todays_words(values: dict) -> dict:
        """The config.json of an earlier run: names and values as they are today."""
        renamed = {"recompute": "activation_checkpointing"}
        values = {renamed.get(key, key): value for key, value in values.items()}
        if isinstance(values.get("activation_checkpointing"), bool):
            values["activation_checkpointing"] = "layers" if values["activation_checkpointing"] else "none"
        if isinstance(values.get("data", ()), str | None):  # one file, or none
            values["data"] = [values["data"]] if values["data"] else []
        return values

    @property
    def items_per_update(self) -> int:
        """Trajectories of an update, or in outcome-rl questions, each of which is played several times."""
        return self.trajectories_per_update // (self.samples_per_state if self.mode == "outcome-rl" else 1)

    @property
    def generates(self) -> bool:
        """Whether the run makes trajectories of its own and filters them, before it trains on them."""
        return not self.data and self.mode != "outcome-rl"

    def _require_sense(self, require):
        """Refuse flags that mean nothing beside --mode."""
        if self.mode in ON_POLICY:
            require(self.samples_per_state >= 2 or self.baseline in ("none", "mean"), "samples_per_state",
                    "at least 2, since the other draws are the baseline")  # fmt: skip
            require(not self.proximal_every, "proximal_every", "0: actions of the current policy need no correction")
        if self.mode not in ("auto", "sampled"):
            require(not self.staleness, "staleness", "0: only --mode sampled draws ahead")
        if self.mode == "sampled":
            require(self.reward not in ("recorded", "outcome"), "reward",
                    "rule, a URL or a checkpoint: sampled actions have no recorded reward")  # fmt: skip
        if self.mode == "recorded":
            require(self.baseline != "leave_one_out", "baseline",
                    "none or mean: recorded actions have no other draws")  # fmt: skip
        if self.mode == "imitation":
            require(self.reward in ("auto", "none"), "reward", "none, as imitation takes all actions alike")
            require(self.baseline in ("auto", "none"), "baseline", "none, as imitation takes all actions alike")
        if self.mode == "outcome-rl":
            require(self.reward in ("auto", "outcome"), "reward", "outcome, which outcome-rl learns from")
            require(not self.data, "data", "none: outcome-rl plays its own trajectories")
            require(self.trajectories_per_update % self.samples_per_state == 0, "trajectories_per_update",
                    f"a multiple of --samples-per-state {self.samples_per_state}")  # fmt: skip


def settled(config: TrainConfig, tasks_of_data: set[str] | None, device: str = "cpu") -> TrainConfig:
    """Every `auto` replaced by what it means; `tasks_of_data` are the tasks that --data answers, None without it, and
    `device` is `cuda` or `cpu`.

    Raises ConfigError on flags that contradict one another, or the data.
    """
    task = config.task or tuple(sorted(tasks_of_data) if tasks_of_data else ("bridge",))
    trained_on = tasks_of_data or set(task)
    on_almanac = trained_on <= set(ALMANAC_FAMILIES)
    evaluate_on = config.evaluate_on
    if evaluate_on == ("auto",):
        if tasks_of_data is not None:
            evaluate_on = tuple(
                name for name in task if name in ALMANAC_FAMILIES or ":" in name or config.evaluate_questions
            )
        else:
            evaluate_on = FIRST_EDITION if set(task) <= set(FIRST_EDITION) else task
    played = (*(task if tasks_of_data is None or config.evaluate_every else ()), *evaluate_on)
    for name in dict.fromkeys(name for name in played if ":" not in name):
        if "questions" in flags_of(name) and not (config.questions or config.evaluate_questions):
            raise ConfigError(f"task '{name}' needs --questions or --evaluate-questions, files of the data set")
    mode, reward = config.mode, config.reward
    if reward == "auto" and mode in ("auto", "sampled"):
        reward = "rule" if on_almanac else "recorded"
    if mode == "auto":
        mode = "recorded" if reward in ("recorded", "outcome") else "sampled"
    if reward == "auto":
        reward = {"recorded": "recorded", "imitation": "none", "outcome-rl": "outcome"}[mode]
    if mode == "sampled" and reward == "recorded":
        raise ConfigError("--reward: sampled actions need one, as Almanac's judge knows no other task: take a URL")
    for flag, spec in (("reward", reward), ("judge", config.judge)):
        if is_almanac_judge(spec) and not on_almanac:
            raise ConfigError(f"--{flag} {spec}: knows Almanac's questions alone; take a URL or a checkpoint folder")
    judge = config.judge
    if judge == "auto":
        judge = "rule" if on_almanac else "none"
    generates = tasks_of_data is None and mode != "outcome-rl"
    if generates and judge == "none" and config.filter in ("process", "both"):
        raise ConfigError(f"--filter {config.filter}: needs --judge, the URL of a model that says which steps are GOOD")
    if generates and (mode, reward) == ("recorded", "recorded") and config.filter in ("none", "outcome"):
        raise ConfigError(f"--filter {config.filter}: gives no step a verdict; take process, both, or --reward outcome")
    baseline = config.baseline
    if baseline == "auto":
        baseline = "leave_one_out" if mode in ON_POLICY else "none"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    settings = {"mode": mode, "reward": reward, "judge": judge, "baseline": baseline, "dtype": dtype}
    return replace(config, **settings, task=task, evaluate_on=evaluate_on)


SMALL = 10_000_000  # weights of a model that thinks in a line


def sized(config: TrainConfig, num_weights: int) -> TrainConfig:
    """Defaults that follow the model's size, where the config has none of its own: learning rate, tokens of an action,
    tokens of a micro-batch.
    """
    rate = 1e-4 * min(1.0, (2e6 / max(1, num_weights)) ** 0.5) * (10 if config.lora else 1)
    return replace(
        config,
        learning_rate=config.learning_rate or float(f"{rate:.1e}"),
        max_new_tokens=config.max_new_tokens or tokens_of_an_action(num_weights),
        tokens_per_micro_batch=config.tokens_per_micro_batch or (8192 if num_weights <= 4_000_000_000 else 4096),
    )


def tokens_of_an_action(num_weights: int) -> int:
    """At most, by default: larger models think aloud."""
    return 48 if num_weights <= SMALL else 512


def smoke(config: TrainConfig) -> TrainConfig:
    """The same run, shrunk: a few questions, a few updates."""
    return replace(
        config,
        updates=min(config.updates, 4),
        num_questions=min(config.num_questions, 12),
        samples=min(config.samples, 3),
        evaluate_num_questions=min(config.evaluate_num_questions, 10),
        trajectories_per_update=min(config.trajectories_per_update, 8),
    )
