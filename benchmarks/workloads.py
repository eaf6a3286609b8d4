"""The forests that attention is measured on, with step and token counts from real data.

    python -m benchmarks.workloads [--data ../shared/data]     reads the data, writes
    benchmarks/workloads.json

The data sets stay where they are; their counts are committed: deciles of steps a question and of tokens (4
characters each) an action and an observation. What a step is: GSM8K, a line of the solution; HotPotQA, a
supporting page, its supporting sentences the action and the page the observation; MuSiQue, a hop of the
decomposition, its question and answer the action and the supporting paragraph the observation. Every prompt
has 150 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from swirl.tree.pack import pack

STATISTICS = Path(__file__).with_name("workloads.json")
PROMPT, CHARACTERS_A_TOKEN, SAMPLES, TRAJECTORIES = 150, 4, 4, 4


@dataclass(frozen=True)
class Workload:
    """A forest of T tokens, and the lengths of the rows that compute the same without sharing a token.

    separate: a row a sub-trajectory, its state and its action. Empty where there are no sub-trajectories.
    merged: a row a leaf, the best that a trainer of whole conversations with loss masks can do. A recorded
    trajectory is one row with the losses of all its actions, since each of its states begins the next one; an
    action that was sampled and not gone on from is a row of its own, with its whole state. A chain is its own
    merged row; a comb whose trunk goes on from one of G samples is the trunk and G - 1 rows a state; the
    trajectories of a question share nothing.
    """

    name: str
    subtree_end: torch.Tensor
    position_ids: torch.Tensor
    separate: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.subtree_end.numel()

    @property
    def merged(self) -> tuple[int, ...]:
        leaves = self.subtree_end == torch.arange(1, self.num_tokens + 1)
        return tuple((self.position_ids[leaves] + 1).tolist())


def _steps(data: Path):
    """By data set: for each question, the (action, observation) lengths of its steps in characters."""
    lines = (data / "gsm8k" / "train.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["answer"].splitlines() for line in lines]
    yield "gsm8k", [[(len(step), 0) for step in solution] for solution in solutions]
    questions = json.loads((data / "hotpotqa" / "train.slice.json").read_text())
    found = []
    for question in questions:
        pages = {title: sentences for title, sentences in question["context"]}
        facts = [(title, i) for title, i in question["supporting_facts"] if i < len(pages.get(title, ()))]
        steps = []
        for title in dict.fromkeys(title for title, _ in facts):
            action = sum(len(pages[title][i]) for other, i in facts if other == title)
            steps.append((action, sum(map(len, pages[title]))))
        found.append(steps)
    yield "hotpotqa", [steps for steps in found if steps]
    found = []
    for line in (data / "musique" / "train.slice.jsonl").read_text().splitlines():
        question = json.loads(line)
        paragraphs = {page["idx"]: len(page["paragraph_text"]) for page in question["paragraphs"]}
        hops = question["question_decomposition"]
        found.append([(len(hop["question"] + hop["answer"]), paragraphs[hop["paragraph_support_idx"]]) for hop in hops])
    yield "musique", found


def statistics_of(data: Path) -> dict:
    """Deciles, 0 to 100%, of steps a question and of tokens an action and an observation."""
    found = {}
    for name, questions in _steps(data):
        actions, observations = np.array([step for steps in questions for step in steps]).T
        counts = {
            "steps": [len(steps) for steps in questions],
            "action_tokens": -(-actions // CHARACTERS_A_TOKEN),
            "observation_tokens": -(-observations // CHARACTERS_A_TOKEN),
        }
        found[name] = {"questions": len(questions)} | {
            key: np.quantile(values, np.linspace(0, 1, 11), method="nearest").tolist() for key, values in counts.items()
        }
    return found


def _workload(name: str, pairs) -> Workload:
    batch = pack(pairs)
    separate = tuple(len(state) + len(action) for state, action in pairs)
    return Workload(name, batch.subtree_end, batch.position_ids, separate)


def _ids(rng, length):
    return rng.integers(1, 1 << 30, max(1, int(length))).tolist()


def _pairs(kind: str, counts: dict, rng):
    """The sub-trajectories of one question, as (state, action) token ids drawn at random."""

    def draw(key):
        return np.interp(rng.random(), np.linspace(0, 1, 11), counts[key])

    prompt, pairs = _ids(rng, PROMPT), []
    for _ in range(TRAJECTORIES if kind == "tree" else 1):
        state = list(prompt)
        for _ in range(round(draw("steps"))):
            actions = [_ids(rng, draw("action_tokens")) for _ in range(1 if kind == "chain" else SAMPLES)]
            pairs += [(list(state), action) for action in actions]
            state += actions[0] + (_ids(rng, draw("observation_tokens")) if counts["observation_tokens"][-1] else [])
    return pairs


def from_data(kind: str, dataset: str, num_tokens: int, seed: int = 0) -> Workload:
    """Questions that pack to exactly num_tokens: "chain" (recorded actions), "comb" (4 sampled actions a
    state, the first of them gone on from) or "tree" (4 trajectories of a question, each a comb). The last
    question is cut short, and its last action fitted to what is left."""
    if num_tokens <= PROMPT:
        raise ValueError(f"{num_tokens} tokens hold no action after a prompt of {PROMPT}")
    counts, rng = json.loads(STATISTICS.read_text())[dataset], np.random.default_rng(seed)
    pairs, missing = [], num_tokens
    while missing > PROMPT:
        question = _pairs(kind, counts, rng)
        while len(question) > 1 and pack(question).num_tokens > missing:
            question.pop()
        state, action = question[-1]
        if len(question) == 1:
            question = [(state, action[: missing - len(state)])]
        pairs, missing = pairs + question, missing - pack(question).num_tokens
    if missing:
        state, action = pairs[-1]
        pairs[-1] = (state, action + _ids(rng, missing))
    return _workload(f"{kind} ({dataset})", pairs)


def forest_of(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Separate sequences: subtree_end and position_ids."""
    lengths = torch.tensor(lengths)
    ends = lengths.cumsum(0)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return ends.repeat_interleave(lengths).int(), position.int()


def agent(num_tokens: int) -> Workload:
    """One agent of 50 steps, 60 tokens of action to 580 of observation, 4 samples a step."""
    step = num_tokens // 50
    action, observation = step * 60 // (640 + 3 * 60), step * 580 // (640 + 3 * 60)
    rng, pairs, state = np.random.default_rng(0), [], [0]
    for _ in range(50):
        actions = [_ids(rng, action) for _ in range(SAMPLES)]
        pairs += [(list(state), branch) for branch in actions]
        state += actions[0] + _ids(rng, observation)
    return _workload("agent, 50 steps", pairs)


def causal(num_tokens: int) -> Workload:
    """One sequence: dense causal attention."""
    return Workload("causal", *forest_of((num_tokens,)))


def fork(trunk: int, branches: int, branch: int, repeats: int) -> Workload:
    """`repeats` trunks, at whose end stand `branches` of `branch` tokens each."""
    size = trunk + branches * branch
    ends = [size] * trunk + [trunk + branch * (i // branch + 1) for i in range(size - trunk)]
    position = torch.cat([torch.arange(trunk), *[torch.arange(trunk, trunk + branch)] * branches])
    end = (torch.tensor(ends) + size * torch.arange(repeats)[:, None]).reshape(-1)
    separate = (trunk + branch,) * (branches * repeats)
    return Workload(f"trunk {trunk}, {branches} branches", end.int(), position.repeat(repeats).int(), separate)


def trees_of_256(num_tokens: int) -> Workload:
    """Trees of 256: a trunk of 128 with 4 branches of 32."""
    return replace(fork(128, 4, 32, max(1, num_tokens // 256)), name="trees of 256")


def density_039(num_tokens: int) -> Workload:
    """A trunk of a sixth and 8 branches: 0.39 of the causal pairs are visible."""
    trunk = num_tokens // 6
    return replace(fork(trunk, 8, (num_tokens - trunk) // 8, 1), name="density 0.39")


def live_pairs(position_ids: torch.Tensor, window: int | None = None) -> int:
    """Visible (query, key) pairs, what FLOPs are counted on: a token sees its ancestors and itself."""
    depth = position_ids.long() + 1
    return int((depth if window is None else depth.clamp(max=window)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data",
        help="holds gsm8k/train.jsonl, hotpotqa/train.slice.json, musique/train.slice.jsonl, in their authors' forms",
    )  # fmt: skip
    data = parser.parse_args().data
    try:
        found = statistics_of(data)
    except OSError as error:
        where = f"{error.filename}: {error.strerror}"
        raise SystemExit(f"error: {where}; --data names the folder of the data sets") from None
    STATISTICS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
