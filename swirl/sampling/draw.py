"""What is drawn, and how: parameters, uniforms hashed from (seed, position), and draws that leave unlikely tokens out.

B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from swirl.kernels.head_draw import drawn_from, tempered


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is drawn. Temperature 0 is greedy; an action ends with one of `stop_ids`, with the token that
    completes one of `stop_texts`, or after `max_new_tokens`.

    `top_k` (0: all), `top_p` and `min_p` leave out unlikely tokens: what is left is drawn from, and its log-probs are
    of that distribution. Raises ValueError on what does not fit.
    """

    max_new_tokens: int
    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens of at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"expected a finite temperature of at least 0, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"expected top_k of 0 or more, top_p in (0, 1] and min_p in [0, 1], "
                f"got {self.top_k}, {self.top_p} and {self.min_p}"
            )
        if not all(self.stop_texts):
            raise ValueError("expected stop_texts that are not empty")

    @property
    def truncated(self) -> bool:
        """Whether some tokens are left out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def draw(
    logits: torch.Tensor, uniforms: torch.Tensor, temperatures: torch.Tensor, params: Sequence[SamplingParams]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) token ids and (B,) log-probs from (B, V) logits, (B,) float64 uniforms and temperatures, of what `params`
    leave in. Where they leave out nothing, `head_draw` does the same from hidden states.
    """
    logits = tempered(logits, temperatures)
    logits = torch.stack([_truncated(row, one) for row, one in zip(logits, params, strict=True)])
    return drawn_from(logits, uniforms, temperatures)


def _truncated(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(V,) logits with those left out at -inf; the likeliest always stays."""
    if not params.truncated or params.temperature == 0:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    p = ordered.softmax(-1)
    kept = (p.cumsum(-1) - p < params.top_p) & (p >= params.min_p * p[0])
    if params.top_k:
        kept[params.top_k :] = False
    kept[0] = True
    return torch.full_like(logits, -math.inf).scatter_(0, order[kept], ordered[kept])


def uniforms(seeds: Sequence[int], first: Sequence[int], count: int) -> np.ndarray:
    """(len(seeds), count) float64 in [0, 1): of sequence i, draws first[i], first[i] + 1, ...

    Draw t is splitmix64 at counter t, started at the hashed seed: it depends on (seed, t) alone.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    start = mix(np.array([int(seed) & (1 << 64) - 1 for seed in seeds], np.uint64))
    counters = (np.asarray(first, np.uint64)[:, None] + np.arange(1, count + 1, dtype=np.uint64)) * gamma
    return (mix(start[:, None] + counters) >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
