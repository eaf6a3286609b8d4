"""One token of every sequence in flight, as a function over tensors that stay where they are.

A GPU replays it as a CUDA graph: a launch a token instead of 17 a layer and 19 more, and no token waits for the host.
A graph reads and writes fixed addresses: so what a decode call says is copied into buffers, whose sizes are
rounded up, so that few graphs serve all calls. Beyond what was copied they are zero: such a sequence draws greedily
and writes to slot 0, which is of no one. Tokens of the tree beyond it are trees of their own, which no state ends in.
On a CPU the same function runs as it is, over buffers of the call's own sizes. The capture was never run: no GPU was.
Shapes: B sequences, T packed tokens, N own tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from swirl.model.gemma import Gemma
from swirl.sampling.cache import Attend, KeyCache

if TYPE_CHECKING:
    from swirl.sampling.passes import Draws, Tree

MAX_GRAPHS = 64  # kept; the one unused for longest gives way
Draw = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class TokenStep:
    """Draws `ids` and `log_probs`, (B, steps) on the model's device: a column each time it is called, after `load`.

    `draw` takes (B, d) hidden states, uniforms and temperatures to ids and log-probs, (B,) each.
    """

    def __init__(self, model: Gemma, cache: KeyCache, draw: Draw, B: int, T: int, N: int, steps: int):
        zeros = partial(torch.zeros, dtype=torch.int32, device=model.device)
        self._model, self._cache, self._draw = model, cache, draw
        self._tree = [zeros(T), torch.arange(1, T + 1, dtype=torch.int32, device=model.device), zeros(T)]
        self._states, self._own_slots, self._own_lengths, self._limits = zeros(B), zeros(B, N), zeros(B), zeros(B)
        self._token, self._step = zeros(B, dtype=torch.int64), zeros(1, dtype=torch.int64)
        self._uniforms, self._temperatures = zeros(B, steps, dtype=torch.float64), zeros(B, dtype=torch.float64)
        self.ids = zeros(B, steps, dtype=torch.int64)
        self.log_probs = zeros(B, steps, dtype=torch.promote_types(model.dtype, torch.float32))
        self._run = self._one_token

    def load(
        self, tokens: np.ndarray, tree: Tree, states: np.ndarray, own_slots: np.ndarray, own_lengths: np.ndarray,
        draws: Draws,
    ) -> None:  # fmt: skip
        """What `LayerPasses.decode` is given."""
        T = self._tree[1].numel()
        subtree_end = np.concatenate((tree.subtree_end, np.arange(tree.slots.size + 1, T + 1, dtype=np.int32)))
        buffers = [*self._tree, self._states, self._own_slots, self._own_lengths, self._limits, self._token]
        arrays = [tree.slots, subtree_end, tree.position_ids, states, own_slots, own_lengths, draws.limits, tokens]
        buffers += [self._uniforms, self._temperatures]
        arrays += [draws.uniforms, draws.temperatures]
        for buffer, array in zip(buffers, arrays, strict=True):
            buffer.zero_()[tuple(map(slice, array.shape))].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        self._step.zero_()

    def __call__(self) -> None:
        self._run()

    def _one_token(self) -> None:
        lengths, step = self._own_lengths, self._step
        # past its limit a sequence writes for no one
        write = self._own_slots.gather(1, lengths.long()[:, None])[:, 0] * (self._limits > step)
        lengths += 1
        attend = Attend(self._cache, write, [*self._tree, self._states, self._own_slots, lengths])
        positions = self._tree[2][self._states.long()] + lengths
        hidden = self._model.model(self._token, positions, None, cache=attend)
        ids, log_probs = self._draw(hidden, self._uniforms.index_select(1, step)[:, 0], self._temperatures)
        self._token.copy_(ids)
        self.ids.index_copy_(1, step, ids[:, None])
        self.log_probs.index_copy_(1, step, log_probs[:, None])
        step += 1

    def capture(self, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
        """From here on a call replays what is captured now, in memory of `pool`, which other graphs use too.

        Before `load`: what is run first, to compile kernels and make tables that are kept, writes to slot 0 alone.
        """
        device, graph = self._model.device, torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._one_token()
            torch.cuda.current_stream().wait_stream(stream)
            # other threads may go on with a GPU of theirs meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._one_token()

        def replay():
            with torch.cuda.device(device):
                graph.replay()

        self._run = replay


class TokenSteps:
    """The captured step for every call: one a bucket of sizes, as long as weights and pools lie where they lay.

    Weights that change in place, as an optimizer's step changes them, need no new capture.
    """

    def __init__(self, model: Gemma, cache: KeyCache):
        self._model, self._cache = model, cache
        self._captured: dict[tuple[int, ...], TokenStep] = {}
        self._addresses: tuple[int, ...] = ()
        self._memory = None  # pool and stream, of all graphs

    def of(self, draw: Draw, B: int, T: int, N: int, steps: int) -> TokenStep:
        """One that takes B sequences, T packed tokens, N own tokens and so many steps; `draw` the same in all calls."""
        model, cache = self._model, self._cache
        addresses = tuple(x.data_ptr() for x in (*model.parameters(), *cache.keys, *cache.values))
        if addresses != self._addresses:
            self._captured, self._addresses, self._memory = {}, addresses, None
        sizes = rounded_up(B), rounded_up(T, 256), rounded_up(N, 64), rounded_up(steps, 8)
        step = self._captured.pop(sizes, None)
        if step is None:
            # one stream: each that has multiplied matrices keeps a workspace
            self._memory = self._memory or (torch.cuda.graph_pool_handle(), torch.cuda.Stream(model.device))
            step = TokenStep(model, cache, draw, *sizes)
            step.capture(*self._memory)
        self._captured[sizes] = step  # the last one used is the last
        if len(self._captured) > MAX_GRAPHS:
            del self._captured[next(iter(self._captured))]
        return step


def replays(device: torch.device) -> bool:
    """Whether steps are captured there."""
    return device.type == "cuda"


def rounded_up(n: int, least: int = 1) -> int:
    """The least of `least` and its doubles, and of 3/2 of these, that is n or more."""
    while n > least:
        if least % 2 == 0 and n <= least + least // 2:
            return least + least // 2
        least *= 2
    return least
