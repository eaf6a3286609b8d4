"""What a config.json says, in the spellings of transformers 4 and 5, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import Gemma3TextConfig

from swirl import Gemma, GemmaConfig
from swirl.errors import CheckpointError, ConfigError
from swirl.model.config import FULL, GEMMA3, PRESETS, SLIDING

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


def test_presets_have_the_published_sizes():
    def num_parameters(config):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Gemma(config).parameters())

    # Embedding + non-embedding parameters, in millions: Table 2 of arXiv:2408.00118, Table 1 of arXiv:2503.19786; the
    # card of 270m. Of 4b and larger, whose vision tower counts apart.
    published = {
        "gemma-2-2b": (590, 2024),
        "gemma-2-9b": (918, 8324),
        "gemma-2-27b": (1180, 26047),
        "gemma-3-270m": (168, 100),
        "gemma-3-1b": (302, 698),
        "gemma-3-4b": (671, 3209),
        "gemma-3-12b": (1007, 10759),
        "gemma-3-27b": (1410, 25600),
    }
    assert set(published) == set(PRESETS)
    for name, (embedding, rest) in published.items():
        config = PRESETS[name]
        in_embedding = config.vocab_size * config.hidden_size
        assert in_embedding / 1e6 == pytest.approx(embedding, abs=1), name
        assert (num_parameters(config) - in_embedding) / 1e6 == pytest.approx(rest, abs=1), name


def their_config(**changes):
    return {**GemmaConfig(**BASE).to_json(), **changes}


def test_config_round_trips_through_json_text():
    angles = dict(rope_factor=2.0, rope_local_factor=3.0)
    odd = GemmaConfig(**BASE, eos_token_id=(1, 5), attn_logit_softcapping=None, rope_factor=2.0)
    for config in (*PRESETS.values(), odd, GemmaConfig(**GEMMA3 | BASE | angles)):
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


# As their config.json have it on the Hub, of the fields that matter.
GEMMA_3_1B = dict(
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    attention_bias=False,
    attn_logit_softcapping=None,
    bos_token_id=2,
    cache_implementation="hybrid",
    eos_token_id=[1, 106],
    final_logit_softcapping=None,
    head_dim=256,
    hidden_activation="gelu_pytorch_tanh",
    hidden_size=1152,
    intermediate_size=6912,
    max_position_embeddings=32768,
    num_attention_heads=4,
    num_hidden_layers=26,
    num_key_value_heads=1,
    query_pre_attn_scalar=256,
    rms_norm_eps=1e-06,
    rope_local_base_freq=10000,
    rope_scaling=None,
    rope_theta=1000000,
    sliding_window=512,
    sliding_window_pattern=6,
    vocab_size=262144,
)
GEMMA_3_4B = dict(
    architectures=["Gemma3ForConditionalGeneration"],
    model_type="gemma3",
    eos_token_id=[1, 106],
    image_token_index=262144,
    mm_tokens_per_image=256,
    text_config=dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        sliding_window=1024,
    ),
    torch_dtype="bfloat16",
    vision_config={"hidden_size": 1152, "model_type": "siglip_vision_model"},
)
GEMMA_3_27B_TEXT = dict(
    head_dim=128,
    hidden_size=5376,
    intermediate_size=21504,
    model_type="gemma3_text",
    num_attention_heads=32,
    num_hidden_layers=62,
    num_key_value_heads=16,
    query_pre_attn_scalar=168,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
    sliding_window=1024,
)


def test_gemma_3_as_transformers_4_spells_it():
    ends = dict(eos_token_id=(1, 106))
    assert GemmaConfig.from_json(GEMMA_3_1B) == replace(PRESETS["gemma-3-1b"], **ends)
    assert GemmaConfig.from_json(GEMMA_3_4B) == replace(PRESETS["gemma-3-4b"], **ends)
    large = GEMMA_3_4B | {"text_config": GEMMA_3_27B_TEXT}
    assert GemmaConfig.from_json(large) == replace(PRESETS["gemma-3-27b"], **ends)
    assert PRESETS["gemma-3-1b"].layer_types == (((SLIDING,) * 5 + (FULL,)) * 5)[:26]
    assert [PRESETS["gemma-3-4b"].rope(layer) for layer in (4, 5)] == [(1e4, 1.0), (1e6, 8.0)]
    assert [PRESETS["gemma-3-4b"].window(layer) for layer in (4, 5)] == [1024, None]


@pytest.mark.parametrize("content", [GEMMA_3_1B, GEMMA_3_4B["text_config"], GEMMA_3_27B_TEXT])
def test_transformers_reads_the_same_out_of_it_and_writes_what_reads_the_same(content):
    theirs = Gemma3TextConfig(**content).to_dict()
    config = GemmaConfig.from_json(content)
    assert GemmaConfig.from_json(theirs) == config
    back = Gemma3TextConfig(**json.loads(json.dumps(config.to_json()))).to_dict()
    ours = config.to_json()
    for name, value in theirs.items():
        if name in ours and name not in ("dtype", "torch_dtype", "architectures"):
            assert back[name] == value, name


def test_explicit_rope_parameters_win_over_the_old_fields():
    rope = {SLIDING: {"rope_type": "default", "rope_theta": 50.0}, FULL: {"rope_type": "linear", "factor": 3.0}}
    config = GemmaConfig.from_json(GEMMA_3_1B | {"rope_parameters": rope})
    assert (config.rope(0), config.rope(5)) == ((50.0, 1.0), (1e6, 3.0))
    second = their_config(rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 50.0})
    assert GemmaConfig.from_json(second).rope(0) == GemmaConfig.from_json(second).rope(1) == (50.0, 2)


def test_fields_of_the_base_that_are_unknown_here_are_kept():
    base = GEMMA_3_1B | {"mystery": [1, 2]}
    saved = GemmaConfig.from_json(base).to_json(torch.bfloat16, base)
    assert saved["mystery"] == [1, 2] and saved["cache_implementation"] == "hybrid"
    assert saved["dtype"] == "bfloat16" and saved["architectures"] == ["Gemma3ForCausalLM"]
    whole = GemmaConfig.from_json(GEMMA_3_4B).to_json(torch.float32, GEMMA_3_4B)
    assert whole["vision_config"] == GEMMA_3_4B["vision_config"] and whole["model_type"] == "gemma3"
    assert whole["text_config"]["hidden_size"] == 2560 and whole["text_config"]["torch_dtype"] == "float32"
    assert GemmaConfig.from_json(whole) == GemmaConfig.from_json(GEMMA_3_4B)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(rope_parameters={"rope_type": "default"}), "field 'rope_parameters'"),
        (dict(rope_parameters={FULL: {"rope_type": "yarn", "factor": 2.0}}), "field 'rope_parameters'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": "8"}), "field 'rope_factor'"),
        (dict(rope_scaling={"rope_type": "linear", "factor": 0}), "field 'rope_factor'"),
        (dict(rope_local_base_freq=-1), "field 'rope_local_base_freq'"),
        (dict(rope_local_base_freq=None), "field 'model_type'"),
        (dict(sliding_window_pattern=-6), "field 'sliding_window_pattern'"),
        (dict(use_bidirectional_attention=True), "field 'use_bidirectional_attention'"),
        (dict(model_type="gemma3"), "field 'text_config': expected an object, got None"),
    ],
)
def test_gemma_3_that_would_change_the_math_is_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        GemmaConfig.from_json(GEMMA_3_1B | changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["llama", "gemma", "gemma3n", "gemma4", None, ["gemma2"]])
def test_any_other_architecture_is_named_and_what_is_supported(model_type, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 8}))
    with pytest.raises(CheckpointError) as caught:
        Gemma.from_pretrained(tmp_path)
    said = f"field 'model_type': {model_type!r} is not supported, only gemma2, gemma3_text and the text of gemma3"
    assert str(caught.value) == f"{tmp_path / 'config.json'}: {said}"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(attention_bias=True), "field 'attention_bias'"),
        (dict(hidden_activation="silu"), "field 'hidden_activation'"),
        (dict(tie_word_embeddings=False), "field 'tie_word_embeddings'"),
        (dict(use_bidirectional_attention=True), "field 'use_bidirectional_attention'"),
        (dict(attention_dropout=0.1), "field 'attention_dropout'"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "field 'rope_scaling'"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0, "beta": 1}), "field 'rope_scaling'"),
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
