"""How much faster is the packed update than one pass a sub-trajectory, and how near to the token ratio?

  python -m benchmarks.train_step            the README's chain and comb workloads, on this machine
  python -m benchmarks.train_step --json     one row a workload
  python -m benchmarks.train_step --peer     beside transformers (eager) too, by the same merged rows, padded

Workloads (token ids drawn at random, the shape of a question with a search tool):
  chain   8 steps of recorded actions: prompt 150 tokens, actions of 20, observations of 60
  comb    the same 8 states with 4 sampled actions at each
Merged rows are what a trainer of whole conversations with loss masks computes: a row a leaf of the tree, each with the
losses of all actions that lie on it, laid end to end; their update is timed too, with swirl's kernels. All sides make
the same update (gradient norms are compared) with the model that ships with swirl, or --model.

`packed_s` and its like are forward and backward passes, `packed_update_s` and its like whole updates as `swirl.train`
makes them, from packing to the optimizer's step; utilization is of the rate of a matrix product, measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import swirl
from benchmarks.harness import append
from swirl.learning import gradient
from swirl.learning.batches import SubTrajectory, num_tokens
from swirl.learning.objective import Objective
from swirl.learning.optimizer import Optimizer, clip_grad_norm, make_optimizer
from swirl.learning.usage import commit, measured_peak_flops
from swirl.model.config import PRESETS
from swirl.model.gemma import Gemma
from swirl.tree.pack import pack_chains

ALMANAC = Path(swirl.__file__).with_name("tasks") / "almanac" / "base"
PROMPT, ACTION, OBSERVATION, STEPS, SAMPLES = 150, 20, 60, 8, 4


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """Of swirl's TrainConfig, with its values, what an update of recorded actions reads.

    This and `Action` stand in for records that need msgspec and tyro, which a borrowed GPU machine may lack.
    """

    mode: str = "recorded"
    packed: bool = True
    attention: str = "tree"
    tokens_per_micro_batch: int = 8192
    clip: float = 0.2
    kl_coefficient: float = 0.0
    proximal_every: int = 0
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Action:
    """Of swirl's Step what an update of recorded actions reads."""

    action_ids: tuple[int, ...]


def opened(name: str, layers: int | None, dtype: torch.dtype, device: str) -> Gemma:
    """`almanac`, a Hugging Face folder, or random weights of a preset's shapes."""
    if name in PRESETS:
        return random_model(name, layers, dtype, device)
    return Gemma.from_pretrained(ALMANAC if name == "almanac" else name, dtype=dtype, device=device)


def random_model(name: str, layers: int | None, dtype: torch.dtype, device: str) -> Gemma:
    """A preset's shapes, or the first `layers` of them, with weights drawn in place: never held twice."""
    config = PRESETS[name]
    if layers:
        config = dataclasses.replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
    with torch.device("meta"):
        model = Gemma(config).to(dtype)
    model.to_empty(device=device)
    drawn = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            for part in weight.view(-1).split(drawn.numel()):
                part.copy_(drawn[: part.numel()]) if weight.ndim > 1 else part.zero_()
    return model


def workload(name: str, num_trees: int, vocab_size: int, *, steps: int = STEPS) -> list[SubTrajectory]:
    """Actions of `num_trees` chains or combs."""
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(16, vocab_size, length).tolist()

    actions = []
    for tree in range(num_trees):
        state = ids(PROMPT)
        for k in range(steps):
            draws = [ids(ACTION) for _ in range(SAMPLES if name == "comb" else 1)]
            actions += [SubTrajectory(tree, k, list(state), Action(tuple(d)), float(rng.normal())) for d in draws]
            state += (ids(ACTION) if name == "comb" else draws[0]) + ids(OBSERVATION)
    return actions


def merged_rows(actions: list[SubTrajectory]) -> list[list[SubTrajectory]]:
    """Of each row of a trainer of whole conversations with loss masks the actions that lie on it, longest first."""
    rows: list[tuple[list[int], list[SubTrajectory]]] = []
    for action in sorted(actions, key=lambda action: -len(action.state_ids) - len(action.step.action_ids)):
        ids = [*action.state_ids, *action.step.action_ids]
        row = next((members for whole, members in rows if whole[: len(ids)] == ids), None)
        if row is None:
            rows.append((ids, [action]))
        else:
            row.append(action)
    return [members for _, members in rows]


class Swirl:
    """The update of `swirl.train`, packed or one pass a sub-trajectory."""

    def __init__(self, model: Gemma, config: UpdateConfig, optimizer: Optimizer):
        self.model, self.config, self.optimizer = model, config, optimizer
        self.objective = Objective(config, model)

    def accumulate(self, actions: list[SubTrajectory]) -> dict:
        return gradient.accumulate(self.model, self.objective, actions, num_tokens(actions), self.config)


class Merged(Swirl):
    """The same update by merged rows, nothing shared between them, nothing padded."""

    def accumulate(self, actions: list[SubTrajectory]) -> dict:
        rows, computed_tokens = merged_rows(actions), 0
        pairs = [[(action.state_ids, action.step.action_ids) for action in row] for row in rows]
        flat = [action for row in rows for action in row]
        for batch, indices in pack_chains(pairs, self.config.tokens_per_micro_batch):
            loss, _ = self.objective(self.model, batch.to(self.model.device), [flat[i] for i in indices])
            (loss / num_tokens(actions)).backward()
            computed_tokens += batch.num_tokens
        return {"computed_tokens": computed_tokens}


class Peer:
    """The same update by transformers: merged rows, padded to the longest of those computed together."""

    def __init__(self, model: Gemma, rows: int = 16):
        import tempfile

        from transformers import Gemma2ForCausalLM

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/model")
            self.model = Gemma2ForCausalLM.from_pretrained(f"{folder}/model", attn_implementation="eager")
        self.model.to(model.device)
        self.optimizer = make_optimizer(self.model, learning_rate=0.0)
        self.rows = rows

    def accumulate(self, actions: list[SubTrajectory]) -> dict:
        num_action_tokens = sum(len(action.step.action_ids) for action in actions)
        device = self.model.device
        rows = merged_rows(actions)
        for start in range(0, len(rows), self.rows):
            part = rows[start : start + self.rows]
            longest = [torch.tensor([*row[0].state_ids, *row[0].step.action_ids]) for row in part]
            ids = torch.nn.utils.rnn.pad_sequence(longest, batch_first=True).to(device)
            length = torch.tensor([len(row) for row in longest], device=device)[:, None]
            index = torch.arange(ids.shape[1], device=device)[None]
            weights = torch.zeros(ids.shape)
            for i, row in enumerate(part):
                for action in row:
                    first = len(action.state_ids)
                    weights[i, first : first + len(action.step.action_ids)] += action.advantage
            logits = self.model(input_ids=ids, attention_mask=(index < length).long(), use_cache=False).logits
            log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            loss = -(weights[:, 1:].to(device) * log_probs).sum() / num_action_tokens
            loss.backward()
        return {}


def measure(side: Swirl | Peer, actions: list[SubTrajectory]) -> tuple[float, float, dict]:
    """Seconds of an update's forward and backward passes, seconds of all of it, and what it computed."""
    started = time.perf_counter()
    found = side.accumulate(actions)
    synchronize(side.model.device)
    passes_s = time.perf_counter() - started
    norm = clip_grad_norm(side.model, UpdateConfig.max_grad_norm).item()
    side.optimizer.step()
    side.optimizer.zero_grad()
    synchronize(side.model.device)
    return passes_s, time.perf_counter() - started, found | {"grad_norm": norm}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compare(sides: dict[str, Swirl | Peer], actions: list[SubTrajectory], repeats: int) -> dict:
    """What a row says of all sides: in one run, in turn, so that a drift of the machine's speed meets all."""
    passes, updates = {name: [] for name in sides}, {name: [] for name in sides}
    found = {}
    for _ in range(repeats + 1):
        for name, side in sides.items():
            passes_s, update_s, found[name] = measure(side, actions)
            passes[name].append(passes_s)
            updates[name].append(update_s)
    # the first of each compiles, and does not count
    passes_s, update_s = ({name: statistics.median(s[1:]) for name, s in of.items()} for of in (passes, updates))
    model, packed = sides["packed"].model, found["packed"]
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2  # bfloat16 rounds the sums of gradients
    for name, other in found.items():
        if abs(packed["grad_norm"] - other["grad_norm"]) > tolerance * packed["grad_norm"]:
            raise SystemExit(f"gradients differ, {packed['grad_norm']} and {other['grad_norm']} ({name})")
    peak_flops = measured_peak_flops(model.device, model.dtype)
    tokens = {f"{name}_tokens": int(of["computed_tokens"]) for name, of in found.items() if "computed_tokens" in of}
    beside = {}
    if "transformers" in sides:
        beside["transformers_ratio"] = passes_s["transformers"] / passes_s["packed"]
    return {
        "trees": actions[-1].tree + 1,
        "sub_trajectories": len(actions),
        **tokens,
        "ideal_ratio": tokens["separate_tokens"] / tokens["packed_tokens"],
        "measured_ratio": passes_s["separate"] / passes_s["packed"],
        **{f"{name}_s": seconds for name, seconds in passes_s.items()},
        **{f"{name}_update_s": seconds for name, seconds in update_s.items()},
        **beside,
        "matrix_flops_per_s": peak_flops,
        "packed_utilization": packed["flops"] / passes_s["packed"] / peak_flops,
        "update_utilization": packed["flops"] / update_s["packed"] / peak_flops,
        "packed_tokens_per_s": tokens["packed_tokens"] / passes_s["packed"],
        "repeats": repeats,
        "hardware": torch.cuda.get_device_name() if model.device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype)[6:],
        "torch": torch.__version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="almanac", help="`almanac`, a Hugging Face folder, or a preset's shapes")
    parser.add_argument("--layers", type=int, help="of a preset the first so many; default: all")
    parser.add_argument("--workload", nargs="+", choices=("chain", "comb"), default=["chain", "comb"])
    parser.add_argument("--trees", type=int, default=4, help="trees in an update")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of each side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer", action="store_true", help="beside transformers too")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--json", action="store_true", help="one JSON row a workload instead of the table")
    parser.add_argument("--out", type=Path, help="also append the rows to this file (.jsonl)")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu and args.model in PRESETS else torch.float32
    model = opened(args.model, args.layers, dtype, args.device)
    # Steps of rate 0 take as long and change nothing: all sides have the same weights.
    optimizer = make_optimizer(model, learning_rate=0.0)
    sides = {name: Swirl(model, UpdateConfig(packed=name == "packed"), optimizer) for name in ("packed", "separate")}
    sides["merged"] = Merged(model, UpdateConfig(), optimizer)
    if args.peer:
        sides["transformers"] = Peer(model)
    trees, steps, repeats = (1, 2, 1) if args.tiny else (args.trees, STEPS, args.repeats)
    for name in args.workload:
        actions = workload(name, trees, model.config.vocab_size, steps=steps)
        row = {"benchmark": "train_step", "workload": name, "model": args.model, "tiny": args.tiny}
        row |= compare(sides, actions, repeats)
        append(args.out, [row])
        if args.json:
            print(json.dumps(row))
        else:
            print(
                f"{row['workload']:<6} {row['sub_trajectories']:>4} sub-trajectories  "
                f"{row['separate_tokens']:>7,} -> {row['packed_tokens']:>6,} tokens  "
                f"separate {row['separate_s'] * 1e3:8.1f} ms  packed {row['packed_s'] * 1e3:7.1f} ms  "
                f"measured {row['measured_ratio']:.2f}x  ideal {row['ideal_ratio']:.2f}x  "
                f"({row['measured_ratio'] / row['ideal_ratio']:.0%} of ideal)  "
                f"merged rows {row['merged_s'] * 1e3:.1f} ms  "
                f"whole update {row['packed_update_s'] * 1e3:.1f} ms  ({row['update_utilization']:.0%} of matrix rate)"
                + (f"  transformers {row['transformers_ratio']:.1f}x" if args.peer else "")
            )


if __name__ == "__main__":
    main()
