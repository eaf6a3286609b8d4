"""Gemma 2, over packed trees.

One layer:  x += norm(attention(norm(x)));  x += norm(mlp(norm(x))).
Every token sees its ancestors alone (swirl.kernels.tree_attention), so one pass serves a whole forest of
sub-trajectories; an ordinary sequence is the tree without forks. Where no tree forks, other libraries' kernels
can do the same (`attention`, swirl.kernels.chain_attention); they are never chosen by themselves.
Modules bear the names of Hugging Face checkpoints: `state_dict()` is what the safetensors hold.
Shapes: T packed tokens, M action tokens, S sub-trajectories, d model, Hq/Hkv heads, D head dim, V vocabulary.
Source: Gemma 2 (arXiv:2408.00118); numerics as in google/gemma_pytorch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from swirl.errors import CheckpointError, ConfigError
from swirl.kernels.chain_attention import Chains, ForkError, chain_attention, chain_lengths, refusal
from swirl.kernels.geglu import geglu
from swirl.kernels.linear import linear
from swirl.kernels.linear_log_prob import linear_log_prob
from swirl.kernels.rms_norm import rms_norm
from swirl.kernels.rope import rope
from swirl.kernels.tree_attention import tree_attention
from swirl.model import checkpoint

SLIDING, FULL = "sliding_attention", "full_attention"
EMBEDDING = "model.embed_tokens.weight"

# What else a config.json may hold that changes the computation, and the only value computed here.
_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "rope_scaling": None,
    "quantization_config": None,
}


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma, under the names of config.json.

    `layer_types` says of every layer whether it slides; empty means Gemma 2's alternation, sliding first.
    A softcap or window of None is absent. Raises ConfigError on sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 256
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = ()
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2

    def __post_init__(self):
        if not self.layer_types:
            types = tuple(FULL if layer % 2 else SLIDING for layer in range(self.num_hidden_layers))
            object.__setattr__(self, "layer_types", types)
        sizes = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim query_pre_attn_scalar max_position_embeddings"
        )
        for name in sizes.split():
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"field '{name}': expected a positive integer, got {value!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            _require_positive(name, getattr(self, name))
        for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"field 'num_key_value_heads': {self.num_key_value_heads} does not divide "
                f"the {self.num_attention_heads} of num_attention_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"field 'head_dim': expected an even number, got {self.head_dim}")
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - {SLIDING, FULL}:
            raise ConfigError(f"field 'layer_types': expected {self.num_hidden_layers} of '{SLIDING}' or '{FULL}'")

    def window(self, layer: int) -> int | None:
        """How far back this layer sees, itself included; None is everything."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    @classmethod
    def from_json(cls, content: dict) -> GemmaConfig:
        """From the content of a config.json of transformers 4 or 5; fields of no effect are passed over.

        Raises ConfigError naming the field: an unknown architecture, a missing size, a feature not computed.
        """
        if content.get("model_type") != "gemma2":
            raise ConfigError(f"field 'model_type': expected 'gemma2', got {content.get('model_type')!r}")
        for name, only in _FIXED.items():
            if content.get(name, only) not in (only, None):
                raise ConfigError(f"field '{name}': {content[name]!r} is not supported, only {only!r}")
        known = {name: content[name] for name in (field.name for field in fields(cls)) if name in content}
        rope_parameters = content.get("rope_parameters") or {}
        if rope_parameters.get("rope_type", "default") != "default" or set(rope_parameters) - {
            "rope_type",
            "rope_theta",
        }:
            raise ConfigError(f"field 'rope_parameters': {rope_parameters} is not supported, only the default type")
        if "rope_theta" in rope_parameters:
            known["rope_theta"] = rope_parameters["rope_theta"]
        for name in ("layer_types", "eos_token_id"):
            if isinstance(known.get(name), list):
                known[name] = tuple(known[name])
        known["layer_types"] = known.get("layer_types") or ()
        try:
            return cls(**known)
        except TypeError:
            required = [field.name for field in fields(cls)][:6]
            missing = [name for name in required if name not in known]
            raise ConfigError(f"field '{missing[0]}' is missing" if missing else "fields of the wrong type") from None

    def to_json(self, dtype: torch.dtype = torch.float32) -> dict:
        """The content of config.json: what transformers 4 and 5, vLLM and llama.cpp look for."""
        name = str(dtype).removeprefix("torch.")
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **asdict(self),
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": name,
            "torch_dtype": name,
        }


def _require_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"field '{name}': expected a positive number, got {value!r}")


def _require_attention(backend, config: GemmaConfig, dtype, device):
    if backend == "tree":
        return
    reason = refusal(
        backend, head_dim=config.head_dim, softcap=config.attn_logit_softcapping, dtype=dtype, device=device
    )
    if reason:
        raise ConfigError(f"attention '{backend}' {reason}")


PRESETS = {
    "2b": GemmaConfig(256_000, 2304, 9_216, 26, 8, 4, head_dim=256, query_pre_attn_scalar=256),
    "9b": GemmaConfig(256_000, 3584, 14_336, 42, 16, 8, head_dim=256, query_pre_attn_scalar=256),
    "27b": GemmaConfig(256_000, 4608, 36_864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
}


class Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x):
        return linear(x, self.weight)


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
        self.rope_theta = config.rope_theta
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcapping
        self.window = config.window(layer)
        self.q_proj = Linear(d, config.num_attention_heads * D)
        self.k_proj = Linear(d, config.num_key_value_heads * D)
        self.v_proj = Linear(d, config.num_key_value_heads * D)
        self.o_proj = Linear(config.num_attention_heads * D, d)

    def forward(self, x, position_ids, subtree_end, cache=None, chains=None):
        T = x.shape[0]
        q = rope(self.q_proj(x).view(T, -1, self.head_dim), position_ids, theta=self.rope_theta)
        k = rope(self.k_proj(x).view(T, -1, self.head_dim), position_ids, theta=self.rope_theta)
        v = self.v_proj(x).view(T, -1, self.head_dim)
        if cache is not None:
            cache.append((k, v))
        options = {"scale": self.scale, "softcap": self.softcap, "window": self.window}
        if chains is None:
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

    def forward(self, x):
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


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

    def forward(self, x, position_ids, subtree_end, cache=None, chains=None):
        mixed = self.self_attn(self.input_layernorm(x), position_ids, subtree_end, cache, chains)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids):
        weight = self.embed_tokens.weight
        # sqrt(d) is rounded to the model's dtype before the product: 55.5 for d = 3072 in bfloat16.
        scale = torch.tensor(weight.shape[1] ** 0.5, dtype=weight.dtype, device="cpu").item()
        return self.embed_tokens(input_ids) * scale

    def forward(self, input_ids, position_ids, subtree_end, *, recompute=False, cache=None, chains=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            if recompute and torch.is_grad_enabled():
                x = recomputed(layer, x, position_ids, subtree_end, None, chains, use_reentrant=False)
            else:
                x = layer(x, position_ids, subtree_end, cache, chains)
        return self.norm(x)


class Gemma(nn.Module):
    """A Gemma 2 language model with a tied head.

    New weights are drawn by `init_weights(seed)`; `from_pretrained` reads them from a Hugging Face folder.
    `recompute` trades a second forward of every layer, in the backward pass, for its activations.
    `attention` says who computes the attention of a batch: see `use_attention`.
    """

    def __init__(self, config: GemmaConfig, *, recompute: bool = False):
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.attention = "tree"
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
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

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
        return self.model(input_ids, position_ids, subtree_end, recompute=self.recompute, chains=chains)

    def token_log_probs(self, batch) -> torch.Tensor:
        """(M,) log-prob of each action token of a PackedBatch, float32 (float64 for float64), differentiable.

        The head runs on `batch.source_rows` alone and never holds (M, V) logits.
        """
        hidden = self.hidden(batch.input_ids, batch.position_ids, batch.subtree_end, batch.chain_lengths)
        return linear_log_prob(
            hidden[batch.source_rows],
            self.model.embed_tokens.weight,
            batch.target_ids,
            softcap=self.config.final_logit_softcapping,
        )

    def forward(self, batch) -> torch.Tensor:
        """`token_log_probs`, where a wrapper (data parallel, sharding) wants to be called."""
        return self.token_log_probs(batch)

    def sub_trajectory_log_probs(self, batch) -> torch.Tensor:
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
        recompute: bool = False,
        attention: str = "tree",
    ) -> Gemma:
        """Read a Hugging Face folder (config.json, safetensors), never holding the weights twice.

        Raises CheckpointError where the folder is missing, truncated, or not a Gemma 2, and ConfigError, before
        any weight is read, where `attention` cannot compute it (`use_attention`).
        """
        content = checkpoint.read_json(os.path.join(path, "config.json"))
        try:
            config = GemmaConfig.from_json(content)
        except ConfigError as error:
            raise CheckpointError(os.path.join(path, "config.json"), str(error)) from None
        _require_attention(attention, config, dtype, torch.device(device))
        with torch.device("meta"):
            model = cls(config, recompute=recompute)
        model.attention = attention
        checkpoint.load_weights(model, path, dtype=dtype, device=device, tied={"lm_head.weight": EMBEDDING})
        return model

    def save_pretrained(self, path: str | os.PathLike, tokenizer=None) -> None:
        """Write a Hugging Face folder, with the tokenizer's files if given; aside, then renamed into place.

        Raises CheckpointError where it cannot be written, where `path` holds something that is no checkpoint,
        or where the tokenizer does not fit the model.
        """
        if tokenizer is not None:
            checkpoint.check_tokenizer_fits(tokenizer, self.config.vocab_size, path)
        checkpoint.save(self.state_dict(), self.config.to_json(self.dtype), path, tokenizer)
