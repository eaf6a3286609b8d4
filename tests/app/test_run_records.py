"""What a run writes for those who look at it: bounded, and of no consequence to what it learns."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from swirl.app.attempts import Attempt, State
from swirl.app.other_log_probs import log_probs_under
from swirl.app.run_folder import _cut_samples
from swirl.app.run_records import SampledGroup, compared_answers, has_samples, sampled_groups
from swirl.config import TrainConfig
from swirl.model.gemma import Gemma
from swirl.model.tokenizer import Tokenizer
from swirl.rollout.rollout import with_ids
from swirl.storage.digest import seal
from swirl.trajectories.record import Question, Step, Trajectory


def a_trajectory(name, task="bridge", outcome=True, steps=2):
    question = Question(id=name, task=task, question="Who?", answer="x")
    actions = (*(Step(action=f"step {k}", observation="found") for k in range(steps - 1)), Step(action="the last"))
    return Trajectory(id=name, question=question, prompt="Who?", steps=actions, stop="answer", outcome=outcome)


@pytest.mark.parametrize("updates", [1, 4, 29, 30, 61, 1000])
def test_samples_are_of_few_updates_the_first_and_the_last_among_them(updates):
    chosen = [update for update in range(1, updates + 1) if has_samples(update, updates)]
    assert chosen[0] == 1 and chosen[-1] == updates and len(chosen) <= 61
    assert updates > 30 or len(chosen) == updates


def test_groups_are_of_the_first_trees_and_a_masked_attempt_has_no_advantage():
    trajectories = [a_trajectory(str(i)) for i in range(5)]
    states = [State(tree, trajectory, k) for tree, trajectory in enumerate(trajectories) for k in range(2)]
    groups = [
        [Attempt(1.0, [(s, Step(action="a", reward=1.0))]), Attempt(None, [(s, Step(action="b"))])] for s in states
    ]
    made = sampled_groups(groups, np.array([[0.5, np.nan]] * 10), 7, whole=False)
    assert [(g.trajectory, g.k, g.trees) for g in made] == [("0", 0, 5), ("0", 1, 5), ("1", 0, 5), ("1", 1, 5)]
    assert made[0].advantages == (0.5, None) and made[0].update == 7
    assert msgspec.json.decode(msgspec.json.encode(made[0]), type=SampledGroup) == made[0]


def test_whole_trajectories_are_attempts_and_one_without_an_answer_is_left_out():
    played = a_trajectory("q")
    attempt = Attempt(1.0, [(State(0, played, k), step) for k, step in enumerate(played.steps)])
    (group,) = sampled_groups([[attempt, Attempt(None, [])]], np.array([[0.5, np.nan]]), 1, whole=True)
    assert group.trajectory is None and [len(steps) for steps in group.attempts] == [2] and group.advantages == (0.5,)
    assert sampled_groups([[Attempt(None, [])]], np.array([[np.nan]]), 1, whole=True) == []


def test_answers_that_changed_are_compared_first_and_ids_may_repeat_among_tasks():
    before = [a_trajectory(str(i), task) for task in ("bridge", "deep") for i in range(4)]
    after = [a_trajectory(str(i), task, outcome=i != 3) for task in ("bridge", "deep") for i in range(4)]
    chosen = compared_answers(before, [*after, a_trajectory("new")], 3)
    assert [(b.question.task, b.id) for b, _ in chosen] == [("bridge", "3"), ("deep", "3"), ("bridge", "0")]
    assert all((b.question.task, b.id) == (a.question.task, a.id) for b, a in chosen)
    before = [a_trajectory(str(i), outcome=i == 7) for i in range(8)]
    after = [a_trajectory(str(i), outcome=i != 7) for i in range(8)]  # seven mended, one broken
    assert [b.id for b, _ in compared_answers(before, after, 3)] == ["0", "7", "1"]


def test_log_probs_under_a_policy_are_those_of_one_pass_a_step(tiny_folder):
    import torch

    model, tokenizer = Gemma.from_pretrained(tiny_folder), Tokenizer.from_pretrained(tiny_folder)
    trajectories = [with_ids(a_trajectory(str(i), steps=i + 1), tokenizer) for i in range(3)]
    made = log_probs_under(model, trajectories, TrainConfig(tokens_per_micro_batch=64))
    for trajectory, steps in zip(trajectories, made, strict=True):
        assert len(steps) == len(trajectory.steps)
        for (state, action), got in zip(trajectory.sub_trajectories(), steps, strict=True):
            from swirl import pack

            with torch.no_grad():
                wanted = model.token_log_probs(pack([(state, action)]))
            torch.testing.assert_close(torch.tensor(got), wanted, atol=1.1e-4, rtol=0)


def test_samples_of_later_updates_and_half_lines_go_when_a_run_goes_on(tmp_path):
    lines = [seal(json.dumps({"update": update}).encode() + b"\n") for update in (1, 2, 3)]
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b"".join(lines) + b'{"update": 1, "ha')
    _cut_samples(path, 2)
    assert path.read_bytes() == b"".join(lines[:2])
    _cut_samples(path, 0)
    assert path.read_bytes() == b""
