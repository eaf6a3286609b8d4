"""What a pass keeps, by arithmetic, is what autograd saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swirl.model.activations import Computation, head_backward, kept_by_layer, kept_by_pass
from swirl.model.config import PRESETS, GemmaConfig
from swirl.model.gemma import Gemma
from swirl.model.lora import LoRA, add_lora
from swirl.tree.pack import pack

BATCH = pack([(list(range(1, 60)), list(range(30))), (list(range(1, 50)), list(range(20)))])
SIZES = dict(vocab_size=64, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, query_pre_attn_scalar=32, sliding_window=16)  # fmt: skip


def shape(third: bool, layers: int) -> GemmaConfig:
    sizes = SIZES | {"num_hidden_layers": layers}
    return replace(PRESETS["gemma-3-270m"], **sizes, layer_types=()) if third else GemmaConfig(**sizes)


def saved(config: GemmaConfig, dtype: torch.dtype, how: Computation) -> int:
    """Bytes of all storages but the weights' that autograd saves of a pass."""
    model = Gemma(config, activation_checkpointing=how.checkpointing).init_weights(0).to(dtype)
    if how.lora:
        add_lora(model, LoRA(how.lora))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.head_log_probs(model.action_hidden(BATCH), BATCH.target_ids, return_entropy=True)
    return sum(tensor.untyped_storage().nbytes() for at, tensor in storages.items() if at not in own)


@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize(
    "dtype, checkpointing, lora",
    [
        (torch.float32, "none", 0),
        (torch.float32, "none", 3),
        (torch.float32, "cheap", 0),
        (torch.float32, "layers", 0),
        (torch.bfloat16, "none", 0),
        (torch.bfloat16, "none", 3),
        (torch.bfloat16, "layers", 3),
    ],
)
def test_what_is_kept_is_what_autograd_saves(third, dtype, checkpointing, lora):
    how = Computation(dtype.itemsize, on_gpu=False, checkpointing=checkpointing, lora=lora)
    two, three = (saved(shape(third, layers), dtype, how) for layers in (2, 3))
    of_layer = BATCH.num_tokens * sum(kept_by_layer(shape(third, 3), how))
    # torch's own ops keep a few vectors of the weights' sizes, too, whatever the tokens
    assert of_layer <= three - two <= of_layer + (4 * 8 * 64 + 2 * 3 * 1500 if dtype == torch.bfloat16 else 0)
    if not lora:  # of adapters the first layer keeps less: nothing before it is trained
        planned = sum(kept_by_pass(shape(third, 3), how, BATCH.num_tokens, BATCH.num_action_tokens))
        assert three == pytest.approx(planned, rel=0.03)


def test_a_packed_token_of_2b_keeps_what_the_count_by_hand_says():
    two_b, how = PRESETS["gemma-2-2b"], Computation(2, on_gpu=True)
    none, cheap, layers = (
        26 * sum(kept_by_layer(two_b, replace(how, checkpointing=mode))) for mode in ("none", "cheap", "layers")
    )
    # 6 d + 2 of heads' queries + 2 of keys + 3 F elements, in bfloat16: 2.48 MB; without 2 d + F: 1.76 MB; d: 0.12 MB
    assert none == pytest.approx(26 * 2 * (6 * 2304 + 2 * 2048 + 2 * 1024 + 3 * 9216), rel=0.001)
    assert cheap == pytest.approx(26 * 2 * (4 * 2304 + 2 * 2048 + 2 * 1024 + 2 * 9216), rel=0.001)
    assert layers == 26 * 2 * 2304


def test_on_a_gpu_the_head_takes_all_logits_up_to_a_gigabyte():
    two_b, how = PRESETS["gemma-2-2b"], Computation(2, on_gpu=True, lora=16)

    def room(rows: int) -> int:
        return head_backward(two_b, how, rows, kl=False) - 2 * rows * two_b.hidden_size

    assert [room(rows) for rows in (1, 1000, 8192)] == [64 << 20, 2 * 1000 * (256_000 + 2304), 1 << 30]
