"""Gemma 2 and Gemma 3 over packed trees; which of them is a matter of the config (swirl.model.config).

One layer:  x += norm(attention(norm(x)));  x += norm(mlp(norm(x))).
Every token sees its ancestors alone (swirl.kernels.tree_attention), so one pass serves a whole forest of
sub-trajectories; an ordinary sequence is the tree without forks. Where no tree forks, other libraries' kernels
can do the same (`attention`, swirl.kernels.chain_attention); they are never chosen by themselves.
Modules bear the names of Hugging Face checkpoints: `state_dict()` is what the safetensors hold.
Shapes: T packed tokens, M action tokens, S sub-trajectories, d model, Hq/Hkv heads, D head dim, V vocabulary.
Source: Gemma 2 (arXiv:2408.00118), Gemma 3 (arXiv:2503.19786); numerics as in google/gemma_pytorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from swirl.errors import ConfigError
from swirl.kernels.chain_attention import Chains, ForkError, chain_attention, chain_lengths, refusal
from swirl.kernels.geglu import geglu
from swirl.kernels.linear import linear
from swirl.kernels.linear_log_prob import linear_log_prob
from swirl.kernels.norm_rope import norm_rope
from swirl.kernels.rms_norm import norm_add_norm, rms_norm
from swirl.kernels.rope import rope
from swirl.kernels.tree_attention import tree_attention
from swirl.model import checkpoint
from swirl.model.config import GemmaConfig
from swirl.model.remade import kept_as
from swirl.tree.batch import PackedBatch

if TYPE_CHECKING:
    from swirl.model.lora import LoRA

EMBEDDING = "model.embed_tokens.weight"
ActivationCheckpointing = Literal["none", "cheap", "layers"]


def _require_attention(backend, config: GemmaConfig, dtype, device):
    if backend == "tree":
        return
    reason = refusal(
        backend, head_dim=config.head_dim, softcap=config.attn_logit_softcapping, dtype=dtype, device=device
    )
    if reason:
        raise ConfigError(f"attention '{backend}' {reason}")


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return linear(x, self.weight)

    def merged(self) -> torch.Tensor:
        """(out, in) the one weight that computes what `forward` does; an adapter makes it another (model/lora.py)."""
        return self.weight


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, eps=self.eps)


class Attention(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        d, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.rope_theta, self.rope_factor = config.rope(layer)
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        self.window = config.window(layer)
        self.q_proj = Linear(d, config.num_attention_heads * D)
        self.k_proj = Linear(d, config.num_key_value_heads * D)
        self.v_proj = Linear(d, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, d)
        self.q_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, config.rms_norm_eps) if config.qk_norm else None

    def normed_and_rotated(self, x, norm, position_ids):
        """Queries or keys, (T, H * D), as attention takes them: (T, H, D)."""
        x = x.view(x.shape[0], -1, self.head_dim)
        angles = {"theta": self.rope_theta, "factor": self.rope_factor}
        if norm is None:
            return rope(x, position_ids, **angles)
        return norm_rope(x, norm.weight, position_ids, eps=norm.eps, **angles)

    def forward(self, x, position_ids, subtree_end, cache=None, chains=None, make_x=None):
        with kept_as(make_x, x):
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = self.normed_and_rotated(q, self.q_norm, position_ids)
        k = self.normed_and_rotated(k, self.k_norm, position_ids)
        v = v.view(k.shape)
        options = {"scale": self.scale, "softcap": self.softcap, "window": self.window}
        if cache is not None:  # sampling: keys and values are kept there, and attended to
            mixed = cache(q, k, v, **options)
        elif chains is None:
            mixed = tree_attention(q, k, v, subtree_end, position_ids, **options)
        else:
            mixed = chain_attention(q, k, v, chains, **options)
        return self.o_proj(mixed.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x, make_x=None):
        with kept_as(make_x, x):
            gate, up = self.gate_proj(x), self.up_proj(x)
        mixed = geglu(gate, up)
        with kept_as(make_x and partial(geglu, gate.detach(), up.detach()), mixed):
            return self.down_proj(mixed)


class Layer(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(d, eps)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.pre_feedforward_layernorm = RMSNorm(d, eps)
        self.post_feedforward_layernorm = RMSNorm(d, eps)

    def forward(self, x, position_ids, subtree_end, cache=None, chains=None, cheap=False):
        """With `cheap`, what the linear layers read is not kept for the backward pass, but made again in it."""
        make = partial(self.input_layernorm, x.detach()) if cheap else None
        mixed = self.self_attn(self.input_layernorm(x), position_ids, subtree_end, cache, chains, make)
        post, pre, last = self.post_attention_layernorm, self.pre_feedforward_layernorm, self.post_feedforward_layernorm
        x, normed = norm_add_norm(mixed, post.weight, x, pre.weight, eps=post.eps)
        make = partial(pre, x.detach()) if cheap else None
        return rms_norm(self.mlp(normed, make), last.weight, eps=last.eps, residual=x)


class Decoder(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        # Given a weight it draws none, which would be overwritten, and on meta would load torch's compiler: seconds.
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids):
        weight = self.embed_tokens.weight
        # sqrt(d) is rounded to the model's dtype before the product: 55.5 for d = 3072 in bfloat16.
        scale = torch.tensor(weight.shape[1] ** 0.5, dtype=weight.dtype, device="cpu").item()
        return self.embed_tokens(input_ids) * scale

    def forward(
        self, input_ids, position_ids, subtree_end, *, activation_checkpointing="none", cache=None, chains=None
    ):
        x = self.embed(input_ids)
        mode = activation_checkpointing if torch.is_grad_enabled() else "none"
        for layer in self.layers:
            if mode == "layers":
                x = recomputed(layer, x, position_ids, subtree_end, None, chains, use_reentrant=False)
            else:
                x = layer(x, position_ids, subtree_end, cache, chains, cheap=mode == "cheap")
        return self.norm(x)


class Gemma(nn.Module):
    """A Gemma 2 or Gemma 3 language model with a tied head.

    New weights are drawn by `init_weights(seed)`; `from_pretrained` reads them from a Hugging Face folder.
    `activation_checkpointing` says what the backward pass computes again rather than keep: `none`, what is `cheap` (the
    inputs of linear layers that norms and the GeGLU make), or whole `layers`. Log-probs and gradients are the same.
    `attention` says who computes the attention of a batch: see `use_attention`.
    """

    def __init__(self, config: GemmaConfig, *, activation_checkpointing: ActivationCheckpointing = "none"):
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.attention = "tree"
        self.origin: checkpoint.Origin | None = None  # the folder it was read from
        self.lora: LoRA | None = None  # the shape of its adapters (swirl.model.lora)
        self.sharding = None  # swirl.learning.sharding.Sharding, where its weights lie in shards over ranks
        self.model = Decoder(config)

    def use_attention(self, backend: str) -> Gemma:
        """`tree` (swirl's own, any forest), or `flash` or `xformers`, which take batches without forks alone.

        Of `hidden` and what calls it; sampling packs states into trees and always takes `tree`.
        Raises ConfigError where the backend cannot compute this model as it is: its softcap, head_dim, dtype,
        device, or a package that is not installed.
        """
        _require_attention(backend, self.config, self.dtype, self.device)
        self.attention = backend
        return self

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Gemma:
        """Normal with std 0.02, norms zero (a gain of 1). A seed gives the same weights on every device."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights lie; batches go there before they are computed."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of what is computed between layers, and of the weights, but that shards are wider; log-probs are float32 at
        least.
        """
        return self.sharding.dtype if self.sharding else self.model.embed_tokens.weight.dtype

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        subtree_end: torch.Tensor,
        lengths: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """After the final norm: (T, d) in the model's dtype, from the (T,) fields of a packed forest.

        `lengths` are those of its chains, read from the fields where absent. Raises ConfigError where
        `attention` is not `tree` and the forest forks, or the model has moved where it cannot be computed.
        """
        chains = None
        if self.attention != "tree":
            _require_attention(self.attention, self.config, self.dtype, self.device)
            try:
                lengths = lengths or chain_lengths(subtree_end, position_ids)
            except ForkError as fork:
                raise ConfigError(
                    f"attention '{self.attention}' computes chains alone, and this batch forks at token "
                    f"{fork.token}: use attention 'tree', or pack each trajectory's recorded actions apart"
                ) from None
            chains = Chains(self.attention, lengths, self.device)
        return self.model(
            input_ids, position_ids, subtree_end, activation_checkpointing=self.activation_checkpointing, chains=chains
        )

    def token_log_probs(self, batch: PackedBatch, *, temperature: float = 1.0) -> torch.Tensor:
        """(M,) log-prob of each action token of a PackedBatch, float32 (float64 for float64), differentiable.

        Of softmax(logits / temperature), the distribution that the engine draws from at that temperature.
        The head runs on `batch.source_rows` alone and never holds (M, V) logits.
        """
        return self.head_log_probs(self.action_hidden(batch), batch.target_ids, temperature=temperature)

    def action_hidden(self, batch: PackedBatch) -> torch.Tensor:
        """(M, d) hidden states that predict each action token, in the model's dtype."""
        hidden = self.hidden(batch.input_ids, batch.position_ids, batch.subtree_end, batch.chain_lengths)
        # An embedding look-up, not hidden[rows]: at a fork rows repeat, and torch sums the gradients of an index in an
        # order that changes from run to run.
        return F.embedding(batch.source_rows, hidden)

    def head_log_probs(
        self, hidden: torch.Tensor, target_ids: torch.Tensor, *, temperature: float = 1.0, return_entropy: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(M,) log-prob of each target from its (M, d) hidden state; with `return_entropy`, (log-probs, the (M,)
        entropies of the distributions in nats).
        """
        hidden, softcap = self.at_temperature(hidden, temperature)
        weight = self.model.embed_tokens.weight
        return linear_log_prob(hidden, weight, target_ids, softcap=softcap, return_entropy=return_entropy)

    def at_temperature(self, hidden: torch.Tensor, temperature: float) -> tuple[torch.Tensor, float | None]:
        """(hidden, softcap) whose logits are those of `hidden` divided by the temperature."""
        softcap = self.config.final_logit_softcapping
        if temperature == 1.0:
            return hidden, softcap
        # softcap * tanh(x / softcap) / T = softcap / T * tanh((x / T) / (softcap / T))
        return hidden / temperature, None if softcap is None else softcap / temperature

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """`token_log_probs`, where a wrapper (data parallel, sharding) wants to be called."""
        return self.token_log_probs(batch)

    def sub_trajectory_log_probs(self, batch: PackedBatch) -> torch.Tensor:
        """(S,) log-prob of every action: the sums of `token_log_probs` by sub-trajectory."""
        log_probs = self.token_log_probs(batch)
        sums = log_probs.new_zeros(batch.num_sub_trajectories)
        return sums.index_add(0, batch.sub_trajectory, log_probs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        activation_checkpointing: ActivationCheckpointing = "none",
        attention: str = "tree",
        prepare: Callable[[Gemma], object] | None = None,
    ) -> Gemma:
        """Read a Hugging Face folder (config.json, safetensors), never holding the weights twice.

        `prepare` is called with the model while it is on the meta device: to shard it, say, before weights are read.
        Of a Gemma 3 that sees, the text model alone; `save_pretrained` copies the rest from the folder it came from.
        Raises CheckpointError where the folder is missing, truncated, or holds another architecture, and ConfigError,
        before any weight is read, where `attention` cannot compute it (`use_attention`).
        """
        content, config = checkpoint.read_config(path)
        _require_attention(attention, config, dtype, torch.device(device))
        with torch.device("meta"):
            model = cls(config, activation_checkpointing=activation_checkpointing)
        model.attention = attention
        model.to(dtype)
        if prepare is not None:
            prepare(model)
        prefix, others = checkpoint.load_weights(model, path, device=device, tied={"lm_head.weight": EMBEDDING})
        generation = os.path.join(path, "generation_config.json")
        generation = checkpoint.read_json(generation) if os.path.isfile(generation) else {}
        model.origin = checkpoint.Origin(Path(path).resolve(), content, prefix, others, generation)
        return model

    def save_pretrained(self, path: str | os.PathLike, tokenizer=None) -> None:
        """Write a Hugging Face folder, with the tokenizer's files if given; aside, then renamed into place.

        What the folder it was read from held besides the text model is kept: fields of its config.json and of its
        generation_config.json that are unknown here, its tokenizer unless another is given, and a vision tower's
        weights. Adapters are merged into what is written. Raises CheckpointError where it cannot be written, where
        `path` holds something that is no checkpoint, where the tokenizer does not fit the model, or where such weights
        are no longer to be found.
        """
        if tokenizer is not None:
            checkpoint.check_tokenizer_fits(tokenizer, self.config.vocab_size, path)
        config = self.config.to_json(self.dtype, self.origin and self.origin.config)
        checkpoint.save(self.merged_weights(), config, path, tokenizer, self.origin)

    @torch.no_grad()
    def merged_weights(self) -> dict[str, torch.Tensor]:
        """By the names of a checkpoint, with every adapter merged; without adapters the weights themselves."""
        layers = {name: module for name, module in self.named_modules() if isinstance(module, Linear)}
        others = {name: weight for name, weight in self.state_dict().items() if ".lora_" not in name}
        return others | {f"{name}.weight": layer.merged().detach() for name, layer in layers.items()}
