"""A request to the engine, from its arrival to the Completion that answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from swirl.sampling.draw import SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled action. `ids` ends with the stop id if `stopped`, else the token limit cut it.

    Where a stop text ended it, `stopped` holds, `stop_text` is that text, and the last of `ids` completes it.
    `log_probs` has one natural log an id, under the distribution it was drawn from: that of the logits divided by the
    temperature. A greedy action (temperature 0) is drawn from none, and has those of temperature 1.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stopped: bool
    stop_text: str | None = None


@dataclass(eq=False)
class InFlight:
    """A request, and what has become of it. `slots` are held from its prefill on: those of the state, then own ones."""

    state: np.ndarray  # int32
    seed: int
    params: SamplingParams
    on_end: Callable[[Completion | BaseException], None]
    on_tokens: Callable[[tuple[int, ...], tuple[float, ...]], None] | None = None
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    slots: np.ndarray | None = None
    packed_index: int = -1
    dropped: bool = False  # no one waits for it any more

    @property
    def own_slots(self) -> np.ndarray:
        return self.slots[self.state.size :]

    @property
    def num_left(self) -> int:
        return self.params.max_new_tokens - len(self.ids)

    def cut_at_stop_text(self, num_before: int, decode: Callable[[Sequence[int]], str]) -> str | None:
        """The stop text that the tokens after the first `num_before` complete, if any; those behind it are dropped."""
        text = decode(self.ids)
        if not any(stop in text for stop in self.params.stop_texts):
            return None
        for count in range(num_before + 1, len(self.ids) + 1):
            text = decode(self.ids[:count])
            for stop in self.params.stop_texts:
                if stop in text:
                    del self.ids[count:], self.log_probs[count:]
                    return stop
        return None
