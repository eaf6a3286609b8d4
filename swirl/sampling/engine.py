"""Sampling in this process: many sequences at once, with a cache of keys and values.

Prefill: the distinct states of a wave are packed into prefix trees and pass through the model's own layers,
so a prompt shared by many states is computed once; each sequence gathers its keys by its ancestor path.
Decode: the cache is right-aligned, so a step writes one column for all rows, and a window, which counts
depth, is a slice of columns; only the padding before shorter rows is masked. Rows that are done leave.
Draws: inverse CDF at a uniform hashed from (seed, draw number), so a sequence's draws are its own.
Shapes: B sequences, L columns, T packed tokens, d model, Hq/Hkv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from swirl.errors import NonFiniteError
from swirl.kernels.geglu import geglu
from swirl.model.gemma import Gemma, RMSNorm

PREFILL_TOKENS = 1024  # packed tokens of one prefill pass; a longer state passes alone
KEEP_SHARE = 0.9  # done rows are dropped once a tenth is done: later wastes steps, sooner wastes copies


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled action. `ids` ends with the stop id if `stopped`, else the token limit cut it.

    `log_probs` has one natural log an id, under the distribution it was drawn from: that of the logits divided by the
    temperature. A greedy action (temperature 0) is drawn from none, and has those of temperature 1.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stopped: bool


class Engine:
    """Samples from `model` as its weights are at each call; nothing is kept between calls.

    `max_batch_tokens` bounds the cache: sequences are worked on in waves of at most so many tokens, state and
    new ones together (a longer sequence gets a wave of its own). A token takes
    2 * layers * Hkv * D * itemsize bytes: 2 KiB in the 1M-parameter default, 104 KiB in a bfloat16 2b.
    """

    def __init__(self, model: Gemma, *, max_batch_tokens: int = 1 << 18):
        if max_batch_tokens < 1:
            raise ValueError(f"expected max_batch_tokens of at least 1, got {max_batch_tokens}")
        self.model = model
        self.max_batch_tokens = max_batch_tokens

    @torch.inference_mode()
    def sample(
        self,
        states: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        stop_ids: Iterable[int] = (),
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One Completion a state, in order; a state given n times is drawn from n times, prefilled once.

        Temperature 0 is greedy. Sequence i draws by seeds[i] alone; what it is batched with
        changes its logits by rounding only.
        `progress` is called with the number of sequences finished so far.
        Raises ValueError on an empty state, an id outside the vocabulary or arguments that do not fit, and
        NonFiniteError where the model's log-probs are not finite.
        """
        stop_ids = tuple(stop_ids)
        rows = self._check(states, seeds, max_new_tokens, temperature, stop_ids)
        is_stop = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
        is_stop[list(stop_ids)] = True
        is_stop = is_stop.to(self.model.device)
        completions: list[Completion | None] = [None] * len(states)
        num_finished = 0

        def report(count):
            if progress is not None:
                progress(num_finished + count)

        for wave in self._waves(rows, max_new_tokens):
            uniforms = torch.from_numpy(_uniforms([seeds[i] for i in wave], max_new_tokens))
            uniforms = uniforms.to(self.model.device)
            decoding, hidden = self._prefill([rows[i] for i in wave], max_new_tokens)
            done = _decode(decoding, hidden, uniforms, temperature, is_stop, report)
            for i, completion in zip(wave, done, strict=True):
                completions[i] = completion
            num_finished += len(wave)
        return completions

    def _check(self, states, seeds, max_new_tokens, temperature, stop_ids) -> list[np.ndarray]:
        V = self.model.config.vocab_size
        if len(seeds) != len(states):
            raise ValueError(f"expected one seed a state, got {len(seeds)} for {len(states)}")
        if max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {max_new_tokens}")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"expected a finite temperature of at least 0, got {temperature}")
        if any(not 0 <= stop < V for stop in stop_ids):
            raise ValueError(f"expected stop_ids in [0, {V}), got {stop_ids}")
        rows = []
        for i, state in enumerate(states):
            ids = np.asarray(state)
            if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
                raise ValueError(f"state {i}: expected at least one integer token id, in a flat sequence")
            if ids.min() < 0 or ids.max() >= V:
                raise ValueError(f"state {i}: expected token ids in [0, {V}), got {ids.min()}..{ids.max()}")
            rows.append(ids.astype(np.int64))
        return rows

    def _waves(self, rows, max_new_tokens):
        """Indices in depth-first order of the states' tree, cut where the padded cache would pass its bound.

        Sorting on big-endian bytes sorts as the ids do: states with a common prefix come to lie side by side.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].astype(">u4").tobytes())
        wave, longest = [], 0
        for i in order:
            longest = max(longest, rows[i].size)
            if wave and (len(wave) + 1) * (longest + max_new_tokens) > self.max_batch_tokens:
                yield wave
                wave, longest = [], rows[i].size
            wave.append(i)
        if wave:
            yield wave

    def _prefill(self, rows, max_new_tokens) -> tuple[_Decoding, torch.Tensor]:
        """The cache of the wave's sequences, and the (B, d) hidden state after each one's last token."""
        device, L = self.model.device, max(row.size for row in rows)
        paths = np.zeros((len(rows), L), np.int64)
        layers, last_hidden, num_tokens = [[] for _ in self.model.model.layers], [], 0
        for first, input_ids, position_ids, subtree_end, piece_paths in _pieces(rows):
            cache = []
            fields = (torch.from_numpy(field).to(device) for field in (input_ids, position_ids, subtree_end))
            hidden = self.model.model(*fields, cache=cache)
            for layer, keys_values in zip(layers, cache, strict=True):
                layer.append(keys_values)
            last_hidden.append(hidden[torch.tensor([path[-1] for path in piece_paths], device=device)])
            for row, path in enumerate(piece_paths, first):
                paths[row, L - path.size :] = path + num_tokens
            num_tokens += input_ids.size
        lengths = np.array([row.size for row in rows])
        decoding = _Decoding(self.model, layers, torch.from_numpy(paths).to(device), lengths, max_new_tokens)
        return decoding, torch.cat(last_hidden)


def _pieces(rows):
    """Cut depth-first rows into packed trees of at most PREFILL_TOKENS where states allow.

    Yields (first row, input_ids, position_ids, subtree_end, paths): the fields of a PackedBatch, and for each
    row the packed indices its tokens lie at.
    """
    piece, size = [], 0
    for i, row in enumerate(rows):
        new = row.size - (_num_common(rows[i - 1], row) if piece else 0)
        if piece and size + new > PREFILL_TOKENS:
            yield (i - len(piece), *_tree(piece))
            piece, size, new = [], 0, row.size
        piece.append(row)
        size += new
    yield (len(rows) - len(piece), *_tree(piece))


def _tree(rows):
    input_ids, position_ids, paths = [], [], []
    ends, T = [], 0
    before = path = np.empty(0, np.int64)
    for row in rows:
        common = _num_common(before, row)
        ends.append((path[common:], T))
        path = np.concatenate((path[:common], np.arange(T, T + row.size - common)))
        input_ids.append(row[common:])
        position_ids.append(np.arange(common, row.size, dtype=np.int32))
        paths.append(path)
        before, T = row, T + row.size - common
    ends.append((path, T))
    subtree_end = np.empty(T, np.int32)
    for closed, end in ends:
        subtree_end[closed] = end
    return np.concatenate(input_ids), np.concatenate(position_ids), subtree_end, paths


def _num_common(a, b) -> int:
    """Length of the common prefix."""
    n = min(a.size, b.size)
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


class _Decoding:
    """B sequences in the making: per layer keys and values (B, Hkv, L, D), written up to column `end`.

    `layers` holds each layer's packed (k, v), one pair a prefill pass, and is emptied on the way;
    paths (B, L) says where each row's tokens lie in them, right-aligned.
    """

    def __init__(self, model: Gemma, layers, paths, lengths, max_new_tokens):
        B, L = paths.shape
        self.model, self.config = model, model.config
        self.wide = torch.promote_types(model.dtype, torch.float32)
        self.end = L
        self.position = torch.from_numpy(lengths).to(model.device)
        self.bias = None  # (B, 1, 1, L): -inf on the padding, None where there is none
        if lengths.min() < L:
            columns = torch.arange(L + max_new_tokens, device=model.device)
            hidden_from_row = columns < (L - self.position)[:, None]
            self.bias = torch.zeros(hidden_from_row.shape, dtype=self.wide, device=model.device)
            self.bias.masked_fill_(hidden_from_row, -math.inf)
            self.bias = self.bias[:, None, None, :]
        self.caches = []
        for layer in layers:
            pair = []
            for part in zip(*layer, strict=True):
                packed = torch.cat(part)
                cache = packed.new_empty(B, packed.shape[1], L + max_new_tokens, packed.shape[2])
                cache[:, :, :L] = packed[paths].transpose(1, 2)
                pair.append(cache)
            self.caches.append(pair)
            layer.clear()
        kinds = {model.config.rope(layer) for layer in range(model.config.num_hidden_layers)}
        self.rotations = {kind: self._rotations(int(lengths.max()) + max_new_tokens, *kind) for kind in kinds}
        # 1 + weight, in the wide type, so that a norm is one fused op.
        norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
        self.gains = {norm: 1 + norm.weight.to(self.wide) for norm in norms}

    def _rotations(self, num_positions, theta, factor):
        """(positions, 4, 1, D): cos and signed sin for keys, then for queries, the scores' scale within."""
        config, device = self.config, self.position.device
        half = config.head_dim // 2
        frequency = theta ** (-torch.arange(half, dtype=self.wide, device=device) / half) / factor
        angle = torch.arange(num_positions, dtype=self.wide, device=device)[:, None] * frequency
        cos = angle.cos().repeat(1, 2)
        sin = torch.cat((-angle.sin(), angle.sin()), -1)
        scale = config.query_pre_attn_scalar**-0.5 / (config.attn_logit_softcapping or 1)
        return torch.stack((cos, sin, cos * scale, sin * scale), 1)[:, :, None]

    def keep(self, running) -> torch.Tensor:
        """Drop rows outside the (B,) bool `running`; late rows fill their places. Returns the order left."""
        n = int(running.sum())
        rows = torch.arange(n, device=running.device)
        holes, late = (~running[:n]).nonzero()[:, 0], running[n:].nonzero()[:, 0] + n
        rows[holes] = late
        self.position = self.position[rows]
        if self.bias is not None:
            self.bias = self.bias[rows]
        for pair in self.caches:
            for i, cache in enumerate(pair):
                used = cache[:, :, : self.end]
                used[holes] = used[late]
                pair[i] = cache[:n]
        return rows

    def norm(self, x, module):
        return F.rms_norm(x.to(self.wide), x.shape[-1:], self.gains[module], module.eps).to(x.dtype)

    def logits(self, hidden):
        """(B, V) in the wide type, from (B, d) after the final norm."""
        logits = F.linear(hidden, self.model.model.embed_tokens.weight).to(self.wide)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def step(self, ids):
        """Append one token a row, ids (B,); returns the (B, V) logits of the next."""
        x = self.model.model.embed(ids)
        rotations = {kind: of_kind[self.position].unbind(1) for kind, of_kind in self.rotations.items()}
        for layer, (keys, values) in zip(self.model.model.layers, self.caches, strict=True):
            attention = layer.self_attn
            rotation = rotations[attention.rope_theta, attention.rope_factor]
            h = self.attention(attention, self.norm(x, layer.input_layernorm), rotation, keys, values)
            x = x + self.norm(h, layer.post_attention_layernorm)
            h, mlp = self.norm(x, layer.pre_feedforward_layernorm), layer.mlp
            h = mlp.down_proj(geglu(mlp.gate_proj(h), mlp.up_proj(h)))
            x = x + self.norm(h, layer.post_feedforward_layernorm)
        self.end += 1
        self.position += 1
        return self.logits(self.norm(x, self.model.model.norm))

    def attention(self, attention, x, rotation, keys, values):
        B, D, Hkv = x.shape[0], attention.head_dim, keys.shape[1]
        cos, sin, q_cos, q_sin = rotation
        q, k = attention.q_proj(x).view(B, -1, D), attention.k_proj(x).view(B, -1, D)
        if attention.q_norm is not None:
            q, k = self.norm(q, attention.q_norm), self.norm(k, attention.k_norm)
        q = (q * q_cos + q.roll(D // 2, -1) * q_sin).to(x.dtype)
        keys[:, :, self.end] = k * cos + k.roll(D // 2, -1) * sin
        values[:, :, self.end] = attention.v_proj(x).view(B, Hkv, D)
        seen = slice(0 if attention.window is None else max(0, self.end + 1 - attention.window), self.end + 1)
        scores = (q.view(B, Hkv, -1, D) @ keys[:, :, seen].transpose(2, 3)).to(self.wide)
        if attention.softcap is not None:
            scores = scores.tanh_().mul_(attention.softcap)
        if self.bias is not None:
            scores += self.bias[..., seen]
        mixed = scores.softmax(-1).to(x.dtype) @ values[:, :, seen]
        return attention.o_proj(mixed.view(B, -1))


def _decode(decoding: _Decoding, hidden, uniforms, temperature, is_stop, report) -> list[Completion]:
    """Draw tokens until every row has stopped or used up its (B, max_new_tokens) uniforms."""
    B, max_new_tokens = uniforms.shape
    device = hidden.device
    ids = torch.zeros(B, max_new_tokens, dtype=torch.int64, device=device)
    log_probs = torch.zeros(B, max_new_tokens, dtype=decoding.wide, device=device)
    rows, running = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
    logits, num_running = decoding.logits(hidden), B
    for t in range(max_new_tokens):
        logits = _tempered(logits, temperature)
        drawn = _draw(logits, uniforms[rows, t]) if temperature else logits.argmax(-1)
        ids[rows, t] = drawn
        log_probs[rows, t] = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(-1)
        running &= ~is_stop[drawn]
        num_left = int(running.sum())
        if num_left < num_running:
            report(B - num_left)
            num_running = num_left
        if num_running == 0 or t + 1 == max_new_tokens:
            break
        if num_running <= KEEP_SHARE * len(rows):
            kept = decoding.keep(running)
            rows, drawn, running = rows[kept], drawn[kept], running[kept]
        logits = decoding.step(drawn)
    if num_running:
        report(B)
    # Rows go on until they are dropped: what counts ends with the first stop id.
    stops = is_stop[ids].cpu().numpy()
    stopped = stops.any(1)
    lengths = np.where(stopped, stops.argmax(1) + 1, max_new_tokens)
    completions = []
    for n, end, row, row_log_probs in zip(lengths, stopped, ids.tolist(), log_probs.tolist(), strict=True):
        if not math.isfinite(sum(row_log_probs[:n])):
            raise NonFiniteError("the model's log-probs are not finite: its weights or activations overflow")
        completions.append(Completion(tuple(row[:n]), tuple(row_log_probs[:n]), bool(end)))
    return completions


def _tempered(logits, temperature):
    """(B, V) logits of what is drawn from; greedy ones are those of temperature 1."""
    if temperature in (0, 1):
        return logits
    # Shifted first, so that no temperature, however small, overflows.
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)


def _draw(logits, uniforms):
    """(B,) token ids from (B, V) logits: the first whose cumulative probability passes the row's uniform."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    return drawn[:, 0].clamp_(max=logits.shape[1] - 1)


def _uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """(len(seeds), count) float64 in [0, 1): draw t is splitmix64 at counter t, started at the hashed seed.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = _mix(np.array([int(seed) & (1 << 64) - 1 for seed in seeds], np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64) * gamma
    return (_mix(start[:, None] + counters) >> np.uint64(11)) * 2.0**-53


def _mix(x):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
