"""Gemma of both generations against transformers', on random weights large enough that the softcaps bite."""

from __future__ import annotations

import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from swirl import Gemma, GemmaConfig, pack
from swirl.kernels import _triton
from swirl.kernels.geglu import geglu
from swirl.kernels.linear_log_prob import linear_log_prob
from swirl.kernels.rms_norm import norm_add_norm, rms_norm
from swirl.kernels.rope import rope
from swirl.kernels.tree_attention import tree_attention
from swirl.kernels.tree_decode import tree_decode
from swirl.model.config import FULL, GEMMA3, SLIDING

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
IS_THIRD = {"model_type": "gemma3_text"}
SECOND = {
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
    "angles scaled": dict(rope_factor=4.0),
}
THIRD = {
    "gemma 3, a pattern cut off": dict(num_hidden_layers=8),
    "gemma 3, cut off before its first full layer": dict(num_hidden_layers=4, num_key_value_heads=4),
    "gemma 3, one kv head, wide heads, a third full": dict(
        num_key_value_heads=1, head_dim=34, sliding_window_pattern=3, num_hidden_layers=4
    ),
    "gemma 3, scaled angles, window of one": dict(rope_factor=8.0, sliding_window=1, num_hidden_layers=6),
    "gemma 3, every angle its own": dict(
        rope_theta=777.0, rope_factor=2.5, rope_local_base_freq=33.0, rope_local_factor=3.0, sliding_window_pattern=2
    ),
    "gemma 3, layers in no pattern": dict(
        layer_types=(FULL, FULL, SLIDING, FULL), num_hidden_layers=4, rms_norm_eps=1e-4
    ),
    "gemma 3, six heads over three, head capped": dict(
        num_attention_heads=6, num_key_value_heads=3, query_pre_attn_scalar=5, final_logit_softcapping=5.0
    ),
}
CONFIGS = SECOND | {name: IS_THIRD | changes for name, changes in THIRD.items()}
IDS = torch.randint(0, BASE["vocab_size"], (41,), generator=torch.Generator().manual_seed(3))
SEQUENCE = IDS.tolist()
# Forks inside and at the ends of states and actions, branches of one token, a pair twice, a tree of its own.
FOREST = [
    (SEQUENCE[:9], SEQUENCE[9:30]),
    (SEQUENCE[:9], SEQUENCE[9:14] + [1, 2]),
    (SEQUENCE[:9], [4]),
    (SEQUENCE[:20], SEQUENCE[20:21]),
    (SEQUENCE[:9], SEQUENCE[9:14] + [1, 2]),
    (SEQUENCE[3:5], SEQUENCE[:30]),
    (SEQUENCE[:1], SEQUENCE[7:8]),
]


def config_of(**changes) -> GemmaConfig:
    third = changes.get("model_type") == "gemma3_text"
    return GemmaConfig(**GEMMA3 | BASE | changes if third else BASE | changes)


def loud_gemma(seed=0, **changes) -> Gemma:
    """Weights of std 0.4 and norms away from zero: scores reach well past a softcap of 3, and near 50."""
    model = Gemma(config_of(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def theirs_of(config: GemmaConfig):
    """transformers' model of that shape, its weights yet to be given."""
    content = json.loads(json.dumps(config.to_json()))
    kinds = (Gemma3TextConfig, Gemma3ForCausalLM) if config.qk_norm else (Gemma2Config, Gemma2ForCausalLM)
    return kinds[1](kinds[0](**content, attn_implementation="eager"))


def their_log_probs(theirs, ids):
    """(len(ids) - 1,) log-prob of every token but the first."""
    return theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def their_forest(theirs, pairs):
    """(M,) log-probs of the actions, each pair in a pass of its own."""
    passes = [their_log_probs(theirs, torch.tensor([*state, *action]))[len(state) - 1 :] for state, action in pairs]
    return torch.cat(passes)


def whole(ids):
    """One sequence whose every token but the first is an action token."""
    return pack([(ids[:1].tolist(), ids[1:].tolist())])


def load_theirs(folder, config):
    kind = Gemma3ForCausalLM if config.qk_norm else Gemma2ForCausalLM
    return kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_log_probs_and_gradients_are_those_of_transformers_from_our_folder(changes, tmp_path):
    model = loud_gemma(**changes)
    model.save_pretrained(tmp_path / "ours")
    theirs = load_theirs(tmp_path / "ours", model.config)
    ours, truth = model.token_log_probs(pack(FOREST)), their_forest(theirs, FOREST)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, truth.numel())
    (ours * weights).sum().backward()
    (truth * weights).sum().backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # with a window of one, queries and keys have no gradient but rounding
    rounding = 1e-7 * sum(gradient.square().sum() for gradient in their_gradients.values()).sqrt()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - their_gradients[name]).norm()
        assert error <= 1e-5 * their_gradients[name].norm() + rounding, (name, error.item())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_reads_what_transformers_writes_and_keeps_the_config(changes, tmp_path):
    config = config_of(**changes)
    theirs = theirs_of(config).float()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
    theirs.save_pretrained(tmp_path / "theirs")
    model = Gemma.from_pretrained(tmp_path / "theirs")
    assert model.config == config
    ours = model.token_log_probs(whole(IDS))
    torch.testing.assert_close(ours, their_log_probs(theirs, IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_forest_equals_separate_sequences(changes):
    model = loud_gemma(**changes).double()
    packed = model.token_log_probs(pack(FOREST))
    separate = torch.cat([model.token_log_probs(pack([pair])) for pair in FOREST])
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=1e-10)
    sums = model.sub_trajectory_log_probs(pack(FOREST))
    parts = separate.split([len(action) for _, action in FOREST])
    torch.testing.assert_close(sums, torch.stack([part.sum() for part in parts]), rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 1, packed.numel()).double()
    gradients = [torch.autograd.grad((x * weights).sum(), list(model.parameters())) for x in (packed, separate)]
    largest = max(truth.abs().max().item() for truth in gradients[1])
    for ours, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * largest)
    assert model.hidden(*map(torch.tensor, ([5], [0], [1]))).shape == (1, BASE["hidden_size"])


def test_the_softcaps_of_the_parity_configs_bite():
    loud, capless = loud_gemma(), loud_gemma(attn_logit_softcapping=None)
    headless = loud_gemma(final_logit_softcapping=None)
    truth = loud.token_log_probs(whole(IDS))
    assert (capless.token_log_probs(whole(IDS)) - truth).abs().max() > 1e-3
    assert (headless.token_log_probs(whole(IDS)) - truth).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, IS_THIRD | dict(num_hidden_layers=7)])
def test_float64_parity(changes):
    model = loud_gemma(**changes).double()
    theirs = theirs_of(model.config).double()
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    ours = model.token_log_probs(whole(IDS))
    assert ours.dtype == torch.float64
    # transformers keeps norms, angles and softmax in float32, whatever the model
    torch.testing.assert_close(ours, their_log_probs(theirs, IDS), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, IS_THIRD | dict(num_hidden_layers=7)])
def test_what_is_kept_for_the_backward_pass_changes_no_log_prob_and_no_gradient(changes, dtype):
    found = {}
    for mode in ("none", "cheap", "layers"):
        model = loud_gemma(**changes).to(dtype)
        model.activation_checkpointing = mode
        log_probs = model(whole(IDS))
        log_probs.sum().backward()
        found[mode] = [log_probs.detach(), *(weight.grad for weight in model.parameters())]
    for mode in ("cheap", "layers"):
        assert all(torch.equal(a, b) for a, b in zip(found["none"], found[mode], strict=True)), mode


@pytest.mark.parametrize(("mode", "left"), [("none", 1.0), ("cheap", 0.0), ("layers", 0.0)])
def test_of_what_is_cheap_to_make_again_nothing_is_kept(mode, left, monkeypatch):
    made = []

    def watched(op):
        def run(*args, **kwargs):
            y = op(*args, **kwargs)
            if "residual" not in kwargs:
                normed = y[1] if op is norm_add_norm else y
                made.append((StorageWeakRef(normed.untyped_storage()), op))
            return y

        return run

    monkeypatch.setattr("swirl.model.gemma.rms_norm", watched(rms_norm))
    monkeypatch.setattr("swirl.model.gemma.norm_add_norm", watched(norm_add_norm))
    monkeypatch.setattr("swirl.model.gemma.geglu", watched(geglu))
    model = loud_gemma()
    model.activation_checkpointing = mode
    out = model(whole(IDS))
    layers = model.config.num_hidden_layers
    num_kept = {op: sum(op is one and not y.expired() for y, one in made) for op in (geglu, rms_norm, norm_add_norm)}
    assert num_kept == dict.fromkeys(num_kept, left * layers)  # norms before attention and before the MLP
    num_made = len(made)
    out.sum().backward()
    again = 0 if mode == "none" else 3 * layers  # once, and not what nothing reads
    assert len(made) - num_made == again


def test_embedding_scale_is_rounded_to_the_models_type():
    model = Gemma(GemmaConfig(**BASE | dict(hidden_size=3072, num_hidden_layers=1))).init_weights(0)
    model = model.to(torch.bfloat16)
    scaled = model.model.embed(IDS)
    assert torch.equal(scaled, model.model.embed_tokens(IDS) * torch.tensor(55.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("changes", [{}, IS_THIRD | dict(num_hidden_layers=7)])
def test_bfloat16_stays_near_float32(changes):
    model = Gemma(config_of(**changes)).init_weights(2)
    truth = model.token_log_probs(whole(IDS))
    half = Gemma(config_of(**changes)).init_weights(2).to(torch.bfloat16)
    log_probs = half.token_log_probs(whole(IDS))
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, truth, rtol=0.02, atol=0.02)


def test_init_weights_is_seeded():
    a, b, c = (Gemma(GemmaConfig(**BASE)).init_weights(seed) for seed in (1, 1, 2))
    embedding = a.model.embed_tokens.weight
    assert torch.equal(embedding, b.model.embed_tokens.weight)
    assert not torch.equal(embedding, c.model.embed_tokens.weight)
    assert abs(embedding.std().item() - 0.02) < 0.002 and a.model.norm.weight.abs().max() == 0


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
        lambda: tree_decode(q, q, q, ids, ids, ids, ids, ids[:, None], ids, scale=1.0),
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


def test_gradients_are_the_same_to_the_bit_each_time():
    """Rows that repeat at forks were summed in the order in which threads came to them."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(0, 64, (40,), generator=generator).tolist()
    branches = [(state[: 10 + i % 30], torch.randint(0, 64, (3,), generator=generator).tolist()) for i in range(1200)]
    batch = pack(branches)
    sizes = dict(hidden_size=32, head_dim=32, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    model = Gemma(GemmaConfig(**BASE | sizes)).init_weights(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = set()
        for _ in range(15):
            model.zero_grad(set_to_none=True)
            log_probs = model.token_log_probs(batch)
            (log_probs * torch.arange(log_probs.numel()).sin()).sum().backward()
            seen.add(model.model.norm.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1
