"""Chains on other libraries' kernels: what they are handed, what is refused, and that updates stay the same.

The foreign kernels run on CUDA alone: tests/test_gpu_backends.py holds those. Here a plain torch function of the
same signature and meaning stands where they would be imported, so that the sequence bounds, windows, scales and
head padding swirl hands over are held against the reference, forward and backward.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from msgspec import structs

from swirl.config import TrainConfig
from swirl.errors import CheckpointError, ConfigError
from swirl.kernels import chain_attention as chains_of
from swirl.kernels.chain_attention import (
    Chains,
    ForkError,
    chain_attention,
    chain_attention_reference,
    chain_lengths,
    refusal,
)
from swirl.model.gemma import Gemma
from swirl.rollout.rollout import with_ids
from swirl.train import train
from swirl.trajectories.log import read_trajectories, write_trajectories
from swirl.tree.pack import pack, pack_chains, pack_micro_batches
from tests.kernels.chains import CONFIG, trajectories
from tests.kernels.test_triton import forest
from tests.learning.updates import accumulate, gradients, some_actions, sub_trajectory
from tests.process import run_module

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def attend(q, k, v, lengths, scale, softcap, first_key):
    """Each sequence alone, in torch: query i sees keys first_key(i)..i. q (T, Hq, D), k and v (T, Hkv, D)."""
    groups, outputs = q.shape[1] // k.shape[1], []
    for q_one, k_one, v_one in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        k_one, v_one = (x.repeat_interleave(groups, 1) for x in (k_one, v_one))
        i = torch.arange(len(q_one))
        scores = torch.einsum("ihd,jhd->hij", q_one, k_one) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        visible = (i[None] <= i[:, None]) & (i[None] >= first_key(i)[:, None])
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v_one))
    return torch.cat(outputs)


def flash_stand_in(calls):
    """A `flash_attn` whose one function has the arguments of 2.8.3, and writes down those it is called with."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        lengths = [stop - start for start, stop in pairwise(cu_seqlens_q.tolist())]
        assert max_seqlen_q == max_seqlen_k == max(lengths) and sum(lengths) == q.shape[0] == k.shape[0]
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.shape[2] in (32, 64, 128, 256)
        assert dropout_p == 0.0 and causal and deterministic and type(window_size[0]) is int
        left, right = window_size
        assert (left, right) == (-1, -1) or left >= 0 and right == 0
        calls.append({"bounds": cu_seqlens_q, "window_size": window_size, "softcap": softcap})
        first_key = torch.zeros_like if left < 0 else lambda i: i - left
        return attend(q, k, v, lengths, softmax_scale, softcap, first_key)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    return {"flash_attn": module}


def xformers_stand_in(calls):
    """An `xformers` with the block-diagonal causal mask and the function that takes it, as in 0.0.35."""

    @dataclass
    class BlockDiagonalCausalMask:
        lengths: list
        window: int | None = None

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert type(q_seqlen) is list and kv_seqlen is None and device is not None
            return cls(q_seqlen)

        def make_local_attention(self, window_size):
            assert self.window is None and window_size > 0
            return BlockDiagonalCausalMask(self.lengths, window_size)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert query.shape == key.shape == value.shape and query.shape[0] == 1 and p == 0.0 and op is None
        window = attn_bias.window
        calls.append({"lengths": attn_bias.lengths, "window": window})
        first_key = torch.zeros_like if window is None else lambda i: i - window + 1
        return attend(query[0], key[0], value[0], attn_bias.lengths, scale, None, first_key)[None]

    modules = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha")}
    fmha = modules["xformers.ops"].fmha = modules["xformers.ops.fmha"]
    fmha.memory_efficient_attention = memory_efficient_attention
    fmha.attn_bias = ModuleType("attn_bias")
    fmha.attn_bias.BlockDiagonalCausalMask = BlockDiagonalCausalMask
    return modules


@pytest.fixture
def calls(monkeypatch):
    """The stand-ins where the packages would be, on any device and dtype; the calls they got."""
    made = []
    for name, module in {**flash_stand_in(made), **xformers_stand_in(made)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(chains_of, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(chains_of, "DTYPES", (torch.float64, torch.float32, torch.bfloat16))
    return made


def loud(**changes):
    """Float64, with weights large enough that the softcap bites."""
    model = Gemma(replace(CONFIG, **changes)).init_weights(1).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10.0)
    return model


# What a batch is.


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 13, 63])
@pytest.mark.parametrize("seed", range(20))
def test_a_fork_is_a_token_of_two_children_and_nothing_else_is(T, seed):
    subtree_end, position_ids = forest(T, seed=100 * seed + T)
    parents = [max((j for j in range(i) if subtree_end[j] > i), default=None) for i in range(T)]
    forks = [i for i in range(T) if parents.count(i) > 1]
    if forks:
        with pytest.raises(ForkError) as raised:
            chain_lengths(subtree_end, position_ids)
        assert raised.value.token == forks[0]
    else:
        roots = [token for token in range(T) if position_ids[token] == 0]
        assert chain_lengths(subtree_end, position_ids) == tuple(b - a for a, b in pairwise([*roots, T]))


def test_positions_that_leap_are_no_chain():
    """There, a window by depth is no window by index."""
    with pytest.raises(ForkError, match="token 1"):
        chain_lengths(torch.tensor([3, 3, 3]), torch.tensor([0, 1, 7]))


def test_pairs_of_one_trajectory_are_a_chain_and_two_of_one_question_fork():
    one, other = trajectories()[::3][:2]
    batch = pack(one)
    assert chain_lengths(batch.subtree_end, batch.position_ids) == (len(one[-1][0] + one[-1][1]),)
    forked = pack(one + other)
    with pytest.raises(ForkError, match="token 5"):  # the prompt's last
        chain_lengths(forked.subtree_end, forked.position_ids)


# The kernels' arguments.


def case(lengths, heads, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T, (Hq, Hkv) = sum(lengths), heads
    shapes = [(T, h, D) for h in (Hq, Hkv, Hkv, Hq)]
    q, k, v, do = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in (4 * q, k, v)], do


@pytest.mark.parametrize("lengths", [(1,), (63,), (1, 1, 1), (5, 1, 17, 8), (64, 3)], ids=str)
@pytest.mark.parametrize(("heads", "D"), [((2, 2), 32), ((4, 2), 14), ((3, 1), 34)])
@pytest.mark.parametrize("window", [None, 1, 4, 17, 1000])
@pytest.mark.parametrize(("backend", "softcap"), [("flash", 3.0), ("flash", None), ("xformers", None)])
def test_forward_and_gradients_are_the_reference_s(backend, softcap, window, heads, D, lengths, calls):
    inputs, do = case(lengths, heads, D)
    chains = Chains(backend, lengths, CPU)
    options = {"scale": 0.3, "softcap": softcap, "window": window}
    ours = chain_attention(*inputs, chains, **options)
    truth = chain_attention_reference(*inputs, chains, **options)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    got, wanted = (torch.autograd.grad(o, inputs, do) for o in (ours, truth))
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    assert len(calls) == 1


def test_a_window_that_no_chain_outgrows_is_none(calls):
    inputs, _ = case((4, 9), (2, 1), 32)
    for window in (8, 9):
        chain_attention(*inputs, Chains("flash", (4, 9), CPU), scale=0.3, window=window)
        chain_attention(*inputs, Chains("xformers", (4, 9), CPU), scale=0.3, window=window)
    assert [call.get("window_size", call.get("window")) for call in calls] == [(7, 0), 8, (-1, -1), None]


def test_bad_shapes_are_refused(calls):
    ((q, k, v), _), chains = case((4, 9), (2, 1), 32), Chains("flash", (4, 9), CPU)
    for wrong in ((q, k, v[1:]), (q[1:], k[1:], v[1:]), (q, k[..., :16], v[..., :16])):
        with pytest.raises(ValueError, match="do not fit"):
            chain_attention(*wrong, chains, scale=1.0)
    for options in ({"window": 0}, {"softcap": -1.0}):
        with pytest.raises(ValueError, match="must be positive"):
            chain_attention(q, k, v, chains, scale=1.0, **options)
    assert not calls


# The model.


@pytest.mark.parametrize("recompute", ["none", "layers"])
@pytest.mark.parametrize(("backend", "softcap"), [("flash", 50.0), ("xformers", None)])
def test_a_model_s_log_probs_and_gradients_are_those_of_the_tree(backend, softcap, recompute, calls):
    ours, tree = (loud(attn_logit_softcapping=softcap) for _ in range(2))
    ours.use_attention(backend).activation_checkpointing = recompute
    ((batch, _),) = pack_chains(trajectories(), 10_000)
    weights = torch.linspace(-1, 1, batch.num_action_tokens, dtype=torch.float64)
    for model in (ours, tree):
        log_probs = model.token_log_probs(batch)
        (log_probs * weights).sum().backward()
        model.made = log_probs.detach()
    torch.testing.assert_close(ours.made, tree.made, rtol=1e-10, atol=1e-12)
    for (name, x), y in zip(ours.named_parameters(), tree.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-10 * y.grad.abs().max().item(), msg=name)
    assert len(calls) == 3 * (1 + (recompute == "layers"))
    if backend == "flash":
        assert len({id(call["bounds"]) for call in calls}) == 1, "made once for all layers"
        assert [call["window_size"] for call in calls[:3]] == [(4, 0), (-1, -1), (4, 0)]
    else:
        assert [call["window"] for call in calls[:3]] == [5, None, 5]


def test_any_batch_without_forks_will_do_and_one_with_a_fork_is_refused(calls):
    model, (one, other) = loud().use_attention("flash"), trajectories()[::3][:2]
    batch = pack(one)
    assert batch.chain_lengths is None
    torch.testing.assert_close(model.token_log_probs(batch), loud().token_log_probs(batch), rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigError, match="^attention 'flash' computes chains alone, .* forks at token 5: use"):
        model.token_log_probs(pack(one + other))


def test_sampling_takes_the_tree_whatever_an_update_takes(calls):
    from swirl.sampling.engine import Engine

    states, settings = [[1, 2, 3], [1, 2, 4], [1, 2, 3]], {"seeds": [1, 2, 3], "max_new_tokens": 6}
    drawn = [Engine(model.float()).sample(states, **settings) for model in (loud().use_attention("flash"), loud())]
    assert drawn[0] == drawn[1] and not calls


# Packing without sharing.


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_chains_are_packed_whole_once_each_and_predict_what_the_tree_does(seed, budget, caplog):
    all_of_them = trajectories(seed)
    pairs = [pair for one in all_of_them for pair in one]
    made = pack_chains(all_of_them, budget)
    assert sorted(np.concatenate([indices for _, indices in made]).tolist()) == list(range(len(pairs)))
    longest = [len(one[-1][0] + one[-1][1]) for one in all_of_them]
    assert sorted(n for batch, _ in made for n in batch.chain_lengths) == sorted(longest)
    model = loud()
    tree = model.sub_trajectory_log_probs(pack(pairs))
    for batch, indices in made:
        assert indices.tolist() == sorted(indices)
        assert chain_lengths(batch.subtree_end, batch.position_ids) == batch.chain_lengths
        assert batch.num_tokens <= budget or len(batch.chain_lengths) == 1
        assert batch.num_separate_tokens == sum(len(pairs[i][0] + pairs[i][1]) for i in indices)
        moved = batch.to("cpu")
        assert moved.chain_lengths == batch.chain_lengths
        torch.testing.assert_close(model.sub_trajectory_log_probs(moved), tree[indices], rtol=1e-10, atol=1e-12)
    assert ("each goes alone" in caplog.text) == (max(longest) > budget)


def test_few_micro_batches_and_none_of_none():
    chains = [[([i], [0] * (length - 1))] for i, length in enumerate((60, 50, 40, 50))]
    assert [batch.chain_lengths for batch, _ in pack_chains(chains, 100)] == [(60, 40), (50, 50)]
    assert pack_chains([], 100) == []
    with pytest.raises(ValueError, match="at least 1"):
        pack_chains(chains, 0)
    with pytest.raises(ValueError, match="trajectory 1: expected at least one"):
        pack_chains([chains[0], []], 100)


def test_a_trajectory_that_is_no_chain_is_named():
    fork, two_roots = [([1, 2], [3]), ([1, 2], [4])], [([1, 2], [3]), ([2, 2], [3])]
    with pytest.raises(ForkError, match="trajectory 1 forks at token 1"):
        pack_chains([[([1], [2] * 9)], fork], 100)
    with pytest.raises(ForkError, match="trajectory 2 forks at token 0"):
        pack_chains([[([1], [2])], [([1], [2])], two_roots], 100)


# Updates.


def recorded_actions(seed=0):
    rng = np.random.default_rng(seed)
    return [
        sub_trajectory(tree, state, action, float(rng.normal()), tuple((-rng.random(len(action))).tolist()))
        for tree, pairs in enumerate(trajectories(seed))
        for state, action in pairs
    ]


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_an_update_on_chains_is_the_update_on_the_tree(tokens, packed, kl, calls):
    """In float64, whatever the config says, so that the two can be held together closely."""
    actions, settings = recorded_actions(), {"kl_coefficient": kl, "dtype": "bfloat16"}
    actions[2] = replace(actions[2], advantage=float("nan"))
    actions[5] = replace(actions[5], advantage=0.0)
    tree, ours = loud(), loud().use_attention("flash")
    a = accumulate(ours, actions, attention="flash", packed=packed, tokens_per_micro_batch=tokens, **settings)
    b = accumulate(tree, actions, **settings)
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
    assert ("kl" in a) == ("kl" in b) == (kl > 0)
    assert a.get("kl", 0.0) == pytest.approx(b.get("kl", 0.0), abs=1e-12)
    assert b["computed_tokens"] <= a["computed_tokens"] <= a["tokens"] == b["tokens"]
    for name, grad in gradients(tree).items():
        torch.testing.assert_close(gradients(ours)[name], grad, rtol=1e-9, atol=1e-12)
    assert calls


def test_sampled_actions_are_refused_when_they_reach_the_update_too(calls):
    model = loud().use_attention("flash")
    with pytest.raises(ConfigError, match="^--attention flash: trajectory 0 forks at token .*--attention tree$"):
        accumulate(model, some_actions(), attention="flash", dtype="bfloat16")


# Refusals, each one line.


def test_what_a_backend_cannot_compute_is_said(monkeypatch):
    fits = {"head_dim": 256, "softcap": 50.0, "dtype": torch.bfloat16, "device": torch.device("cuda")}
    assert "expected tree, flash or xformers" in refusal("flex", **fits)
    assert "CUDA device, not cpu" in refusal("flash", **fits | {"device": CPU})
    assert "not in float32" in refusal("flash", **fits | {"dtype": torch.float32})
    assert "at most 256, not 288" in refusal("xformers", **fits | {"head_dim": 288})
    assert "no softcap" in refusal("xformers", **fits)
    monkeypatch.setattr(chains_of, "DEVICE_TYPE", "cpu")
    for backend, package in (("flash", "flash_attn"), ("xformers", "xformers.ops")):
        monkeypatch.setitem(sys.modules, package, None)  # as if not installed
        reason = refusal(backend, **fits | {"device": CPU, "softcap": None})
        assert reason.startswith("cannot be imported") and f"pip install 'swirl[{backend}]'" in reason
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # flash-attn-4 alone shares the name
    assert "cannot be imported" in refusal("flash", **fits | {"device": CPU})


def test_a_model_is_refused_before_its_weights_are_read(tmp_path):
    loud().save_pretrained(folder := tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        Gemma.from_pretrained(folder)
    for backend, dtype, said in (("flash", torch.bfloat16, "CUDA"), ("flex", torch.bfloat16, "expected tree")):
        with pytest.raises(ConfigError, match=said) as raised:
            Gemma.from_pretrained(folder, dtype, attention=backend)
        assert "\n" not in str(raised.value)


def test_a_model_says_what_it_cannot_take_and_keeps_what_it_had(calls, tmp_path):
    model, folder = loud(), tmp_path / "model"
    with pytest.raises(ConfigError, match="^attention 'xformers' has no softcap, and .* one of 50$"):
        model.use_attention("xformers")
    assert model.attention == "tree"
    model.save_pretrained(folder)
    assert Gemma.from_pretrained(folder, torch.float64, attention="flash").attention == "flash"


def test_a_model_moved_to_where_it_cannot_be_computed_is_refused(calls, monkeypatch):
    model = loud().use_attention("flash")
    monkeypatch.setattr(chains_of, "DTYPES", (torch.bfloat16,))
    with pytest.raises(ConfigError, match="not in float64"):
        model.token_log_probs(pack(trajectories()[0]))


@pytest.mark.parametrize("backend", ["flash", "xformers"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "sampled", "dtype": "bfloat16"}, "--mode recorded .or --no-packed. beside it"),
        ({"mode": "recorded", "dtype": "float32"}, "--dtype bfloat16 beside it"),
        ({"mode": "recorded", "dtype": "bfloat16", "device": "cpu"}, "tree on a CPU"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_itself(backend, settings, said):
    with pytest.raises(ConfigError, match=f"^--attention {backend}: expected {said}"):
        TrainConfig(attention=backend, **settings)
    TrainConfig(attention=backend, dtype="bfloat16", mode="recorded")
    TrainConfig(attention=backend, dtype="bfloat16", mode="sampled", packed=False)


def test_actions_that_turn_out_sampled_are_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="sampled actions"):
        train(TrainConfig(attention="flash", dtype="bfloat16", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def command(*flags, cwd):
    return run_module("swirl.train", *flags, cwd=cwd, CUDA_VISIBLE_DEVICES="")


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path):
    done = command("--attention", "flash", "--dtype", "bfloat16", "--mode", "sampled", cwd=tmp_path)
    assert done.returncode == 2 and "--attention flash" in done.stderr
    settings = {"attention": "flash", "dtype": "bfloat16", "mode": "recorded", "reward": "outcome"}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    done = command("--config", "c.json", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("\nerror: attention 'flash' needs a CUDA device, not cpu\n")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# The whole command, on real questions with several trajectories each.


def sampled_gsm8k(path, source, limit):
    """Each question's annotated trajectory, rewarded, and a second one that answers otherwise: they fork."""
    from swirl.tasks import gsm8k

    made = []
    for t in list(gsm8k.records(source))[:limit]:
        good = tuple(structs.replace(step, reward=1.0) for step in t.steps)
        wrong = structs.replace(good[-1], action=good[-1].action.replace("</answer>", "1</answer>") + " ", reward=0.0)
        other = structs.replace(t, id=f"{t.id}-b", sample=1, steps=(*good[:-1], wrong))
        made += [structs.replace(t, steps=good), other]
    write_trajectories(path, made)
    return path


SOURCES = [ROOT / "tests" / "fixtures" / "gsm8k.jsonl", ROOT.parent / "shared" / "data" / "gsm8k" / "train.jsonl"]


@pytest.mark.parametrize(
    "source", [SOURCES[0], pytest.param(SOURCES[1], marks=pytest.mark.slow)], ids=["fixture", "train"]
)
def test_training_on_several_trajectories_a_question_is_what_it_is_on_the_tree(source, calls, tmp_path):
    if not source.exists():
        pytest.skip("the data is not here")
    data = sampled_gsm8k(tmp_path / "g.jsonl", source, limit=3)
    history = {}
    for attention in ("tree", "flash"):
        config = TrainConfig(
            out=(out := tmp_path / attention), data=data, mode="recorded", updates=2, evaluate_on=(),
            trajectories_per_update=6, tokens_per_micro_batch=700, dtype="bfloat16", attention=attention,
        )  # fmt: skip
        train(config)
        assert json.loads((out / "config.json").read_text())["attention"] == attention
        history[attention] = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert bool(calls) == (attention == "flash")
    for ours, tree in zip(history["flash"], history["tree"], strict=True):
        assert ours["tokens"] == tree["tokens"] and ours["computed_tokens"] >= tree["computed_tokens"]
        assert ours["loss"] == pytest.approx(tree["loss"], rel=2e-2, abs=2e-2)  # bfloat16
        assert ours["grad_norm"] == pytest.approx(tree["grad_norm"], rel=5e-2)


def test_trajectories_made_from_text_are_chains(tmp_path):
    from swirl.app.resolve import load_model

    _, tokenizer = load_model("almanac")
    data = sampled_gsm8k(tmp_path / "g.jsonl", SOURCES[0], limit=6)
    made = [with_ids(t, tokenizer) for t in read_trajectories(data)]
    assert all(t.retokenized for t in made)
    pairs = [[(t.state_ids(k), step.action_ids) for k, step in enumerate(t.steps)] for t in made]
    (batch, _), *more = pack_chains(pairs, 100_000)
    assert len(batch.chain_lengths) == len(made) and not more
    merged = [pair for one in pairs for pair in one]
    assert sum(b.num_tokens for b, _ in pack_micro_batches(merged, 100_000)) < batch.num_tokens
