"""Tokens through the model, their keys and values into the cache: by the C++ step where it serves, else layer by layer.

Both do the same: `prefill` takes the tree's tokens that have no keys yet, `draw` the first token after a state, and
`decode` goes on from tokens drawn. On a CPU the C++ step serves, rounding where the layers round. There a sequence's
numbers do not depend on what is computed beside it, to the last bit.
Shapes: T packed tokens, B sequences, N own tokens at most, d model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swirl.kernels import cpu
from swirl.kernels.head_draw import head_draw, head_logits
from swirl.kernels.rope import angles
from swirl.model.gemma import Gemma, Linear
from swirl.sampling.cache import Attend, KeyCache
from swirl.sampling.draw import SamplingParams, draw
from swirl.sampling.token_step import TokenStep, TokenSteps, replays


@dataclass(frozen=True, eq=False)
class Tree:
    """What the states' tokens are and where their keys lie; numpy int32, (T,) each."""

    slots: np.ndarray
    subtree_end: np.ndarray
    position_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class Draws:
    """How B sequences draw up to `steps` tokens; numpy."""

    params: Sequence[SamplingParams]
    uniforms: np.ndarray  # (B, steps) float64
    limits: np.ndarray  # (B,) int32, tokens to draw, at most steps
    is_stop: np.ndarray  # (V,) uint8

    @property
    def temperatures(self) -> np.ndarray:
        return np.array([one.temperature for one in self.params], np.float64)

    @property
    def truncated(self) -> bool:
        """Whether some sequence leaves tokens out."""
        return any(one.truncated for one in self.params)


@dataclass(frozen=True, eq=False)
class Drawn:
    """(B, steps) ids and log-probs, of which each sequence's first counts[b] are drawn."""

    ids: np.ndarray  # int64
    log_probs: np.ndarray  # float64
    counts: np.ndarray  # (B,) int32


def passes_for(model: Gemma, cache: KeyCache) -> StepPasses | LayerPasses:
    """The C++ step where it is built and takes this model, else its layers."""
    embedding = model.model.embed_tokens.weight
    plain = all(isinstance(m, Linear) for layer in model.model.layers for m in _projections(layer))
    plain &= model.lora is None or embedding.dtype != torch.bfloat16  # merged weights round small adapters away
    windows = {layer.self_attn.window for layer in model.model.layers} - {None}
    served = plain and cpu.supports_decode(embedding) and len(windows) < 2
    return StepPasses(model, cache) if served else LayerPasses(model, cache)


def _projections(layer):
    attention, mlp = layer.self_attn, layer.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )


class LayerPasses:
    """By the model's own layers, whose attention is `tree_decode`: any device and dtype."""

    reads_weights_in_place = True  # so that it goes on with others

    def __init__(self, model: Gemma, cache: KeyCache):
        self._model, self._cache = model, cache
        self._captured = TokenSteps(model, cache)

    def _tensors(self, *arrays):
        return [torch.from_numpy(np.ascontiguousarray(a)).to(self._model.device) for a in arrays]

    def prefill(self, input_ids: np.ndarray, states: np.ndarray, tree: Tree) -> torch.Tensor:
        """(n, d) after the final norm, of the tokens at packed indices `states` (n,) int32."""
        none = np.zeros((states.size, 1), np.int32)
        ids, write, positions = self._tensors(input_ids, tree.slots[states], tree.position_ids[states])
        seen = self._tensors(tree.slots, tree.subtree_end, tree.position_ids, states, none, none[:, 0])
        return self._model.model(ids, positions, None, cache=Attend(self._cache, write, seen))

    def draw(self, hidden: torch.Tensor, draws: Draws) -> Drawn:
        """One token a sequence from (B, d) hidden, after the final norm."""
        uniforms, temperatures = self._tensors(draws.uniforms[:, 0], draws.temperatures)
        ids, log_probs = self._drawing(draws)(hidden, uniforms, temperatures)
        counts = np.ones(ids.shape[0], np.int32)
        return Drawn(ids[:, None].cpu().numpy(), log_probs[:, None].double().cpu().numpy(), counts)

    def decode(
        self, tokens: np.ndarray, tree: Tree, states: np.ndarray, own_slots: np.ndarray, own_lengths: np.ndarray,
        draws: Draws,
    ) -> Drawn:  # fmt: skip
        """Go on from `tokens` (B,), of states that end at packed indices `states`, with own_lengths (B,) own tokens in
        own_slots (B, N) before them. A sequence that has stopped goes on unread until the call ends."""
        B, steps = draws.uniforms.shape
        given = self._drawing(draws), B, tree.slots.size, own_slots.shape[1], steps
        if replays(self._model.device) and not draws.truncated:
            token_step = self._captured.of(*given)
        else:
            token_step = TokenStep(self._model, self._cache, *given)
        token_step.load(tokens, tree, states, own_slots, own_lengths, draws)
        for _ in range(steps):
            token_step()
        ids, log_probs = (x[:B, :steps].cpu().numpy() for x in (token_step.ids, token_step.log_probs.double()))
        stops = draws.is_stop[ids].astype(bool)
        counts = np.where(stops.any(1), stops.argmax(1) + 1, steps)
        counts = np.minimum(counts, draws.limits).astype(np.int32)
        return Drawn(ids, log_probs, counts)

    def _drawing(self, draws: Draws):
        """(B, d) after the final norm, uniforms and temperatures to ids and log-probs."""
        weight, softcap = self._model.model.embed_tokens.weight, self._model.config.final_logit_softcapping
        if not draws.truncated:
            return lambda hidden, *numbers: head_draw(hidden, weight, *numbers, softcap=softcap)
        return lambda hidden, *numbers: draw(head_logits(hidden, weight, softcap), *numbers, draws.params)


class StepPasses(LayerPasses):
    """By the C++ step. Draws that leave tokens out go by the layers."""

    reads_weights_in_place = False  # adapters are merged into copies

    def __init__(self, model: Gemma, cache: KeyCache):
        super().__init__(model, cache)
        attention = model.model.layers[0].self_attn
        embedding, config = model.model.embed_tokens.weight, model.config
        self._dtype, self._softcap = embedding.dtype, config.final_logit_softcapping
        self._angles: tuple[int, list] = (0, [])
        self._weights = [_weights_of(layer) for layer in model.model.layers]
        self._fixed = {
            "windows": [layer.self_attn.window or 0 for layer in model.model.layers],
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "eps": config.rms_norm_eps,
            "embed_scale": torch.tensor(config.hidden_size**0.5, dtype=embedding.dtype).item(),
            "scale": attention.scale,
            "softcap": attention.softcap,
            "final_softcap": self._softcap,
        }

    def prefill(self, input_ids, states, tree):
        hidden = torch.empty(states.size, self._model.config.hidden_size, dtype=self._dtype)
        none = np.zeros((states.size, 0), np.int32)
        draws = Draws(
            [_ANY] * states.size, np.zeros((states.size, 0)), np.zeros(states.size, np.int32), self._no_stop()
        )
        self._run(input_ids, tree, states, none, np.zeros(states.size, np.int32), draws, 0, prefilled=hidden)
        return hidden

    def draw(self, hidden, draws):
        if draws.truncated:
            return super().draw(hidden, draws)
        tables, drawn = _tables(draws)
        cpu.draw(hidden.contiguous(), self._embedding(), self._softcap, tables)
        return drawn

    def decode(self, tokens, tree, states, own_slots, own_lengths, draws):
        if draws.truncated:
            return super().decode(tokens, tree, states, own_slots, own_lengths, draws)
        steps = draws.uniforms.shape[1]
        return self._run(tokens, tree, states, own_slots, own_lengths, draws, steps)

    def _run(self, tokens, tree, states, own_slots, own_lengths, draws, steps, prefilled=None):
        tables, drawn = _tables(draws)
        positions = int((tree.position_ids[states] + own_lengths).max()) + steps + 1
        cpu.decode(
            layers=[
                [*weights, *angles, keys, values]
                for weights, angles, keys, values in zip(
                    self._weights, self._rotations(positions), self._cache.keys, self._cache.values, strict=True
                )
            ],
            final_norm=self._model.model.norm.weight.detach(),
            embedding=self._embedding(),
            token=np.ascontiguousarray(tokens, np.int64),
            tree=[tree.slots, tree.subtree_end, tree.position_ids],
            rows=[states, own_slots, own_lengths],
            tables=tables,
            prefilled=prefilled,
            **self._fixed,
        )
        return drawn

    def _embedding(self):
        return self._model.model.embed_tokens.weight.detach()

    def _no_stop(self):
        return np.zeros(self._model.config.vocab_size, np.uint8)

    def _rotations(self, num_positions: int):
        """Of every layer, cos and sin (positions, D / 2); made anew where a longer sequence comes."""
        if num_positions > self._angles[0]:
            num_positions = max(1024, 1 << (num_positions - 1).bit_length())
            kinds = [(layer.self_attn.rope_theta, layer.self_attn.rope_factor) for layer in self._model.model.layers]
            half, dtype = self._model.config.head_dim // 2, torch.promote_types(self._dtype, torch.float32)
            angle = {kind: angles(torch.arange(num_positions), half, *kind, dtype) for kind in set(kinds)}
            made = {kind: (one.cos(), one.sin()) for kind, one in angle.items()}
            self._angles = num_positions, [made[kind] for kind in kinds]
        return self._angles[1]


def _weights_of(layer) -> list[torch.Tensor | None]:
    """What the C++ step reads of a layer, in its order: as the weights are now, a layer with an adapter as a copy."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = attention.q_norm, attention.k_norm
    modules = [
        *(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj, *norms),
        *(attention.o_proj, layer.post_attention_layernorm, layer.pre_feedforward_layernorm),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj, layer.post_feedforward_layernorm),
    ]
    weights = [module.merged() if isinstance(module, Linear) else module and module.weight for module in modules]
    return [None if weight is None else weight.detach().contiguous() for weight in weights]


_ANY = SamplingParams(max_new_tokens=1)


def _tables(draws: Draws):
    """What the C++ draw reads and fills, and the Drawn of it."""
    B, steps = draws.uniforms.shape
    drawn = Drawn(np.zeros((B, steps), np.int64), np.zeros((B, steps)), np.zeros(B, np.int32))
    inputs = [np.ascontiguousarray(draws.uniforms), draws.temperatures, draws.is_stop, draws.limits]
    return [*inputs, drawn.ids, drawn.log_probs, drawn.counts], drawn
