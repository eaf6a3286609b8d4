"""What is in flight together: prefixes found again, rows that end and join, the memory's bound, and many who await."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from swirl import Gemma
from swirl.app.resolve import load_model
from swirl.errors import ConfigError
from swirl.model.lora import LoRA, add_lora
from swirl.rollout.policy import PolicyState
from swirl.sampling import cache as cache_module
from swirl.sampling import engine as engine_module
from swirl.sampling.cache import KeyCache
from swirl.sampling.draw import SamplingParams
from swirl.sampling.engine import Engine
from swirl.sampling.local_policy import LocalPolicy
from swirl.sampling.passes import LayerPasses, StepPasses, Tree, passes_for
from swirl.tree.pack import pack_states
from tests.sampling.test_engine import BASE, STOP, assert_log_probs_are_the_models, forest, loud_gemma


def options(states, **changes):
    return dict(seeds=range(len(states)), max_new_tokens=19, temperature=1.0, stop_ids=STOP) | changes


def spy_prefill(monkeypatch) -> list[int]:
    """Tokens of each prefill from now on."""
    counts, prefill = [], StepPasses.prefill
    monkeypatch.setattr(
        StepPasses, "prefill", lambda self, ids, *rest: counts.append(len(ids)) or prefill(self, ids, *rest)
    )
    return counts


def test_200_greedy_prompts_are_those_of_transformers():
    model = loud_gemma(std=0.5).double()
    theirs = Gemma2ForCausalLM(Gemma2Config(**BASE, attn_implementation="eager")).double().eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    rng = np.random.default_rng(0)
    states = [rng.integers(0, 61, length).tolist() for length in range(1, 41) for _ in range(4)]
    states += [state + rng.integers(0, 61, 8).tolist() for state in states[-40:]]
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=list(STOP), pad_token_id=0)
    truth = {}
    for length in {len(state) for state in states}:
        ids = torch.tensor([state for state in states if len(state) == length])
        for row in theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist():
            new = row[length:]
            stop = next((i + 1 for i, token in enumerate(new) if token in STOP), len(new))
            truth[tuple(row[:length])] = tuple(new[:stop])
    expected = [truth[tuple(state)] for state in states]
    greedy = options(states, temperature=0, max_new_tokens=12)
    reused = Engine(model)
    assert len(states) == 200
    assert [one.ids for one in reused.sample(states, **greedy)] == expected
    assert [one.ids for one in reused.sample(states, **greedy)] == expected  # every prefix found again
    alone = Engine(model)
    for state, ids in zip(states, expected):
        alone.forget()
        assert alone.sample([state], **options([state], temperature=0, max_new_tokens=12))[0].ids == ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("changes", [{}, dict(attn_logit_softcapping=None, final_logit_softcapping=None)])
def test_a_sequence_is_the_same_to_the_last_bit_whatever_is_in_flight(dtype, changes, monkeypatch):
    model, states = loud_gemma(**changes).to(dtype), forest(count=60)
    together = Engine(model).sample(states, **options(states))
    for seed in range(0, len(states), 7):
        assert Engine(model).sample([states[seed]], **options([0], seeds=[seed])) == [together[seed]]
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 7)
    monkeypatch.setattr(engine_module, "DECODE_STEPS", 3)
    monkeypatch.setattr(engine_module, "MAX_SEQUENCES", 5)
    assert Engine(model).sample(states, **options(states)) == together


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads, dtype):
    model, states, before = loud_gemma().to(dtype), forest(count=60), torch.get_num_threads()
    together = Engine(model).sample(states, **options(states))
    try:
        torch.set_num_threads(threads)
        assert Engine(model).sample(states, **options(states)) == together
    finally:
        torch.set_num_threads(before)


def gemma_3(**changes) -> Gemma:
    fields = dict(num_hidden_layers=4, attn_logit_softcapping=None, final_logit_softcapping=None, qk_norm=True)
    return loud_gemma(**fields, **changes, model_type="gemma3_text", rope_local_base_freq=100.0, rope_factor=2.0)


@pytest.mark.parametrize("make", [loud_gemma, gemma_3])
def test_layers_and_the_step_in_cpp_agree(make, monkeypatch):
    model, states = make().double(), forest()
    by_step = Engine(model).sample(states, **options(states))
    assert_log_probs_are_the_models(model, states, by_step, 1e-9)
    monkeypatch.setattr(engine_module, "passes_for", LayerPasses)
    by_layers = Engine(model).sample(states, **options(states))
    assert [one.ids for one in by_layers] == [one.ids for one in by_step]
    assert_log_probs_are_the_models(model, states, by_layers, 1e-9)


def states_apart(model, states) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Hidden states of distinct states by one prefill of the C++ step, and what that wrote into the cache."""
    cache = KeyCache(model, 1 << 12)
    packed = pack_states([np.array(state, np.int32) for state in states])
    slots = cache.take(packed.input_ids.size)
    tree = Tree(slots, packed.subtree_end, packed.position_ids)
    every = np.arange(packed.input_ids.size, dtype=np.int32)
    hidden = passes_for(model, cache).prefill(packed.input_ids.astype(np.int64), every, tree)
    return hidden, [pool[slots] for pool in (*cache.keys, *cache.values)]


@pytest.mark.parametrize("make", [loud_gemma, gemma_3])
def test_the_step_rounds_to_bfloat16_where_the_layers_do(make, monkeypatch):
    """Sums are taken in another order, so now and then a rounding falls to the other side, and is a neighbour away."""
    model = make(std=0.1).bfloat16()
    hidden, pools = states_apart(model, forest())
    assert hidden.dtype == pools[0].dtype == torch.bfloat16
    monkeypatch.setattr(StepPasses, "prefill", LayerPasses.prefill)
    by_layers, layers_pools = states_apart(model, forest())
    for found, expected in [(hidden, by_layers), *zip(pools, layers_pools, strict=True)]:
        assert (found != expected).float().mean() < 0.02
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


def test_adapters_on_bfloat16_weights_are_not_merged():
    model = loud_gemma().bfloat16()
    assert type(passes_for(model, KeyCache(model, 9))) is StepPasses
    add_lora(model, LoRA(2, 4.0))
    assert type(passes_for(model, KeyCache(model, 9))) is LayerPasses
    assert type(passes_for(model.float(), KeyCache(model, 9))) is StepPasses


def test_prefixes_are_prefilled_once(monkeypatch):
    model, counts = loud_gemma(), spy_prefill(monkeypatch)
    engine, rng = Engine(model), np.random.default_rng(0)
    state = rng.integers(0, 61, 30).tolist()
    drawn = engine.sample([state] * 5, **options([0] * 5, stop_ids=()))
    assert counts == [30]
    # the next turn of each: what was drawn, but for its last token, is known already
    turns = [state + list(one.ids) + [1, 2, 3] for one in drawn]
    distinct = {tuple(turn[: 30 + 19]) for turn in turns}
    again = engine.sample(turns, **options(turns))
    assert counts[1:] == [4 * len(distinct)]
    assert [one.ids for one in again] == [one.ids for one in Engine(model).sample(turns, **options(turns))]
    # a state that is known whole: its last token passes again, since what is drawn from it is not kept
    counts.clear()
    engine.sample([state], **options([state]))
    assert counts == [1]


def test_memory_is_bounded_and_given_back():
    model, states = loud_gemma(), forest(count=60)
    engine = Engine(model, max_cache_tokens=150)
    truth = Engine(model).sample(states, **options(states))
    assert engine.sample(states, **options(states)) == truth
    cache = engine._cache
    assert len(cache.keys[0]) <= 151
    held = {slot for _, slots in cache._finished.values() for slot in slots.tolist()}
    assert cache.num_used == len(held) and 0 not in held
    assert (np.bincount([s for _, slots in cache._finished.values() for s in slots], minlength=len(cache._holders))
            == cache._holders).all()  # fmt: skip
    with pytest.raises(
        ConfigError, match="state 0: 140 tokens and 19 new ones exceed the cache's max_cache_tokens = 150"
    ):
        engine.sample([[1] * 140], **options([0]))


def test_what_has_stopped_is_seen_every_few_tokens(monkeypatch):
    model, calls, decode = loud_gemma(), [], StepPasses.decode

    def spied(self, tokens, tree, states, own_slots, own_lengths, draws):
        calls.append((len(tokens), draws.uniforms.shape[1]))
        return decode(self, tokens, tree, states, own_slots, own_lengths, draws)

    monkeypatch.setattr(StepPasses, "decode", spied)
    made = Engine(model).sample(forest(), **options(forest(), max_new_tokens=41))
    longest = max(len(one.ids) for one in made)
    assert len(calls) == -(-(longest - 1) // 8) and {steps for _, steps in calls} <= {8}
    left = [sum(len(one.ids) > 1 + 8 * call for one in made) for call in range(len(calls))]
    assert [size for size, _ in calls] == left  # a sequence that has stopped is in no later call


def test_many_tasks_await_and_are_batched(monkeypatch):
    model, states = loud_gemma(), forest(count=40)
    truth = Engine(model).sample(states, **options(states))
    engine, params = Engine(model), SamplingParams(19, 1.0, STOP)
    sizes, decode = [], StepPasses.decode
    monkeypatch.setattr(StepPasses, "decode", lambda self, t, *rest: sizes.append(len(t)) or decode(self, t, *rest))

    async def turn(i):
        await asyncio.sleep(0.002 * (i % 3))
        return await engine.generate(states[i], seed=i, params=params)

    async def all_of_them():
        return await asyncio.gather(*(turn(i) for i in range(len(states))))

    assert asyncio.run(all_of_them()) == truth
    assert max(sizes) > 10
    assert asyncio.run(all_of_them()) == truth  # another event loop, the same engine


def test_one_that_is_cancelled_makes_room_and_others_go_on():
    model, states = loud_gemma(), forest()
    engine, params = Engine(model), SamplingParams(19, 1.0, STOP)
    truth = Engine(model).sample(states, **options(states))

    async def some():
        tasks = [asyncio.create_task(engine.generate(s, seed=i, params=params)) for i, s in enumerate(states)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    for i, result in enumerate(asyncio.run(some())):
        assert isinstance(result, asyncio.CancelledError) if i % 2 == 0 else result == truth[i]
    assert engine.sample(states, **options(states)) == truth


def test_an_error_reaches_all_who_wait_and_the_engine_goes_on():
    model, states = loud_gemma(), forest()
    engine, params = Engine(model), SamplingParams(19, 1.0, STOP)
    with torch.no_grad():
        weight = model.model.norm.weight.clone()
        model.model.norm.weight[0] = float("nan")

    async def some():
        return await asyncio.gather(
            *(engine.generate(s, seed=0, params=params) for s in states), return_exceptions=True
        )

    assert {type(result).__name__ for result in asyncio.run(some())} == {"NonFiniteError"}
    with torch.no_grad():
        model.model.norm.weight.copy_(weight)
    assert engine.sample(states, **options(states)) == Engine(model).sample(states, **options(states))


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize("error", [MemoryError, Panic])
def test_an_error_while_requests_join_reaches_them_and_the_engine_goes_on(error, monkeypatch):
    model, states = loud_gemma(), forest()
    truth, prefill, failing = Engine(model).sample(states, **options(states)), StepPasses.prefill, [True, True]

    def fails_at_first(*arguments):
        if failing and failing.pop():
            raise error("in prefill")
        return prefill(*arguments)

    monkeypatch.setattr(StepPasses, "prefill", fails_at_first)
    engine, params = Engine(model), SamplingParams(19, 1.0, STOP)

    async def some():
        drawing = [engine.generate(state, seed=i, params=params) for i, state in enumerate(states)]
        with engine.together():
            tasks = [asyncio.ensure_future(one) for one in drawing]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(result) for result in asyncio.run(some())} == {error}
    with pytest.raises(error):
        engine.sample(states, **options(states))
    assert asyncio.run(some()) == truth


def test_a_cache_that_could_not_grow_begins_anew(monkeypatch):
    model, states = loud_gemma(), forest(count=60)
    engine, mapped, made = Engine(model), cache_module.mmap, []

    def fails_at_the_second(*arguments):
        made.append(arguments)
        if len(made) == 2:
            raise MemoryError("no room for the second pool")
        return mapped(*arguments)

    engine.sample(states[:1], **options(states[:1]))
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "FIRST_SLOTS", 1 << 14)
        patch.setattr(cache_module, "mmap", fails_at_the_second)
        engine._cache._free = engine._cache._free[:0]  # the next request finds no slot
        with pytest.raises(MemoryError):
            engine.sample(states, **options(states))
    assert engine.sample(states, **options(states)) == Engine(model).sample(states, **options(states))


def test_what_finished_sequences_hold_is_bounded_and_none_is_kept_twice(monkeypatch):
    model, state = loud_gemma(), [4, 8, 15, 16]
    engine = Engine(model, max_cache_tokens=64)
    for seed in range(5):
        engine.sample([state] * 10, **options([state] * 10, seeds=[seed] * 10, max_new_tokens=1))
        assert len(engine._cache._finished) <= 10 + 1  # those of this call, and one of all before
    monkeypatch.setattr(cache_module, "MAX_PATHS", 1)
    for seed in range(20):
        engine.sample([state], **options([state], seeds=[seed], max_new_tokens=8, stop_ids=()))
        assert sum(ids.size for ids, _ in engine._cache._finished.values()) <= 64


def test_those_that_leave_tokens_out_change_nothing_for_others():
    model, states = loud_gemma(), forest(count=40)
    truth = Engine(model).sample(states, **options(states))

    async def mixed():
        engine = Engine(model)
        plain, truncated = SamplingParams(19, 1.0, STOP), SamplingParams(19, 1.0, STOP, top_p=0.7)
        drawing = [engine.generate(state, seed=i, params=plain) for i, state in enumerate(states)]
        return await asyncio.gather(
            *drawing, *(engine.generate(state, seed=0, params=truncated) for state in states[::3])
        )

    assert asyncio.run(mixed())[: len(states)] == truth


@pytest.mark.parametrize("limits", [dict(top_k=3), dict(top_p=0.6), dict(min_p=0.3), dict(top_k=9, top_p=0.8)])
def test_truncated_draws_follow_their_distribution(limits):
    model, state, n = loud_gemma().double(), [4, 8, 15], 3000
    params = SamplingParams(1, 0.8, **limits)
    engine = Engine(model)

    async def draws():
        return await asyncio.gather(*(engine.generate(state, seed=i, params=params) for i in range(n)))

    drawn = asyncio.run(draws())
    plain = Engine(model).sample([state] * 1, **options([0], max_new_tokens=1, temperature=0))
    with torch.no_grad():
        ids = torch.tensor(state)
        hidden = model.hidden(ids, torch.arange(3, dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32))[-1]
        logits = model.model.embed_tokens.weight @ hidden
        p = ((30 * (logits / 30).tanh()) / 0.8).softmax(-1).numpy()
    order = np.argsort(-p, kind="stable")
    kept = [t for rank, t in enumerate(order)
            if (not params.top_k or rank < params.top_k) and p[order[:rank]].sum() < params.top_p
            and p[t] >= params.min_p * p[order[0]]]  # fmt: skip
    q = p[kept] / p[kept].sum()
    counts = np.bincount([one.ids[0] for one in drawn], minlength=61)
    assert counts.sum() == counts[kept].sum() and plain[0].ids[0] == order[0]
    expected = q * n
    seen = expected > 5
    # chi-square over at most 60 degrees of freedom: 99.9% lie below 99.6
    assert ((counts[kept] - expected)[seen] ** 2 / expected[seen]).sum() < 99.6
    of = dict(zip(kept, np.log(q)))
    assert all(one.log_probs[0] == pytest.approx(of[one.ids[0]], abs=1e-9) for one in drawn)


def test_an_action_ends_with_the_token_that_completes_a_stop_text():
    model, tokenizer = load_model("almanac")
    state = tokenizer.prompt_ids("Question: Who is the founder of Gorvale?")
    policy, tags = LocalPolicy(model, tokenizer), ("</search_query>", "</answer>")

    async def act(stop_texts):
        asked = (
            PolicyState(prompt="", ids=tuple(state), seed=seed, max_new_tokens=40, stop_texts=stop_texts)
            for seed in range(20)
        )
        return await asyncio.gather(*map(policy.act, asked))

    num_ended = 0
    for step, truth in zip(asyncio.run(act(tags)), asyncio.run(act(())), strict=True):
        assert truth.action_ids[: len(step.action_ids)] == step.action_ids
        assert len(step.log_probs) == len(step.action_ids)
        assert (step.stop_text is not None) == step.action.endswith(tags)
        if step.stop_text is not None:
            num_ended += 1
            assert step.action.endswith(step.stop_text) and step.action_ids[-1] not in tokenizer.stop_ids
            assert not step.truncated and tokenizer.decode(step.action_ids) == step.action
    assert num_ended > 10
    with pytest.raises(ValueError, match="no tokenizer"):
        asyncio.run(Engine(model).generate(state, seed=0, params=SamplingParams(9, stop_texts=("a",))))
