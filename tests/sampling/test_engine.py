"""Sampling held to the model's own log-probs, to transformers' generate, and to its own promises."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from swirl import Gemma, GemmaConfig, pack
from swirl.app.resolve import load_model
from swirl.errors import NonFiniteError
from swirl.model.config import GEMMA3
from swirl.sampling import cache as cache_module
from swirl.sampling import draw as draw_module
from swirl.sampling import engine as engine_module
from swirl.sampling.engine import Engine
from swirl.sampling.in_flight import Completion

BASE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    query_pre_attn_scalar=8,
    sliding_window=6,
)
STOP = (3, 17)
THIRD = GEMMA3 | BASE | dict(num_hidden_layers=7, rope_factor=8.0)


def loud_gemma(std=0.3, **changes) -> Gemma:
    model = Gemma(GemmaConfig(**BASE | changes))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def forest(seed=0, count=23) -> list[list[int]]:
    """States that share prefixes of all lengths, duplicates and prefixes of each other among them."""
    rng = np.random.default_rng(seed)
    trunk = rng.integers(0, 61, 20).tolist()
    states = [trunk[: rng.integers(1, 20)] + rng.integers(0, 61, rng.integers(0, 15)).tolist() for _ in range(count)]
    return [*states, states[0], states[3], trunk, trunk[:1], states[0]]


def sample(model, states, **options):
    defaults = dict(seeds=range(len(states)), max_new_tokens=19, temperature=1.0, stop_ids=STOP)
    max_cache_tokens = options.pop("max_cache_tokens", 1 << 18)
    return Engine(model, max_cache_tokens=max_cache_tokens).sample(states, **defaults | options)


def assert_log_probs_are_the_models(model, states, completions, tolerance):
    batch = pack([(state, completion.ids) for state, completion in zip(states, completions)])
    truth = model.token_log_probs(batch)
    sampled = torch.tensor([p for completion in completions for p in completion.log_probs], dtype=truth.dtype)
    torch.testing.assert_close(sampled, truth.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(attn_logit_softcapping=None, final_logit_softcapping=None),
        dict(num_key_value_heads=6, sliding_window=1),
        THIRD,
    ]
    + [
        dict(
            num_key_value_heads=1,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
            sliding_window=None,
        )
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_log_probs_are_the_models_own(changes, dtype, tolerance):
    model, states = loud_gemma(**changes).to(dtype), forest()
    completions = sample(model, states)
    assert_log_probs_are_the_models(model, states, completions, tolerance)
    for completion in completions:
        assert completion.stopped == (completion.ids[-1] in STOP)
        assert not set(completion.ids[:-1]) & set(STOP)
        assert len(completion.ids) == len(completion.log_probs) <= 19
        assert completion.stopped or len(completion.ids) == 19
    assert len({len(completion.ids) for completion in completions}) > 3


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("temperature", [0.25, 0.7, 1.0, 3.0])
def test_log_probs_are_of_what_is_drawn_from(temperature, cap):
    model, states = loud_gemma(final_logit_softcapping=cap).double(), forest()
    completions = sample(model, states, temperature=temperature)
    batch = pack([(state, completion.ids) for state, completion in zip(states, completions)])
    with torch.no_grad():
        hidden = model.hidden(batch.input_ids, batch.position_ids, batch.subtree_end)[batch.source_rows]
        logits = hidden @ model.model.embed_tokens.weight.T
        logits = logits if cap is None else cap * (logits / cap).tanh()
    truth = (logits / temperature).log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    sampled = torch.tensor([p for completion in completions for p in completion.log_probs], dtype=torch.float64)
    torch.testing.assert_close(sampled, truth, rtol=1e-9, atol=1e-9)


def test_greedy_log_probs_are_those_of_temperature_one():
    model, states = loud_gemma().double(), forest()
    assert_log_probs_are_the_models(model, states, sample(model, states, temperature=0), 1e-9)


@pytest.mark.parametrize("changes", [{}, dict(attn_logit_softcapping=None, num_key_value_heads=3), THIRD])
def test_greedy_is_transformers_generate(changes):
    model = loud_gemma(std=0.5, **changes).double()
    third = model.config.qk_norm
    configured, causal = (Gemma3TextConfig, Gemma3ForCausalLM) if third else (Gemma2Config, Gemma2ForCausalLM)
    content = json.loads(json.dumps(model.config.to_json()))
    theirs = causal(configured(**content, attn_implementation="eager")).double().eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    states = forest(1, 6)
    settings = dict(do_sample=False, max_new_tokens=25, eos_token_id=list(STOP), pad_token_id=0)
    for state, completion in zip(states, sample(model, states, temperature=0, max_new_tokens=25)):
        ids = torch.tensor([state])
        whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert list(completion.ids) == whole[0, len(state) :].tolist()


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_sequence_does_not_depend_on_its_batch(temperature, monkeypatch):
    model, states = loud_gemma().double(), forest()
    together = sample(model, states, temperature=temperature)
    alone = [sample(model, [state], seeds=[seed], temperature=temperature)[0] for seed, state in enumerate(states)]
    assert [completion.ids for completion in together] == [completion.ids for completion in alone]
    shuffled = np.random.default_rng(2).permutation(len(states))
    again = sample(model, [states[i] for i in shuffled], seeds=shuffled, temperature=temperature, max_cache_tokens=150)
    assert [together[i].ids for i in shuffled] == [completion.ids for completion in again]
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 7)
    monkeypatch.setattr(engine_module, "DECODE_STEPS", 3)
    pieces = sample(model, states, temperature=temperature, max_cache_tokens=100)
    assert [completion.ids for completion in together] == [completion.ids for completion in pieces]


def test_same_call_same_result_and_seeds_matter():
    model, states = loud_gemma(), [[1, 2, 3]] * 8
    assert sample(model, states) == sample(model, states)
    assert len({completion.ids for completion in sample(model, states)}) > 4
    assert len({completion.ids for completion in sample(model, states, seeds=[7] * 8)}) == 1
    huge = sample(model, states[:3], seeds=[-1, 2**64 - 1, 2**70 - 1])
    assert len({completion.ids for completion in huge}) == 1


def test_draws_follow_the_distribution():
    model = loud_gemma()
    state, n = [4, 8, 15], 4000
    completions = sample(model, [state] * n, seeds=range(n), max_new_tokens=1, stop_ids=())
    counts = np.bincount([completion.ids[0] for completion in completions], minlength=61)
    pairs = pack([(state, [token]) for token in range(61)])
    expected = model.token_log_probs(pairs).detach().exp().numpy() * n
    # chi-square over 60 degrees of freedom: 99.9% lie below 99.6
    seen = expected > 5
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert statistic < 99.6
    cold = sample(model, [state] * 50, seeds=range(50), max_new_tokens=1, temperature=1e-300)
    assert {completion.ids[0] for completion in cold} == {int(expected.argmax())}
    assert {completion.log_probs for completion in cold} == {(0.0,)}  # nothing else could have been drawn


def test_uniforms_are_splitmix64():
    # first output of the published generator at state 0
    gamma = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert int(draw_module.mix(gamma)[0]) == 0xE220A8397B1DCDAF
    uniforms = draw_module.uniforms(range(100), [0] * 100, 200)
    assert uniforms.min() >= 0 and uniforms.max() < 1 and len(np.unique(uniforms)) == uniforms.size
    assert (
        abs(uniforms.mean() - 0.5) < 0.01 and abs(np.corrcoef(uniforms[:-1].ravel(), uniforms[1:].ravel())[0, 1]) < 0.03
    )
    assert np.array_equal(uniforms[:, :5], draw_module.uniforms(range(100), [0] * 100, 5))


@contextmanager
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        with pytest.MonkeyPatch.context() as patch:  # the pools of keys are no torch.empty on a CPU
            patch.setattr(cache_module, "_empty", lambda shape, like: torch.full(shape, math.nan, dtype=like.dtype))
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_uninitialised_memory_is_never_read():
    model, states = loud_gemma(), forest()
    expected = sample(model, states)
    with uninitialised_memory_is_nan():
        assert sample(model, states) == expected


def test_progress_counts_up_to_all_sequences():
    seen = []
    states = forest()
    sample(loud_gemma(), states, progress=seen.append, max_cache_tokens=300)
    assert seen == sorted(set(seen)) and seen[-1] == len(states) and len(seen) > 3


def test_weights_of_the_moment_are_used():
    model, states = loud_gemma().double(), forest()
    engine = Engine(model)
    options = dict(seeds=range(len(states)), max_new_tokens=9, temperature=1.0, stop_ids=STOP)
    before = engine.sample(states, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    after = engine.sample(states, **options)
    assert before != after
    assert_log_probs_are_the_models(model, states, after, 1e-9)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_bfloat16_is_near_its_own_log_probs():
    model, states = loud_gemma(std=0.05).bfloat16(), forest()
    completions = sample(model, states)
    assert_log_probs_are_the_models(model, states, completions, 0.05)


@pytest.mark.parametrize("dtype, mean, largest", [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 0.01, 0.2)])
def test_sampler_and_trainer_are_as_near_as_the_docs_say(dtype, mean, largest):
    model, tokenizer = load_model("almanac", dtype=dtype)
    asked = "Question: Who is the founder of Gorvale?", "Question: What is the capital of the country of Melisk?"
    states = [tokenizer.prompt_ids(question) for question in asked] * 4
    completions = sample(model, states, max_new_tokens=24, stop_ids=tokenizer.stop_ids)
    with torch.no_grad():
        trained = model.token_log_probs(pack([(state, one.ids) for state, one in zip(states, completions)]))
    gap = (trained - torch.tensor([p for one in completions for p in one.log_probs])).abs()
    assert 0 < gap.mean() < mean and gap.max() < largest


def test_first_token_may_stop_and_limit_may_be_one():
    model = loud_gemma()
    everything = sample(model, [[1], [2, 3]], stop_ids=range(61))
    assert all(len(completion.ids) == 1 and completion.stopped for completion in everything)
    cut = sample(model, [[1]], max_new_tokens=1, stop_ids=())
    assert cut == [Completion(cut[0].ids, cut[0].log_probs, False)]
    assert sample(model, []) == []


@pytest.mark.parametrize(
    "states, options, words",
    [
        ([[1], []], {}, "state 1: expected at least one"),
        ([[1], [61]], {}, r"state 1: expected token ids in \[0, 61\)"),
        ([[-1]], {}, "state 0: expected token ids"),
        ([[1.5]], {}, "state 0: expected at least one integer"),
        ([[[1, 2]]], {}, "state 0: .* flat sequence"),
        ([[2**70]], {}, "state 0"),
        ([[1], [2]], dict(seeds=[1]), "expected one seed a state, got 1 for 2"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens"),
        ([[1]], dict(temperature=-0.1), "temperature"),
        ([[1]], dict(temperature=math.nan), "temperature"),
        ([[1]], dict(temperature=math.inf), "temperature"),
        ([[1]], dict(stop_ids=[61]), "stop_ids"),
        ([[1]], dict(max_cache_tokens=0), "max_cache_tokens"),
    ],
)
def test_bad_arguments_are_refused(states, options, words):
    with pytest.raises(ValueError, match=words):
        sample(loud_gemma(), states, **options)


def test_weights_that_are_not_finite_are_said_to_be():
    model = loud_gemma()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    for temperature in (0, 1.0):
        with pytest.raises(NonFiniteError):
            sample(model, forest(), temperature=temperature)
