"""The shape of a Gemma, of either generation, and how a config.json says it.

What differs between generations is data: the fields of GemmaConfig, and `GEMMA3`, their values where a Gemma 3 leaves
them out. Nothing else asks which generation a model is of.
Source: Gemma 2 (arXiv:2408.00118), Gemma 3 (arXiv:2503.19786).
"""

from __future__ import annotations

from dataclasses import InitVar, asdict, dataclass, fields

import torch

from swirl.errors import ConfigError

SLIDING, FULL = "sliding_attention", "full_attention"
ARCHITECTURES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}

# What else a config.json may hold that changes the computation, and the only value computed here.
_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
_SPELLED_OTHERWISE = {"qk_norm", "rope_factor", "rope_local_factor"}  # fields that no config.json has under their names


@dataclass(frozen=True)
class GemmaConfig:
    """The shape of a Gemma, under the names of config.json where it has one; the defaults are Gemma 2's.

    `layer_types` says of every layer whether it slides; empty means that each `sliding_window_pattern`-th layer sees
    everything and the others slide. A softcap or window of None is absent. `qk_norm`: queries and keys of every head
    are normalised before they are rotated. Rotation by `rope_theta`, positions divided by `rope_factor`; layers that
    slide take `rope_local_base_freq` and `rope_local_factor` instead, unless the former is None.
    Raises ConfigError on sizes that do not fit together, and on what a config.json of `model_type` could not say.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 256
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = ()
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    rope_local_base_freq: float | None = None
    rope_local_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    bos_token_id: int | None = 2
    model_type: str = "gemma2"
    sliding_window_pattern: InitVar[int] = 2

    def __post_init__(self, sliding_window_pattern):
        for name in (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "num_key_value_heads head_dim max_position_embeddings"
        ).split():
            _require_size(name, getattr(self, name))
        for name in "query_pre_attn_scalar rope_theta rope_factor rope_local_factor rms_norm_eps".split():
            _require_positive(name, getattr(self, name))
        for name in "sliding_window attn_logit_softcapping final_logit_softcapping rope_local_base_freq".split():
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"field 'num_key_value_heads': {self.num_key_value_heads} does not divide "
                f"the {self.num_attention_heads} of num_attention_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"field 'head_dim': expected an even number, got {self.head_dim}")
        if not self.layer_types:
            _require_size("sliding_window_pattern", sliding_window_pattern)
            numbers = range(1, self.num_hidden_layers + 1)
            types = tuple(SLIDING if number % sliding_window_pattern else FULL for number in numbers)
            object.__setattr__(self, "layer_types", types)
        if len(self.layer_types) != self.num_hidden_layers or set(self.layer_types) - {SLIDING, FULL}:
            raise ConfigError(f"field 'layer_types': expected {self.num_hidden_layers} of '{SLIDING}' or '{FULL}'")
        _require_known(self.model_type)
        third = self.model_type == "gemma3_text"
        if self.qk_norm != third or (self.rope_local_base_freq is not None) != third:
            says = "has both" if third else "has neither"
            raise ConfigError(f"field 'model_type': '{self.model_type}' {says} qk_norm and rope_local_base_freq")

    @property
    def num_weights(self) -> int:
        """Of the whole text model; the embedding, which is the head, counted once."""
        d, D, heads = self.hidden_size, self.head_dim, self.num_attention_heads + self.num_key_value_heads
        layer = 2 * d * D * heads + 3 * d * self.intermediate_size + 4 * d + (2 * D if self.qk_norm else 0)
        return self.vocab_size * d + self.num_hidden_layers * layer + d

    def window(self, layer: int) -> int | None:
        """How far back this layer sees, itself included; None is everything."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None

    def rope(self, layer: int) -> tuple[float, float]:
        """(theta, factor) of this layer: pair i of position p is turned by p / factor * theta^(-2i / head_dim)."""
        if self.layer_types[layer] == SLIDING and self.rope_local_base_freq is not None:
            return self.rope_local_base_freq, self.rope_local_factor
        return self.rope_theta, self.rope_factor

    @classmethod
    def from_json(cls, content: dict) -> GemmaConfig:
        """From the content of a config.json of transformers 4 or 5; fields of no effect are passed over.

        Of a `gemma3`, which has a vision tower too, the text part. Raises ConfigError naming the field: an unknown
        architecture, a missing size, a feature that is not computed.
        """
        content = _text_part(content)
        _require_known(content.get("model_type"))
        for name, only in _FIXED.items():
            if content.get(name, only) not in (only, None):
                raise ConfigError(f"field '{name}': {content[name]!r} is not supported, only {only!r}")
        names = {field.name for field in fields(cls)} - _SPELLED_OTHERWISE
        known = dict(GEMMA3) if content["model_type"] == "gemma3_text" else {}
        known |= {name: content[name] for name in names if name in content}
        pattern = content.get("sliding_window_pattern") or content.get("_sliding_window_pattern")
        known |= {"sliding_window_pattern": pattern} if pattern else {}
        known |= _rope_fields(content)
        for name in ("layer_types", "eos_token_id"):
            if isinstance(known.get(name), list):
                known[name] = tuple(known[name])
        known["layer_types"] = known.get("layer_types") or ()
        missing = [field.name for field in fields(cls)[:6] if field.name not in known]
        if missing:
            raise ConfigError(f"field '{missing[0]}' is missing")
        try:
            return cls(**known)
        except TypeError:
            raise ConfigError("fields of the wrong type") from None

    def to_json(self, dtype: torch.dtype = torch.float32, base: dict | None = None) -> dict:
        """The content of config.json: what transformers 4 and 5, vLLM and llama.cpp look for.

        `base` is the content that this config was read from, if any: its fields that are unknown here are kept.
        """
        base = base or {"architectures": [ARCHITECTURES[self.model_type]]}
        name = str(dtype).removeprefix("torch.")
        types = {"dtype": name, "torch_dtype": name}
        content = {key: value for key, value in asdict(self).items() if key not in _SPELLED_OTHERWISE}
        whole = _rope_json(self.rope_theta, self.rope_factor)
        if self.rope_local_base_freq is None:
            del content["rope_local_base_freq"]
            content["rope_parameters"] = whole
        else:
            local = _rope_json(self.rope_local_base_freq, self.rope_local_factor)
            content["rope_parameters"] = {FULL: whole, SLIDING: local}
        scaled = self.rope_factor != 1
        content["rope_scaling"] = {"rope_type": "linear", "factor": self.rope_factor} if scaled else None
        content |= _FIXED | {"initializer_range": 0.02, "use_cache": True} | types
        del content["quantization_config"]
        if "text_config" in base:
            return base | {"text_config": base["text_config"] | content} | types
        return base | content


def _text_part(content: dict) -> dict:
    """The text model's fields; what its part leaves out, the whole may say."""
    if content.get("model_type") != "gemma3":
        return content
    text = content.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"field 'text_config': expected an object, got {text!r}")
    return {**content, "model_type": "gemma3_text", **text}


def _rope_fields(content: dict) -> dict:
    """Angles, as transformers 5 spells them (`rope_parameters`) and as transformers 4 does (`rope_scaling`)."""
    parameters = content.get("rope_parameters") or {}
    by_layer = content["model_type"] == "gemma3_text"
    parts = parameters if by_layer else {FULL: parameters}
    if set(parts) - {FULL, SLIDING} or not all(isinstance(part, dict | None) for part in parts.values()):
        raise ConfigError(f"field 'rope_parameters': {parameters!r} is not supported, only '{FULL}' and '{SLIDING}'")
    whole, local = (_rope_part("rope_parameters", parts.get(name) or {}) for name in (FULL, SLIDING))
    scaling = _rope_part("rope_scaling", content.get("rope_scaling") or {})
    found = {"rope_theta": whole[0], "rope_factor": whole[1] if scaling[1] is None else scaling[1]}
    found |= {"rope_local_base_freq": local[0], "rope_local_factor": local[1]}
    return {name: value for name, value in found.items() if value is not None}


def _rope_part(field: str, part: dict) -> tuple[float | None, float | None]:
    """(theta, factor) where said. Raises ConfigError on any type but default and linear."""
    kind = part.get("rope_type", part.get("type", "default"))
    said = {name for name, value in part.items() if value is not None} - {"rope_type", "type", "rope_theta"}
    if (kind, said) not in (("default", set()), ("linear", {"factor"})):
        raise ConfigError(f"field '{field}': {part!r} is not supported, only the types default and linear")
    return part.get("rope_theta"), part.get("factor")


def _rope_json(theta: float, factor: float) -> dict:
    scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    return {**scaling, "rope_theta": theta}


def _require_known(model_type):
    if model_type not in tuple(ARCHITECTURES):
        raise ConfigError(
            f"field 'model_type': {model_type!r} is not supported, only gemma2, gemma3_text and the text of gemma3"
        )


def _require_size(name, value):
    if type(value) is not int or value < 1:
        raise ConfigError(f"field '{name}': expected a positive integer, got {value!r}")


def _require_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"field '{name}': expected a positive number, got {value!r}")


# A Gemma 3's fields, where its config.json is silent: that of 4b names but five.
GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "qk_norm": True,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "max_position_embeddings": 131_072,
}


def _gemma2(hidden_size, intermediate_size, layers, heads, kv_heads, **changes):
    return GemmaConfig(256_000, hidden_size, intermediate_size, layers, heads, kv_heads, **changes)


def _gemma3(hidden_size, intermediate_size, layers, heads, kv_heads, **changes):
    sizes = dict(hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers)
    heads = dict(num_attention_heads=heads, num_key_value_heads=kv_heads)
    return GemmaConfig(**GEMMA3 | sizes | heads | changes)


_SMALL = dict(vocab_size=262_144, sliding_window=512, max_position_embeddings=32_768)
_LARGE = dict(sliding_window=1024, rope_factor=8.0)
PRESETS = {
    "gemma-2-2b": _gemma2(2304, 9_216, 26, 8, 4),
    "gemma-2-9b": _gemma2(3584, 14_336, 42, 16, 8),
    "gemma-2-27b": _gemma2(4608, 36_864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
    "gemma-3-270m": _gemma3(640, 2_048, 18, 4, 1, **_SMALL),
    "gemma-3-1b": _gemma3(1152, 6_912, 26, 4, 1, **_SMALL),
    "gemma-3-4b": _gemma3(2560, 10_240, 34, 8, 4, **_LARGE),
    "gemma-3-12b": _gemma3(3840, 15_360, 48, 16, 8, **_LARGE),
    "gemma-3-27b": _gemma3(5376, 21_504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168, **_LARGE),
}
