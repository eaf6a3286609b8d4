"""The packed tree: every field by its definition, and the contract: packed equals separate, gradients too."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swirl.kernels import cpu
from swirl.model.config import GEMMA3, GemmaConfig
from swirl.model.gemma import Gemma
from swirl.tree.batch import PackedBatch
from swirl.tree.pack import pack, pack_flat, pack_micro_batches, separate

TENSORS = ("input_ids", "position_ids", "subtree_end", "source_rows", "target_ids", "sub_trajectory")
VOCABULARY = 4  # of the forests; the model's is twice that, so that fresh tokens remain


@st.composite
def forests(draw, max_pairs=8, max_tail=5):
    """Pairs over few letters that often continue, repeat or cut short an earlier one, at any token."""
    pairs = []
    for _ in range(draw(st.integers(1, max_pairs))):
        state_ids, action_ids = draw(st.sampled_from(pairs)) if pairs else ([], [])
        kept = draw(st.integers(0, len(state_ids) + len(action_ids)))
        tail = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=max_tail))
        ids = (state_ids + action_ids)[:kept] + tail
        ids += [0] * (2 - len(ids))
        cut = draw(st.integers(1, len(ids) - 1))
        pairs.append((ids[:cut], ids[cut:]))
    return pairs


FORK_IN_ACTION = [([0, 1], [2, 3, 0]), ([0, 1], [2, 3, 1]), ([0, 1, 2], [0]), ([0], [1, 2])]
CHAIN = [([0, 1], [2, 3]), ([0, 1, 2, 3, 0], [1, 1]), ([0, 1, 2, 3, 0, 1, 1, 2], [3])]
DUPLICATES = [([1, 2], [3]), ([1, 2], [3]), ([1], [2, 3])]


def definition(pairs):
    """The six fields from a dictionary of prefixes, straight from the table in docs/structure.md."""
    children = {(): {}}
    for state_ids, action_ids in pairs:
        ids = (*state_ids, *action_ids)
        for n in range(len(ids)):
            children[ids[:n]][ids[: n + 1]] = None  # a dict keeps the order of first appearance
            children.setdefault(ids[: n + 1], {})
    prefixes = []

    def visit(prefix):
        for child in children[prefix]:
            prefixes.append(child)
            visit(child)

    visit(())
    index = {prefix: i for i, prefix in enumerate(prefixes)}
    rows = []
    for s, (state_ids, action_ids) in enumerate(pairs):
        ids = (*state_ids, *action_ids)
        rows += [(index[ids[:n]], ids[n], s) for n in range(len(state_ids), len(ids))]
    return {
        "input_ids": [prefix[-1] for prefix in prefixes],
        "position_ids": [len(prefix) - 1 for prefix in prefixes],
        "subtree_end": [
            1 + max(i for i, other in enumerate(prefixes) if other[: len(prefix)] == prefix) for prefix in prefixes
        ],
        "source_rows": [row[0] for row in rows],
        "target_ids": [row[1] for row in rows],
        "sub_trajectory": [row[2] for row in rows],
    }


def assert_same(batch, other):
    for field in fields(PackedBatch):
        a, b = getattr(batch, field.name), getattr(other, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


@given(forests())
@settings(max_examples=300, deadline=None)
def test_fields_are_those_of_the_definition(pairs):
    batch = pack(pairs)
    for name, values in definition(pairs).items():
        assert getattr(batch, name).tolist() == values, name
        expected = torch.int32 if name in ("position_ids", "subtree_end") else torch.int64
        assert getattr(batch, name).dtype == expected, name
    assert batch.num_sub_trajectories == len(pairs)
    assert batch.num_tokens == batch.input_ids.numel()
    assert batch.num_action_tokens == sum(len(action_ids) for _, action_ids in pairs)
    assert batch.num_separate_tokens == sum(len(ids) for pair in pairs for ids in pair)
    assert batch.token_ratio == batch.num_separate_tokens / batch.num_tokens


@given(forests())
@settings(max_examples=100, deadline=None)
def test_mask_shows_each_token_its_own_prefix(pairs):
    batch = pack(pairs)
    end, ids = batch.subtree_end.tolist(), batch.input_ids.tolist()
    seen = [[j for j in range(i + 1) if i < end[j]] for i in range(batch.num_tokens)]
    assert [[ids[j] for j in seen[row]] for row in batch.source_rows] == [
        (state_ids + action_ids)[:n]
        for state_ids, action_ids in pairs
        for n in range(len(state_ids), len(state_ids) + len(action_ids))
    ]
    assert [len(js) - 1 for js in seen] == batch.position_ids.tolist()


def test_one_source_row_serves_all_targets_of_a_fork():
    batch = pack(FORK_IN_ACTION)
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert batch.subtree_end.tolist() == [7, 7, 7, 6, 5, 6, 7]
    assert batch.source_rows.tolist() == [1, 2, 3, 1, 2, 3, 2, 0, 1]
    assert batch.target_ids.tolist() == [2, 3, 0, 2, 3, 1, 0, 1, 2]
    assert pack(DUPLICATES).num_tokens == 3
    assert pack(DUPLICATES).sub_trajectory.tolist() == [0, 1, 2, 2]


def test_long_chains_and_wide_roots():
    ids = list(range(3000))
    chain = pack([(ids[:n], ids[n : n + 3]) for n in range(1, 2900, 7)])
    assert chain.input_ids.tolist() == ids[: chain.num_tokens]
    assert set(chain.subtree_end.tolist()) == {chain.num_tokens}
    roots = pack([([n], [0]) for n in range(30_000)] + [([5, 0], [1])])
    assert roots.num_tokens == 60_001
    assert roots.position_ids.tolist() == [0, 1] * 5 + [0, 1, 2] + [0, 1] * 29_994


def test_lists_tuples_arrays_and_tensors_pack_alike():
    pairs = FORK_IN_ACTION + CHAIN
    expected = pack(pairs)
    kinds = [list, tuple, np.array, torch.tensor, lambda ids: np.array(ids, np.uint64)]
    kinds += [lambda ids: torch.tensor(ids, dtype=torch.int32), lambda ids: np.repeat(ids, 2)[::2]]
    for kind in kinds:
        assert_same(pack([(kind(state_ids), kind(action_ids)) for state_ids, action_ids in pairs]), expected)
    mixed = [(kinds[i % 7](pair[0]), kinds[(i + 3) % 7](pair[1])) for i, pair in enumerate(pairs)]
    assert_same(pack(pair for pair in mixed), expected)
    ids = np.concatenate([np.array(state_ids + action_ids) for state_ids, action_ids in pairs])
    lengths = [len(state_ids) + len(action_ids) for state_ids, action_ids in pairs]
    flat = pack_flat(ids, np.cumsum([0, *lengths]), np.array([len(state_ids) for state_ids, _ in pairs]))
    assert_same(flat, expected)


def test_what_is_given_is_not_written_to_nor_held():
    ids = np.arange(5, dtype=np.int32)
    batch = pack_flat(ids, np.array([0, 5]), np.array([2]))
    batch.input_ids.zero_(), batch.target_ids.zero_()
    assert ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "pair, complaint",
    [
        (([], [1]), "at least one state token"),
        (([1], []), "at least one action token"),
        (([1, -1], [1]), r"state ids in \[0, 2147483647\]"),
        (([1], [2**31]), r"ids in \[0, 2147483647\]"),
        (([1], [2**40]), r"action ids in \[0, 2147483647\]"),
        (([1], np.array([2**32])), r"ids in \[0, 2147483647\]"),
        ((np.array([2**63 + 1], np.uint64), [1]), r"ids in \[0, 2147483647\]"),
        ((torch.tensor([-3]), [1]), r"ids in \[0, 2147483647\]"),
        (([1.0], [1]), "state as a flat sequence of integer token ids"),
        (([1], np.array([1.5])), "action as a flat sequence of integer token ids"),
        (([1], torch.tensor([True])), "action as a flat sequence"),
        (([1], [[1, 2]]), "action as a flat sequence"),
        ((np.ones((2, 2), int), [1]), "state as a flat sequence"),
        ((torch.tensor(1), [1]), "state as a flat sequence"),
        (("ab", [1]), "state as a flat sequence"),
        ((None, [1]), "state as a flat sequence"),
        (([1], [None]), "action as a flat sequence"),
        (([1],), r"a pair \(state_ids, action_ids\)"),
        (7, r"a pair \(state_ids, action_ids\)"),
    ],
)
def test_bad_pairs_are_refused_by_number(pair, complaint):
    good = ([1, 2], [3])
    for call in pack, separate, lambda pairs: pack_micro_batches(pairs, 100):
        with pytest.raises(ValueError, match=f"^sub-trajectory 2: expected.*{complaint}"):
            call([good, good, pair, good])


def test_nothing_to_pack_and_flat_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one sub-trajectory"):
        pack([])
    with pytest.raises(ValueError, match="tokens_per_micro_batch must be at least 1, got 0"):
        pack_micro_batches(CHAIN, 0)
    assert pack_micro_batches([], 10) == []
    ids = np.arange(6)
    with pytest.raises(ValueError, match="sub-trajectory 1: expected at least one action token"):
        pack_flat(ids, np.array([0, 3, 6]), np.array([1, 3]))
    unfit = [([0, 3], [1]), ([1, 6], [1]), ([0, 6], [1, 1]), ([0], []), ([0, 9, 6], [1, 1])]
    for offsets, state_lengths in unfit:
        with pytest.raises(ValueError):
            pack_flat(ids, np.array(offsets), np.array(state_lengths, int))
    with pytest.raises(ValueError, match="flat integer arrays"):
        pack_flat(ids.astype(float), np.array([0, 6]), np.array([1]))


def test_to_moves_every_tensor_and_nothing_else():
    batch = pack(CHAIN)
    moved = batch.to("meta")
    for name in TENSORS:
        assert getattr(moved, name).is_meta and getattr(moved, name).shape == getattr(batch, name).shape
        assert not getattr(batch, name).is_meta
    assert moved.num_sub_trajectories == 3 and moved.num_separate_tokens == batch.num_separate_tokens
    assert_same(batch.to("cpu"), batch)


# Micro-batches.


def depth_first(pairs):
    """The pairs' numbers in depth-first order of their forest, equal ones in the order given."""
    batch, index, prefix = definition(pairs), {}, ()
    for token, depth in zip(batch["input_ids"], batch["position_ids"], strict=True):
        prefix = (*prefix[:depth], token)
        index[prefix] = len(index)
    return sorted(range(len(pairs)), key=lambda s: index[(*pairs[s][0], *pairs[s][1])])


@given(forests(), st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_micro_batches_keep_the_limit_and_repeat_as_little_as_can_be(pairs, limit):
    parts = pack_micro_batches(pairs, limit)
    lengths = [len(state_ids) + len(action_ids) for state_ids, action_ids in pairs]
    assert sorted(np.concatenate([indices for _, indices in parts]).tolist()) == list(range(len(pairs)))
    for batch, indices in parts:
        assert (np.diff(indices) > 0).all()
        assert_same(batch, pack([pairs[s] for s in indices]))

    def fits(run):
        num_tokens = len(definition([pairs[s] for s in run])["input_ids"])
        return num_tokens <= limit or min(lengths[s] for s in run) > limit and num_tokens <= max(lengths)

    order = depth_first(pairs)
    possible = []
    for num_cuts in range(len(pairs)):
        for cuts in combinations(range(1, len(pairs)), num_cuts):
            runs = [order[a:b] for a, b in zip((0, *cuts), (*cuts, len(pairs)), strict=True)]
            if all(fits(run) for run in runs):
                num_tokens = sum(len(definition([pairs[s] for s in run])["input_ids"]) for run in runs)
                possible.append((num_tokens, len(runs)))
    assert all(fits(indices) for _, indices in parts)
    assert (sum(batch.num_tokens for batch, _ in parts), len(parts)) == min(possible)


def test_trees_that_fit_stay_whole_though_all_share_their_first_token():
    trees = [[([0, t, t, t], [g, t + 1]) for g in range(4)] for t in range(1, 6)]  # 12 tokens a tree
    pairs = [pairs[g] for g in range(4) for pairs in trees]  # dealt out of order
    parts = pack_micro_batches(pairs, 25)
    assert [len(indices) for _, indices in parts] == [8, 8, 4] or [len(i) for _, i in parts] == [4, 8, 8]
    for batch, indices in parts:
        assert batch.num_tokens <= 25
        assert len({pairs[s][0][1] for s in indices}) * 4 == len(indices)


def test_the_log_tells_what_is_repeated_and_what_exceeds_the_limit(caplog):
    pairs = [([0, 1, 2], [n, n]) for n in range(6)] + [(list(range(10, 40)), [1, 2])]
    with caplog.at_level(logging.INFO, "swirl.tree.pack"):
        parts = pack_micro_batches(pairs, 9)
    assert [indices.tolist() for _, indices in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "1 sub-trajectories exceed tokens_per_micro_batch = 9 (number 6 has 32)" in caplog.text
    assert "3 micro-batches: 47 packed tokens, and 3 repeated at cuts" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "swirl.tree.pack"):
        assert len(pack_micro_batches(pairs, 47)) == 1
    assert not caplog.records


def test_a_trunk_beyond_the_limit_is_not_read_once_a_step():
    ids = list(range(1000))
    chain = [(ids[: 20 * n], ids[20 * n : 20 * n + 5]) for n in range(1, 50)]
    parts = pack_micro_batches(chain, 300)
    assert [batch.num_tokens for batch, _ in parts] == [285, 985]
    assert parts[0][1].tolist() == list(range(14))


# The contract, on the model itself. C++ serves the CPU where it is built; both paths are held to it.


@pytest.fixture(params=["reference", "default"], scope="module")
def attention_path(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "reference":
            patch.setattr(cpu, "supports", lambda q: False)
        yield request.param


def small_gemma(*, window=3, softcap=True, heads=(4, 2), third=False, dtype=torch.float64):
    """Of the third generation: QK-norm, two thirds of the layers windowed, angles of their own, those scaled."""
    shape = dict(
        vocab_size=2 * VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3 if third else 2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=window,
        attn_logit_softcapping=2.0 if softcap else None,
        final_logit_softcapping=3.0 if softcap else None,
    )
    angles = dict(sliding_window_pattern=3, rope_theta=50.0, rope_factor=2.0)
    model = Gemma(GemmaConfig(**GEMMA3 | shape | angles if third else shape)).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.to(dtype)


def alone(state_ids, action_ids):
    """A plain sequence as a batch, made without `pack`."""
    ids = torch.tensor([*state_ids, *action_ids])
    n, T = len(state_ids), ids.numel()
    return PackedBatch(
        input_ids=ids,
        position_ids=torch.arange(T, dtype=torch.int32),
        subtree_end=torch.full((T,), T, dtype=torch.int32),
        source_rows=torch.arange(n - 1, T - 1),
        target_ids=ids[n:],
        sub_trajectory=torch.zeros(T - n, dtype=torch.int64),
        num_sub_trajectories=1,
        num_separate_tokens=T,
    )


def log_probs_and_gradients(model, batches):
    """Log-probs of all batches in a row, and the gradients of a random weighting of them."""
    model.zero_grad(set_to_none=True)
    log_probs = torch.cat([model.token_log_probs(batch) for batch in batches])
    weights = torch.randn(log_probs.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (log_probs * weights.to(log_probs.dtype)).sum().backward()
    return log_probs.detach(), [parameter.grad for parameter in model.parameters()]


def assert_close(found, expected, tolerance):
    """Log-probs one by one, gradients by parameter; one that all but vanishes, by 1/1000 of the largest."""
    (log_probs, gradients), (true_log_probs, true_gradients) = found, expected
    assert ((log_probs - true_log_probs).abs() <= tolerance * true_log_probs.abs()).all()
    floor = 1e-3 * max(gradient.abs().max() for gradient in true_gradients)
    for gradient, truth in zip(gradients, true_gradients, strict=True):
        assert (gradient - truth).abs().max() <= tolerance * max(truth.abs().max(), floor)


MODELS = [
    {"window": 3, "softcap": True, "heads": (4, 2)},
    {"window": 1, "softcap": False, "heads": (3, 1)},
    {"window": 100, "softcap": True, "heads": (2, 2)},
    {"window": 2, "softcap": True, "heads": (1, 1)},
    {"window": 3, "softcap": False, "heads": (4, 2), "third": True},
    {"window": 1, "softcap": False, "heads": (3, 1), "third": True},
]


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_packed_equals_separate_in_float64(options, attention_path):
    model = small_gemma(**options)

    @given(forests(max_tail=9))
    @settings(max_examples=25, deadline=None)
    def holds(pairs):
        separately = log_probs_and_gradients(model, [alone(*pair) for pair in pairs])
        assert_close(log_probs_and_gradients(model, [pack(pairs)]), separately, 1e-10)

    holds()
    for pairs in FORK_IN_ACTION, CHAIN, DUPLICATES, FORK_IN_ACTION + CHAIN + DUPLICATES:
        separately = log_probs_and_gradients(model, [alone(*pair) for pair in pairs])
        assert_close(log_probs_and_gradients(model, [pack(pairs)]), separately, 1e-10)


def random_forest(seed, num_trees=3, num_states=3, num_samples=3, length=7):
    """Combs: a trunk of recorded steps, and at each state sampled actions besides."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_trees):
        state_ids = draw.integers(0, VOCABULARY, 2 * length).tolist()
        for _ in range(num_states):
            actions = [draw.integers(0, VOCABULARY, length).tolist() for _ in range(num_samples)]
            pairs += [(state_ids, action_ids) for action_ids in actions]
            state_ids = state_ids + actions[0] + draw.integers(0, VOCABULARY, length).tolist()
    return pairs


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_packed_equals_separate_in_float32(options, attention_path):
    model = small_gemma(**options, dtype=torch.float32)
    for seed in range(3):
        pairs = random_forest(seed)
        separately = log_probs_and_gradients(model, [alone(*pair) for pair in pairs])
        assert_close(log_probs_and_gradients(model, [pack(pairs)]), separately, 1e-5)


@pytest.mark.parametrize(
    "attention_path", ["default", pytest.param("reference", marks=pytest.mark.slow)], indirect=True, scope="module"
)
def test_packed_bfloat16_is_as_near_to_the_truth_as_separate_passes(attention_path):
    pairs = [pair for seed in range(10) for pair in random_forest(seed)]
    model = small_gemma(dtype=torch.bfloat16)
    found = log_probs_and_gradients(model, [pack(pairs)])
    separately = log_probs_and_gradients(model, [alone(*pair) for pair in pairs])
    truth = log_probs_and_gradients(model.to(torch.float32), [alone(*pair) for pair in pairs])

    def error(result):
        log_prob_error = (result[0] - truth[0]).square().mean().sqrt()
        squares = [(a.float() - b).square().sum() / b.square().sum() for a, b in zip(result[1], truth[1])]
        return log_prob_error, torch.stack(squares).mean().sqrt()

    for packed_error, separate_error in zip(error(found), error(separately), strict=True):
        assert packed_error <= 1.02 * separate_error


@given(forests(), st.integers(4, 30))
@settings(max_examples=25, deadline=None)
def test_separate_and_micro_batches_compute_the_same(pairs, limit):
    model = small_gemma()
    whole, gradients = log_probs_and_gradients(model, [pack(pairs)])
    for batch, pair in zip(separate(pairs), pairs, strict=True):
        assert_same(batch, alone(*pair))
    belongs = pack(pairs).sub_trajectory
    for batch, indices in pack_micro_batches(pairs, limit):
        mine = torch.isin(belongs, torch.from_numpy(indices))
        assert (model.token_log_probs(batch) - whole[mine]).abs().max() <= 1e-10
    sums = [model.sub_trajectory_log_probs(batch) for batch in separate(pairs)]
    assert (model.sub_trajectory_log_probs(pack(pairs)) - torch.cat(sums)).abs().max() <= 1e-10


def num_shared(pairs, s):
    """How many first tokens pair s has in common with any other."""
    ids = pairs[s][0] + pairs[s][1]
    others = [other[0] + other[1] for t, other in enumerate(pairs) if t != s]
    return max(n for n in range(len(ids) + 1) if n == 0 or ids[:n] in [other[:n] for other in others])


def rewritten(pairs, s, first):
    """The pairs with tokens `first`.. of pair s replaced by letters no other has."""
    state_ids, action_ids = pairs[s]
    ids = state_ids + action_ids
    ids = ids[:first] + [VOCABULARY + token for token in ids[first:]]
    return [*pairs[:s], (ids[: len(state_ids)], ids[len(state_ids) :]), *pairs[s + 1 :]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_new_tokens_in_one_leave_the_others_bitwise(dtype, attention_path):
    """Where what is shared stays shared. Otherwise the tree changes its shape, and products their order."""
    model = small_gemma(dtype=dtype)

    @given(forests(max_tail=9), st.data())
    @settings(max_examples=25, deadline=None)
    def holds(pairs, data):
        shared_tokens = [num_shared(pairs, s) for s in range(len(pairs))]
        own = [s for s, pair in enumerate(pairs) if shared_tokens[s] < len(pair[0] + pair[1])]
        assume(own)
        s = data.draw(st.sampled_from(own))
        before, changed = pack(pairs), pack(rewritten(pairs, s, shared_tokens[s]))
        assert torch.equal(before.subtree_end, changed.subtree_end)
        with torch.no_grad():
            log_probs, new_log_probs = model.token_log_probs(before), model.token_log_probs(changed)
        elsewhere = before.sub_trajectory != s
        assert torch.equal(log_probs[elsewhere], new_log_probs[elsewhere])

    holds()


@given(forests(), st.data())
@settings(max_examples=25, deadline=None)
def test_new_tokens_that_end_the_sharing_leave_the_others_to_rounding(pairs, data):
    model = small_gemma()
    s = data.draw(st.integers(0, len(pairs) - 1))
    elsewhere = pack(pairs).sub_trajectory != s
    with torch.no_grad():
        log_probs = model.token_log_probs(pack(pairs))
        new_log_probs = model.token_log_probs(pack(rewritten(pairs, s, 0)))
    assert ((log_probs - new_log_probs)[elsewhere].abs() <= 1e-10 * log_probs[elsewhere].abs()).all()


def test_a_target_has_no_part_in_its_own_log_prob_elsewhere():
    """A boundary token is predicted from the row before it, in all branches of a fork alike."""
    model = small_gemma()
    batch = pack([([0, 1], [2]), ([0, 1], [3]), ([0, 1], [5])])
    log_probs = model.token_log_probs(batch)
    assert batch.source_rows.tolist() == [1, 1, 1]
    everything = replace(
        batch,
        source_rows=torch.full((2 * VOCABULARY,), 1),
        target_ids=torch.arange(2 * VOCABULARY),
        sub_trajectory=torch.zeros(2 * VOCABULARY, dtype=torch.int64),
    )
    distribution = model.token_log_probs(everything)
    assert abs(distribution.exp().sum().item() - 1) < 1e-12
    assert torch.equal(distribution[[2, 3, 5]], log_probs)
