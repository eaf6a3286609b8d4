"""What a pass over packed tokens keeps for its backward pass, and what that backward pass takes besides, in bytes.

By arithmetic, from the shapes in gemma.py and what each op's autograd function saves; tests/model/test_activations.py
holds it to what autograd saves. Where the ops of kernels/ serve (Triton, and C++ in float32) a norm saves its input,
an attention q, k, v and its output, a GeGLU both its inputs. Elsewhere (bfloat16 on CPUs) norms, rotations and GeGLU
are torch's, and save float32 copies of most steps between.
Letters: T packed tokens, M action tokens, d model, F MLP, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from swirl.kernels import cpu, linear_kl, linear_log_prob
from swirl.model.config import GemmaConfig

CPP_KEPT_BYTES = 64 << 20


@dataclass(frozen=True)
class Computation:
    """How passes are computed.

    itemsize: bytes of an element of the weights. on_gpu: by Triton. checkpointing: what is computed again, as the flag
    says. lora: rank of adapters beside frozen weights, 0: none. maps_blocks: whether what is freed goes back to the
    system, rather than into a heap.
    """

    itemsize: int
    on_gpu: bool
    checkpointing: str = "none"
    lora: int = 0
    maps_blocks: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether norms, rotations and the GeGLU are ops of kernels/ rather than torch's."""
        return self.on_gpu or (self.itemsize == 4 and bool(cpu.isas()))


def kept_by_layer(model: GemmaConfig, how: Computation) -> list[int]:
    """Bytes a token of each tensor that a layer keeps."""
    d, F, b = model.hidden_size, model.intermediate_size, how.itemsize
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    if how.checkpointing == "layers":
        return [b * d]  # its input
    cheap = how.checkpointing == "cheap"
    normed = [d] * 4 + ([q, kv] if model.qk_norm else [])  # what goes into norms
    linears = [b * q] + ([] if cheap else [b * d, b * d, b * F])  # into linear layers: attention, two norms, GeGLU
    adapters = [b * how.lora] * (7 if how.lora else 0)  # their thin products
    statistics = [4 * model.num_attention_heads * (1 if how.on_gpu else 2)]
    attention = [b * q, b * kv, b * kv, *statistics]
    if not how.on_gpu and b < 4:
        attention.append(4 * q)  # the output before it is rounded; rounded it goes into a linear layer
    scales = [4] * 4 + ([4 * model.num_attention_heads, 4 * model.num_key_value_heads] if model.qk_norm else [])
    if how.has_kernels:
        return linears + adapters + attention + [b * width for width in normed] + scales + [b * F] * 2
    norms = [4 * width for width in normed] * (1 if how.lora else 2)  # widened, and scaled where a gain is trained
    again = [b * d, b * d, b * F, b * F] if cheap else []  # what is cheap is made of these
    return linears + adapters + attention + norms + scales + [4 * F] * 3 + again


def kept_by_pass(model: GemmaConfig, how: Computation, tokens: int, action_tokens: int) -> list[int]:
    """Bytes of each tensor that a whole pass keeps, from the embedding to the log-probs."""
    d, b = model.hidden_size, how.itemsize
    last_norm = [b * d] if how.has_kernels else [4 * d] * (1 if how.lora else 2)
    kinds = {model.rope(layer) for layer in range(model.num_hidden_layers)}
    by_batch = not how.on_gpu and how.checkpointing != "layers"
    rotations = [4 * model.head_dim // 2] * 2 * len(kinds) if by_batch else []  # cosines and sines
    kept = kept_by_layer(model, how) * model.num_hidden_layers + last_norm + rotations
    return [tokens * width for width in kept] + [action_tokens * (b * d + 16)]


def layer_backward(model: GemmaConfig, how: Computation, tokens: int) -> int:
    """What the backward pass of the last layer takes beyond what is kept: at its GeGLU, or at its attention; under
    `layers`, with what is computed again.
    """
    d, F, b = model.hidden_size, model.intermediate_size, how.itemsize
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    mlp = tokens * (2 * b * F if how.has_kernels else 3 * 4 * F)
    freed = 2 * b * d + 3 * b * F  # of the MLP, when attention's turn has come
    attention = tokens * (b * (3 * q + 2 * kv) - freed)
    if not how.on_gpu:  # cpp/tree_attention.cpp: rows and panels of each operand, of which cpp/workspace.cpp keeps some
        panels = tokens * 4 * (5 * q + kv)
        attention += panels
        mlp += min(panels, CPP_KEPT_BYTES)
    again = sum(kept_by_layer(model, replace(how, checkpointing="none"))) if how.checkpointing == "layers" else 0
    largest_weight = d * max(F, q)
    if not how.on_gpu and not how.maps_blocks:
        again *= 2  # as measured: what one layer has freed the next finds too small
    products = 0 if how.lora else b * largest_weight
    return max(mlp, attention) + tokens * (3 * b * d + again) + products


def head_backward(model: GemmaConfig, how: Computation, action_tokens: int, *, kl: bool) -> int:
    """What the backward pass of the head takes, its gradient of the embedding included."""
    d, V, b = model.hidden_size, model.vocab_size, how.itemsize
    gradient = 0 if how.lora else V * d * b
    if how.on_gpu:
        chunks = action_tokens * (V + d) * b  # of logits, and half of the float32 gradient of the rows
        room = min(max(chunks, linear_log_prob.EXTRA_BYTES), linear_log_prob.MOST_EXTRA_BYTES)
    else:  # cpp/linear_log_prob.cpp: the rows turned, as panels, and their gradient
        room = action_tokens * d * (b + 4 * (1 if how.lora else 2))
    if kl:  # chunks of both distributions, and a float32 gradient beside the head's
        chunks = sum(kl_chunks(model, action_tokens))
        room = max(room, chunks + (0 if how.lora else 4 * V * d)) + 4 * action_tokens * d
    return gradient + room + action_tokens * d * b


def kl_chunks(model: GemmaConfig, action_tokens: int) -> list[int]:
    """Bytes of the logits, and what is made of them, that kernels/linear_kl.py has alive at a time: one block."""
    return [linear_kl.NUM_WORKSPACES * min(linear_log_prob.CHUNK_BYTES, 4 * action_tokens * model.vocab_size)]


def pass_without_gradient(model: GemmaConfig, how: Computation, tokens: int) -> int:
    """The most that a forward pass holds at a time where nothing is kept: that of a reference policy, say."""
    narrow = 0 if how.has_kernels else 2 * 4  # float32 steps of the GeGLU
    return tokens * ((3 * how.itemsize + narrow) * model.intermediate_size + 3 * how.itemsize * model.hidden_size)
