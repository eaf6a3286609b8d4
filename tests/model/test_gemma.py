"""Gemma against transformers' Gemma2ForCausalLM, on random weights large enough that the softcaps bite."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from swirl import Gemma, GemmaConfig, pack
from swirl.errors import CheckpointError, ConfigError
from swirl.kernels import _triton
from swirl.kernels.geglu import geglu
from swirl.kernels.linear_log_prob import linear_log_prob
from swirl.kernels.rms_norm import rms_norm
from swirl.kernels.rope import rope
from swirl.kernels.tree_attention import tree_attention
from swirl.kernels.tree_decode import tree_decode
from swirl.model.gemma import FULL, PRESETS, SLIDING

BASE = dict(
    vocab_size=89,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=14,
    query_pre_attn_scalar=20,
    sliding_window=7,
)
CONFIGS = {
    "gqa 4:2, narrow heads": {},
    "one kv head, wide heads": dict(num_key_value_heads=1, head_dim=34),
    "no grouping, window of one": dict(num_key_value_heads=4, sliding_window=1),
    "no softcaps": dict(attn_logit_softcapping=None, final_logit_softcapping=None),
    "tight softcaps, all full": dict(
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0, layer_types=(FULL, FULL, FULL)
    ),
    "five to one, theta": dict(
        num_hidden_layers=6, layer_types=(SLIDING,) * 5 + (FULL,), rope_theta=500.0, rms_norm_eps=1e-4
    ),
    "six heads over three": dict(num_attention_heads=6, num_key_value_heads=3, query_pre_attn_scalar=5),
}
IDS = torch.randint(0, BASE["vocab_size"], (41,), generator=torch.Generator().manual_seed(3))


def loud_gemma(seed=0, **changes) -> Gemma:
    """Weights of std 0.4 and norms away from zero: scores reach well past a softcap of 3, and near 50."""
    model = Gemma(GemmaConfig(**BASE | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def their_log_probs(theirs, ids):
    """(len(ids) - 1,) log-prob of every token but the first."""
    return theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def whole(ids):
    """One sequence whose every token but the first is an action token."""
    return pack([(ids[:1].tolist(), ids[1:].tolist())])


def load_theirs(folder):
    return Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_log_probs_and_gradients_are_those_of_transformers_from_our_folder(changes, tmp_path):
    model = loud_gemma(**changes)
    model.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours")
    ours, truth = model.token_log_probs(whole(IDS)), their_log_probs(theirs, IDS)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, truth.numel())
    (ours * weights).sum().backward()
    (truth * weights).sum().backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # with a window of one, queries and keys have no gradient but rounding
    rounding = 1e-7 * sum(gradient.square().sum() for gradient in their_gradients.values()).sqrt()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - their_gradients[name]).norm()
        assert error <= 2e-5 * their_gradients[name].norm() + rounding, (name, error.item())


@pytest.mark.parametrize("changes", list(CONFIGS.values())[:4], ids=list(CONFIGS)[:4])
def test_reads_what_transformers_writes_and_keeps_the_config(changes, tmp_path):
    config = GemmaConfig(**BASE | changes)
    torch.manual_seed(1)
    theirs = Gemma2ForCausalLM(Gemma2Config(**BASE | changes, attn_implementation="eager")).float()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
    theirs.save_pretrained(tmp_path / "theirs")
    model = Gemma.from_pretrained(tmp_path / "theirs")
    assert model.config == config
    ours = model.token_log_probs(whole(IDS))
    torch.testing.assert_close(ours, their_log_probs(theirs, IDS), rtol=1e-5, atol=1e-6)


def test_the_softcaps_of_the_parity_configs_bite():
    loud, capless = loud_gemma(), loud_gemma(attn_logit_softcapping=None)
    headless = loud_gemma(final_logit_softcapping=None)
    truth = loud.token_log_probs(whole(IDS))
    assert (capless.token_log_probs(whole(IDS)) - truth).abs().max() > 1e-3
    assert (headless.token_log_probs(whole(IDS)) - truth).abs().max() > 1e-3


def test_float64_parity():
    model = loud_gemma().double()
    theirs = Gemma2ForCausalLM(Gemma2Config(**BASE, attn_implementation="eager")).double()
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    ours = model.token_log_probs(whole(IDS))
    assert ours.dtype == torch.float64
    # transformers keeps norms, angles and softmax in float32, whatever the model
    torch.testing.assert_close(ours, their_log_probs(theirs, IDS), rtol=1e-6, atol=1e-6)


def test_packed_forest_equals_separate_sequences():
    model = loud_gemma().double()
    ids = IDS.tolist()
    pairs = [
        (ids[:9], ids[9:20]),
        (ids[:9], ids[9:14] + [1, 2]),
        (ids[:20], ids[20:21]),
        (ids[3:5], ids[:30]),
    ]
    packed = model.token_log_probs(pack(pairs))
    separate = torch.cat([model.token_log_probs(pack([pair])) for pair in pairs])
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-10)
    sums = model.sub_trajectory_log_probs(pack(pairs))
    parts = separate.split([len(action) for _, action in pairs])
    torch.testing.assert_close(sums, torch.stack([part.sum() for part in parts]), rtol=1e-10, atol=1e-10)
    assert model.hidden(*map(torch.tensor, ([5], [0], [1]))).shape == (1, BASE["hidden_size"])


def test_recomputation_changes_no_gradient():
    plain, thrifty = loud_gemma(), loud_gemma()
    thrifty.recompute = True
    for model in (plain, thrifty):
        model(whole(IDS)).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_embedding_scale_is_rounded_to_the_models_type():
    model = Gemma(GemmaConfig(**BASE | dict(hidden_size=3072, num_hidden_layers=1))).init_weights(0)
    model = model.to(torch.bfloat16)
    scaled = model.model.embed(IDS)
    assert torch.equal(scaled, model.model.embed_tokens(IDS) * torch.tensor(55.5, dtype=torch.bfloat16))


def test_bfloat16_stays_near_float32():
    model = Gemma(GemmaConfig(**BASE)).init_weights(2)
    truth = model.token_log_probs(whole(IDS))
    half = Gemma(GemmaConfig(**BASE)).init_weights(2).to(torch.bfloat16)
    log_probs = half.token_log_probs(whole(IDS))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, truth, rtol=0.02, atol=0.02)


def test_init_weights_is_seeded():
    a, b, c = (Gemma(GemmaConfig(**BASE)).init_weights(seed) for seed in (1, 1, 2))
    embedding = a.model.embed_tokens.weight
    assert torch.equal(embedding, b.model.embed_tokens.weight)
    assert not torch.equal(embedding, c.model.embed_tokens.weight)
    assert abs(embedding.std().item() - 0.02) < 0.002 and a.model.norm.weight.abs().max() == 0


def test_presets_have_the_published_sizes():
    def num_parameters(config):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Gemma(config).parameters())

    # Table 2 of arXiv:2408.00118: embedding + non-embedding parameters, in millions
    published = {"2b": (590, 2024), "9b": (918, 8324), "27b": (1180, 26047)}
    for name, (embedding, rest) in published.items():
        config = PRESETS[name]
        in_embedding = config.vocab_size * config.hidden_size
        assert round(in_embedding / 1e6) == pytest.approx(embedding, abs=1)
        assert (num_parameters(config) - in_embedding) / 1e6 == pytest.approx(rest, abs=1)
    assert PRESETS["27b"].query_pre_attn_scalar == 144 and PRESETS["27b"].head_dim == 128


def their_config(**changes):
    return {**GemmaConfig(**BASE).to_json(), **changes}


def test_config_round_trips_through_json_text():
    for config in (*PRESETS.values(), GemmaConfig(**BASE, eos_token_id=(1, 5), attn_logit_softcapping=None)):
        assert GemmaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_config_of_transformers_4_and_5_and_of_early_checkpoints():
    old = their_config(rope_theta=777.0)
    del old["rope_parameters"], old["layer_types"]
    assert GemmaConfig.from_json(old) == GemmaConfig(**BASE, rope_theta=777.0)
    new = their_config(rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    del new["rope_theta"]
    assert GemmaConfig.from_json(new) == GemmaConfig(**BASE, rope_theta=777.0)
    bare = {"model_type": "gemma2", **{name: BASE[name] for name in list(BASE)[:6]}}
    assert GemmaConfig.from_json(bare).head_dim == 256
    assert GemmaConfig.from_json(bare).layer_types == (SLIDING, FULL, SLIDING)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(model_type="llama"), "field 'model_type': expected 'gemma2', got 'llama'"),
        (dict(attention_bias=True), "field 'attention_bias'"),
        (dict(hidden_activation="silu"), "field 'hidden_activation'"),
        (dict(tie_word_embeddings=False), "field 'tie_word_embeddings'"),
        (dict(use_bidirectional_attention=True), "field 'use_bidirectional_attention'"),
        (dict(attention_dropout=0.1), "field 'attention_dropout'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "field 'rope_scaling'"),
        (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "field 'rope_parameters'"),
        (dict(rope_parameters={"sliding_attention": {"rope_theta": 1e4}}), "field 'rope_parameters'"),
        (dict(quantization_config={"quant_method": "gptq"}), "field 'quantization_config'"),
        (dict(num_key_value_heads=3), "field 'num_key_value_heads': 3 does not divide"),
        (dict(hidden_size=-1), "field 'hidden_size': expected a positive integer"),
        (dict(hidden_size="36"), "field 'hidden_size': expected a positive integer"),
        (dict(head_dim=15), "field 'head_dim': expected an even number"),
        (dict(rms_norm_eps=None), "field 'rms_norm_eps': expected a positive number"),
        (dict(attn_logit_softcapping=0), "field 'attn_logit_softcapping'"),
        (dict(sliding_window="wide"), "field 'sliding_window'"),
        (dict(layer_types=["chunked_attention"] * 3), "field 'layer_types'"),
        (dict(layer_types=[SLIDING]), "field 'layer_types'"),
    ],
)
def test_config_that_would_change_the_math_is_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        GemmaConfig.from_json(their_config(**changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_config_without_a_size_names_it(tmp_path):
    content = their_config()
    del content["intermediate_size"]
    with pytest.raises(ConfigError, match="field 'intermediate_size' is missing"):
        GemmaConfig.from_json(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"config.json: field 'intermediate_size' is missing"):
        Gemma.from_pretrained(tmp_path)


def test_window_hides_what_lies_further_back():
    q = torch.randn(5, 2, 4)
    ends, positions = torch.full((5,), 5, dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    mixed = tree_attention(q, q, q, ends, positions, scale=1.0, window=1)
    torch.testing.assert_close(mixed, q)


def test_every_op_makes_its_tensors_device_current_before_it_launches(monkeypatch):
    """A launch is not reached: the guard, entered with the op's tensor, ends it."""

    class Entered(Exception):
        pass

    def guard(x):
        raise Entered(x)

    monkeypatch.setattr(_triton, "takes", lambda *tensors: True)
    monkeypatch.setattr(_triton, "on_device", guard)
    q, vector, ids = torch.ones(3, 2, 32), torch.ones(32), torch.arange(3, dtype=torch.int32)
    calls = [
        lambda: geglu(q, q),
        lambda: rms_norm(q, vector),
        lambda: rope(q, ids),
        lambda: tree_attention(q, q, q, ids + 1, 0 * ids, scale=1.0),
        lambda: tree_decode(q, q, q, q[:, None], q[:, None], ids, scale=1.0),
        lambda: linear_log_prob(q[:, 0], q[:, 1], ids.long()),
    ]
    for call in calls:
        with pytest.raises(Entered) as caught:
            call()
        assert caught.value.args[0].shape[0] == 3


def test_the_guard_is_of_the_tensors_device_and_of_none_on_a_cpu(monkeypatch):
    class OnSecond:
        is_cuda, device = True, torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", lambda device: ("current", device))
    assert _triton.on_device(OnSecond()) == ("current", torch.device("cuda", 1))
    with _triton.on_device(torch.ones(1)) as nothing:
        assert nothing is None
