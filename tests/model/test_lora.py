"""Adapters: what they compute, what they learn, and PEFT's files in and out."""

import json

import pytest
import torch

from swirl.config import TrainConfig
from swirl.errors import CheckpointError
from swirl.learning.objective import Objective
from swirl.learning.optimizer import make_optimizer
from swirl.learning.usage import update_flops
from swirl.model.gemma import Gemma
from swirl.model.lora import (
    CONFIG,
    WEIGHTS,
    LoRA,
    LoRALinear,
    adapter_weights,
    adapters_off,
    add_lora,
    load_adapter,
    merge_lora,
    read_adapter,
    save_adapter,
)
from swirl.sampling.engine import Engine
from swirl.tree.pack import pack
from tests.learning.updates import accumulate, some_actions, some_model

PAIRS = [([1, 2, 3, 4], [5, 6, 7]), ([1, 2, 3, 4], [5, 9]), ([1, 2, 3, 4, 5, 6, 7, 20, 21], [30, 31, 32, 33])]


def adapted(dtype=torch.float64, rank=3, alpha=7.0):
    """A small model whose adapters have learned something: B is not zero."""
    model = add_lora(some_model(dtype), LoRA(rank, alpha), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def test_a_new_adapter_changes_nothing_and_trains_alone():
    plain, model = some_model(), add_lora(some_model(), LoRA(4))
    batch = pack(PAIRS)
    assert torch.equal(plain.token_log_probs(batch), model.token_log_probs(batch))
    model.token_log_probs(batch).sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * 7 * model.config.num_hidden_layers


def test_gradients_equal_those_of_autograd_on_the_merged_weight():
    model, batch = adapted(), pack(PAIRS)
    model.token_log_probs(batch).sum().backward()
    merged = some_model()
    merged.load_state_dict(model.merged_weights())
    log_probs = merged.token_log_probs(batch)
    torch.testing.assert_close(model.token_log_probs(batch), log_probs, rtol=1e-12, atol=1e-12)
    log_probs.sum().backward()
    layers = dict(merged.named_modules())
    checked = 0
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            dW, A, B = layers[name].weight.grad, layer.lora_A, layer.lora_B
            torch.testing.assert_close(A.grad, layer.scale * B.T @ dW, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(B.grad, layer.scale * dW @ A.T, rtol=1e-10, atol=1e-12)
            checked += 1
    assert checked == 14


def test_frozen_weights_are_counted_without_the_flops_of_their_gradient():
    model, batch = adapted(rank=3), pack(PAIRS)
    adapters = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    layers = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, LoRALinear))
    T, M = batch.num_tokens, batch.num_action_tokens
    saved = 2 * layers * T + 2 * M * model.model.embed_tokens.weight.numel()
    assert update_flops(model.config, batch) - saved + 6 * adapters * T == update_flops(
        model.config, batch, lora_rank=3
    )


def test_merging_is_in_place_and_leaves_a_plain_model():
    model, batch = adapted(), pack(PAIRS)
    before, wanted = model.token_log_probs(batch), model.merged_weights()
    data = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    merge_lora(model)
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == data and model.lora is None
    assert model.state_dict().keys() == some_model().state_dict().keys()
    assert all(torch.equal(weight, wanted[name]) for name, weight in model.state_dict().items())
    torch.testing.assert_close(model.token_log_probs(batch), before, rtol=1e-12, atol=1e-12)


def test_bfloat16_weights_have_float32_adapters_and_are_rounded_once_by_a_merge():
    model = adapted(torch.bfloat16)
    model.token_log_probs(pack(PAIRS)).sum().backward()
    layer = model.model.layers[1].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    off = (layer.merged().double() - exact).abs() / exact.abs()
    assert off.max() < 2**-8


def test_the_reference_is_the_model_with_its_adapters_off():
    model, batch = adapted(), pack(PAIRS)
    with adapters_off(model):
        assert torch.equal(model.token_log_probs(batch), some_model().token_log_probs(batch))
    assert not torch.equal(model.token_log_probs(batch), some_model().token_log_probs(batch))
    config = TrainConfig(mode="recorded", kl_coefficient=0.3)
    objective = Objective(config, model)
    assert objective.reference is model  # no second copy of the weights
    found = accumulate(model, some_actions(), objective=objective, kl_coefficient=0.3)
    copied = Objective(config, some_model())  # the same, with a model of its own
    twin = adapted()
    copied._trained = objective._trained
    expected = accumulate(twin, some_actions(), objective=copied, kl_coefficient=0.3)
    assert found["kl"] > 0.01 and found["kl"] == pytest.approx(expected["kl"], rel=1e-12)
    for name, weight in twin.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, weight.grad, rtol=1e-10, atol=1e-12)


def test_a_proximal_policy_shares_the_frozen_weights_and_is_kept_by_its_adapters():
    model = adapted()
    objective = Objective(TrainConfig(mode="recorded", proximal_every=2), model)
    objective.refresh(model, 0)
    ours, copies = dict(model.named_parameters()), dict(objective.proximal.named_parameters())
    for name, weight in ours.items():
        assert (copies[name] is weight) == (".lora_" not in name)
    state = objective.state_tensors()
    assert all(".lora_" in name for name in state) and len(state) == 28
    fresh = add_lora(some_model(), LoRA(3, 7.0))
    again = Objective(TrainConfig(mode="recorded", proximal_every=2), fresh)
    again.load_state_tensors(state, fresh)
    for name, weight in again.proximal.named_parameters():
        assert torch.equal(weight, ours[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_draws_from_the_adapted_weights_of_the_moment(dtype, tiny_folder):
    model = add_lora(Gemma.from_pretrained(tiny_folder, dtype=dtype), LoRA(4))
    engine, states = Engine(model), [[1, 5, 9, 30, 7], [1, 5, 9, 30, 8, 4]]
    settings = {"seeds": [0, 1], "max_new_tokens": 6, "temperature": 1.0}
    plain = Engine(Gemma.from_pretrained(tiny_folder, dtype=dtype)).sample(states, **settings)
    assert [c.ids for c in engine.sample(states, **settings)] == [c.ids for c in plain]
    optimizer = make_optimizer(model, learning_rate=0.1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight)
    optimizer.step()
    drawn = engine.sample(states, **settings)
    assert drawn == Engine(model).sample(states, **settings) != plain
    pairs = [(state, list(completion.ids)) for state, completion in zip(states, drawn)]
    log_probs = model.token_log_probs(pack(pairs))
    told = torch.tensor([value for completion in drawn for value in completion.log_probs])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(log_probs.detach(), told, rtol=0, atol=tolerance)


def test_an_adapter_travels_through_its_files(tmp_path, tiny_folder):
    model = add_lora(Gemma.from_pretrained(tiny_folder), LoRA(4, 8.0))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")  # in place of another
    content = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert content["r"] == 4 and content["base_model_name_or_path"] == str(tiny_folder.resolve())
    back = load_adapter(Gemma.from_pretrained(tiny_folder), tmp_path / "adapter")
    assert back.lora == LoRA(4, 8.0)
    for (name, a), b in zip(adapter_weights(model).items(), adapter_weights(back).values(), strict=True):
        assert torch.equal(a, b), name
    batch = pack(PAIRS)
    model.save_pretrained(tmp_path / "merged")
    merged = Gemma.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged.token_log_probs(batch), model.token_log_probs(batch), rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        save_adapter(model, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "field 'use_dora': True is not supported, only False"),
        ({"modules_to_save": ["lm_head"]}, "field 'modules_to_save'"),
        ({"rank_pattern": {"q_proj": 2}}, "field 'rank_pattern'"),
        ({"init_lora_weights": "pissa_niter_4"}, "field 'init_lora_weights': 'pissa_niter_4' changes the base"),
        ({"lora_bias": True}, "field 'lora_bias': True is not supported"),
        ({"alora_invocation_tokens": [5]}, "field 'alora_invocation_tokens': [5] is not supported"),
        ({"r": "four"}, "expected numbers 'r' and 'lora_alpha'"),
        ({"r": 5}, "expected shape (5, 64), got (4, 64)"),
    ],
)
def test_an_adapter_that_is_not_computed_here_is_refused_by_name(change, says, tmp_path, tiny_folder):
    model = add_lora(Gemma.from_pretrained(tiny_folder), LoRA(4))
    save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / CONFIG
    (tmp_path / "adapter" / "digests.json").unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError) as error:
        load_adapter(Gemma.from_pretrained(tiny_folder), tmp_path / "adapter")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_or_foreign_adapter_is_one_line(tmp_path, tiny_folder):
    model = add_lora(Gemma.from_pretrained(tiny_folder), LoRA(4))
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not match its digest"):
        read_adapter(tmp_path / "adapter")
    (tmp_path / "adapter" / "digests.json").unlink()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_adapter(tmp_path / "adapter")


def test_peft_computes_the_same_logits_and_its_adapters_the_other_way(tmp_path, tiny_folder):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = add_lora(Gemma.from_pretrained(tiny_folder, dtype=torch.float64), LoRA(4, 6.0))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, tmp_path / "ours")

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64)

    ids = [1, 5, 9, 30, 7, 100, 3, 8, 44, 2]
    log_probs = model.token_log_probs(pack([(ids[:1], ids[1:])])).detach()

    def theirs(wrapped):
        with torch.no_grad():
            logits = wrapped(torch.tensor([ids])).logits[0].double()
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    there = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(there), log_probs, rtol=1e-6, atol=1e-6)
    assert (theirs(base()) - log_probs).abs().max() > 0.05
    shape = dict(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    made = peft.get_peft_model(base(), peft.LoraConfig(**shape, init_lora_weights=False))
    made.save_pretrained(tmp_path / "theirs")
    back = load_adapter(Gemma.from_pretrained(tiny_folder, dtype=torch.float64), tmp_path / "theirs")
    expected = theirs(made)
    found = back.token_log_probs(pack([(ids[:1], ids[1:])])).detach()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (theirs(base()) - expected).abs().max() > 1e-3
    moved = peft.get_peft_model(base().float(), peft.LoraConfig(**shape, init_lora_weights="pissa"))
    moved.save_pretrained(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="'pissa' changes the base's weights"):
        read_adapter(tmp_path / "moved")
