"""Sampling in this process: many sequences in flight at once, over one cache of keys and values.

A request waits until there is room. Then the tokens of its state that no one has computed yet are prefilled, in large
pieces together with those of others, and its sequence joins those that are decoded, a few tokens a call. A sequence
that ends makes room at once; its keys stay until the room is wanted, for the states that go on from it.
`sample` draws many and returns; `generate` is awaited, by as many tasks as like. Both share what is in flight.
Draws: inverse CDF at a uniform hashed from (seed, position), so a sequence's draws are its own.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch

from swirl.errors import ConfigError, NonFiniteError
from swirl.model.gemma import Gemma
from swirl.sampling.cache import KeyCache
from swirl.sampling.draw import SamplingParams, uniforms
from swirl.sampling.in_flight import Completion, InFlight
from swirl.sampling.passes import Drawn, Draws, Tree, passes_for
from swirl.tree.pack import pack_states

PREFILL_TOKENS = 1024  # of one prefill pass: activations are held for so many
DECODE_STEPS = 8  # tokens of a decode call; what has stopped is seen when it returns
MAX_CACHE_TOKENS = 1 << 18
MAX_SEQUENCES = 512  # decoded at once
WAITING_SHARE = 0.25  # of those in flight wait together, so that prefill comes in large pieces,
WAITING_CALLS = 4  # or for so many decode calls


class Engine:
    """Samples from `model` as its weights are. Change them only while nothing is in flight; keys computed with other
    weights are then forgotten (of a change that autograd does not see, as through `.data`, `forget` must be told).

    `max_cache_tokens` bounds the cache: the tokens, state and new ones together, of all sequences in flight and of
    finished ones. A token takes 2 * layers * Hkv * D * itemsize bytes: 3 KiB in the 1M-parameter default, 104 KiB in a
    bfloat16 2b. `decode` is the tokenizer's, where stop texts are to be found.
    """

    def __init__(
        self,
        model: Gemma,
        *,
        max_cache_tokens: int = MAX_CACHE_TOKENS,
        decode: Callable[[Sequence[int]], str] | None = None,
    ):
        if max_cache_tokens < 1:
            raise ValueError(f"expected max_cache_tokens of at least 1, got {max_cache_tokens}")
        self.model, self._decode = model, decode
        self._cache = KeyCache(model, max_cache_tokens)
        self._passes = None
        self._weights: tuple = ()
        self._waiting: list[InFlight] = []
        self._running: list[InFlight] = []
        self._calls_waited = 0
        self._tree: Tree | None = None
        self._at_work = threading.Lock()
        self._arrived: list[InFlight] = []
        self._worker: threading.Thread | None = None
        self._arriving = threading.Lock()

    def forget(self) -> None:
        """Drop the keys of finished sequences: the weights are others now. Nothing may be in flight."""
        with self._at_work:
            self._weights = ()
            self._cache.clear()

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

        Temperature 0 is greedy. Sequence i draws by seeds[i] alone; what it is batched with changes its logits by
        rounding only: by what is prefilled with it, and on a GPU by what is decoded with it.
        `progress` is called with the number of sequences finished so far.
        Raises ValueError on an empty state, an id outside the vocabulary, or arguments that do not fit, ConfigError on
        a state too large for the cache, and NonFiniteError where the model's log-probs are not finite.
        """
        if len(seeds) != len(states):
            raise ValueError(f"expected one seed a state, got {len(seeds)} for {len(states)}")
        params = SamplingParams(max_new_tokens, temperature, tuple(stop_ids))
        ended: dict[int, Completion | BaseException] = {}
        wanted = []
        for i, (state, seed) in enumerate(zip(states, seeds)):
            ids = self._checked(f"state {i}: ", state, params)
            wanted.append(InFlight(ids, seed, params, lambda result, i=i: ended.__setitem__(i, result)))
        with self._at_work:
            self._waiting += wanted
            num_ended = 0
            try:
                while len(ended) < len(wanted):
                    self._step()
                    if len(ended) > num_ended and progress is not None:
                        progress(len(ended))
                    num_ended = len(ended)
            except BaseException:
                for sequence in wanted:
                    sequence.dropped = True
                raise
        for result in ended.values():
            if isinstance(result, BaseException):
                raise result
        return [ended[i] for i in range(len(wanted))]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is asked for while the body runs begins when it ends, all in one prefill.

        What is prefilled together decides how keys are rounded: so the same draws have the same log-probs, to the bit,
        whenever their requests happen to come.
        """
        with self._at_work:
            yield

    async def generate(
        self,
        state: Sequence[int],
        *,
        seed: int,
        params: SamplingParams,
        on_tokens: Callable[[tuple[int, ...], tuple[float, ...]], None] | None = None,
    ) -> Completion:
        """One Completion, awaited; from many tasks, and event loops, at once. Cancelled, it makes room.

        `on_tokens` is called in the event loop with all ids and log-probs so far, every few tokens before the end.
        Raises as `sample` does.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future = loop.create_future()

        def settle(result):
            if future.done():
                return
            future.set_exception(result) if isinstance(result, BaseException) else future.set_result(result)

        ids = self._checked("", state, params)
        sequence = InFlight(ids, seed, params, lambda result: _call(loop, settle, result))
        if on_tokens is not None:
            sequence.on_tokens = lambda ids, log_probs: _call(loop, on_tokens, ids, log_probs)
        with self._arriving:
            self._arrived.append(sequence)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="swirl-sampling", daemon=True)
                self._worker.start()
        try:
            return await future
        finally:
            sequence.dropped = True

    def _work(self) -> None:
        """The thread behind `generate`: it ends when nothing is left to do."""
        while True:
            with self._arriving:
                if not self._arrived and not self._waiting and not self._running:
                    self._worker = None
                    return
            if not self._running:
                self._gather()
            with self._at_work:
                with self._arriving:
                    arrived, self._arrived = self._arrived, []
                self._waiting += arrived
                with suppress(BaseException):  # whoever was in flight has been told
                    self._step()

    def _gather(self) -> None:
        """Nothing is in flight: those who are just about to ask join the first prefill."""
        count = -1
        while count != len(self._arrived):
            count = len(self._arrived)
            time.sleep(0.0005)

    def _checked(self, what: str, state: Sequence[int], params: SamplingParams) -> np.ndarray:
        V, ids = self.model.config.vocab_size, np.asarray(state)
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"{what}expected at least one integer token id, in a flat sequence")
        if ids.min() < 0 or ids.max() >= V:
            raise ValueError(f"{what}expected token ids in [0, {V}), got {ids.min()}..{ids.max()}")
        if any(not 0 <= stop < V for stop in params.stop_ids):
            raise ValueError(f"expected stop_ids in [0, {V}), got {params.stop_ids}")
        if params.stop_texts and self._decode is None:
            raise ValueError("expected no stop_texts: this engine has no tokenizer to find them with")
        if ids.size + params.max_new_tokens > self._cache.max_tokens:
            raise ConfigError(
                f"{what}{ids.size} tokens and {params.max_new_tokens} new ones exceed the cache's "
                f"max_cache_tokens = {self._cache.max_tokens}"
            )
        return ids.astype(np.int32)

    @torch.inference_mode()
    def _step(self) -> None:
        """Prefill if it is time, then one decode call. What ends is told so; an error ends all that is in flight."""
        try:
            for sequence in [one for one in self._running if one.dropped]:
                self._end(sequence)
            self._waiting = [one for one in self._waiting if not one.dropped]
            if self._is_time_to_prefill():
                self._prefill()
            if self._running:
                self._decode_call()
        except BaseException as error:
            in_flight, self._running, self._waiting = self._running + self._waiting, [], []
            self._weights = ()  # the cache may hold anything now
            for sequence in in_flight:
                if not sequence.dropped:
                    sequence.on_end(error)
            if not isinstance(error, Exception):
                raise

    def _is_time_to_prefill(self) -> bool:
        self._calls_waited = self._calls_waited + 1 if self._waiting else 0
        enough = len(self._waiting) >= WAITING_SHARE * len(self._running) or self._calls_waited > WAITING_CALLS
        return bool(self._waiting) and len(self._running) < MAX_SEQUENCES and enough

    # Prefill.

    def _prefill(self) -> None:
        """Move those who wait, as many as there is room for, to those who run."""
        if not self._running:
            self._follow_weights()
        joining = self._waiting[: MAX_SEQUENCES - len(self._running)]
        while joining:
            packed, slot, new = self._make_room(joining)
            if packed is not None:
                break
            joining = joining[: len(joining) // 2]
        if not joining:
            return  # what runs will end, and make room
        self._waiting = self._waiting[len(joining) :]
        self._running += joining
        self._calls_waited, self._tree = 0, None
        self._draw_first(joining, self._prefill_new(packed, slot, new, packed.last))

    def _follow_weights(self) -> None:
        """Forget what was computed with other weights."""
        weights = tuple((p.data_ptr(), p._version) for p in self.model.parameters() if not p.is_inference())
        if weights != self._weights or not weights:
            self._cache.clear()
            if self._passes is None or not self._passes.reads_weights_in_place:
                self._passes = passes_for(self.model, self._cache)
            self._weights = weights

    def _make_room(self, joining):
        """(PackedStates, slot of every packed token, packed indices of new ones), slots held; Nones without room."""
        cache = self._cache
        running = [(one.state, one.slots[: one.state.size]) for one in self._running]
        packed, slot = cache.find([one.state for one in joining], running)
        is_wanted = np.zeros(slot.size, bool)
        is_wanted[packed.paths] = True
        # A state whose tokens are all known is short of what is drawn from: its last token passes again.
        again = np.unique(packed.last[slot[packed.last] >= 0])
        known = [path[slot[path] >= 0] for path in np.split(packed.paths, packed.offsets[1:-1])]
        for path in known:
            cache.hold(slot[path])
        new = np.flatnonzero(is_wanted & (slot < 0))
        num_own = [one.params.max_new_tokens - 1 for one in joining]
        taken = cache.take(new.size + sum(num_own))
        if taken is None:
            for path in known:
                cache.release(slot[path])
            return None, None, None
        slot[new] = taken[: new.size]
        cache.hold(taken[new.size :])
        own = np.split(taken[new.size :], np.cumsum(num_own)[:-1])
        is_new = np.zeros(slot.size, bool)
        is_new[new] = True
        for sequence, path, slots in zip(joining, np.split(packed.paths, packed.offsets[1:-1]), own):
            cache.hold(slot[path[is_new[path]]])
            sequence.slots = np.concatenate((slot[path], slots))
        cache.drop_prefixes()
        return packed, slot, np.union1d(new, again)

    def _prefill_new(self, packed, slot, new, last) -> torch.Tensor:
        """(B, d) hidden state after each state's last token; all `new` packed tokens pass, in pieces, parents first."""
        tree = Tree(np.maximum(slot, 0), packed.subtree_end, packed.position_ids)
        hidden = []
        for first in range(0, new.size, PREFILL_TOKENS):
            piece = new[first : first + PREFILL_TOKENS]
            passed = self._passes.prefill(packed.input_ids[piece], piece.astype(np.int32), tree)
            hidden.append(passed[torch.from_numpy(np.flatnonzero(np.isin(piece, last))).to(passed.device)])
        order = np.unique(last, return_inverse=True)[1]  # as they lie in `hidden`
        return torch.cat(hidden)[torch.from_numpy(order).to(hidden[0].device)]

    # Decode.

    def _draw_first(self, joining: list[InFlight], hidden: torch.Tensor) -> None:
        for members in _plain_and_truncated(joining):
            sequences = [joining[i] for i in members]
            self._take_drawn(sequences, self._passes.draw(hidden[members], self._draws(sequences, 1)))

    def _draws(self, sequences: list[InFlight], steps: int) -> Draws:
        limits = np.array([min(steps, one.num_left) for one in sequences], np.int32)
        numbers = uniforms([one.seed for one in sequences], [len(one.ids) for one in sequences], steps)
        is_stop = np.zeros(self.model.config.vocab_size, np.uint8)
        stop_ids = set(sequences[0].params.stop_ids)
        for one in sequences:
            stop_ids &= set(one.params.stop_ids)
        is_stop[list(stop_ids)] = 1  # of all: one that is a sequence's own is seen when the call returns
        return Draws([one.params for one in sequences], numbers, limits, is_stop)

    def _decode_call(self) -> None:
        if self._tree is None:
            self._lay_out()
        running, tree = self._running, self._tree
        for members in _plain_and_truncated(running):
            self._decode_together([running[i] for i in members], tree)

    def _decode_together(self, sequences: list[InFlight], tree: Tree) -> None:
        steps = min(DECODE_STEPS, max(one.num_left for one in sequences))
        own_lengths = np.array([len(one.ids) - 1 for one in sequences], np.int32)
        own_slots = np.zeros((len(sequences), int(own_lengths.max()) + steps), np.int32)
        for row, length, one in zip(own_slots, own_lengths, sequences):
            slots = one.own_slots[: length + steps]
            row[: slots.size] = slots
        states = np.array([one.packed_index for one in sequences], np.int32)
        tokens = np.array([one.ids[-1] for one in sequences], np.int64)
        draws = self._draws(sequences, steps)
        self._take_drawn(sequences, self._passes.decode(tokens, tree, states, own_slots, own_lengths, draws))

    def _lay_out(self) -> None:
        """The tree of the states in flight, and the sequences in its order, so that neighbours see the same keys."""
        packed = pack_states([one.state for one in self._running])
        slot = np.empty(packed.input_ids.size, np.int32)
        slot[packed.paths] = np.concatenate([one.slots[: one.state.size] for one in self._running])
        for one, index in zip(self._running, packed.last):
            one.packed_index = int(index)
        self._running.sort(key=lambda one: one.packed_index)
        self._tree = Tree(slot, packed.subtree_end, packed.position_ids)

    def _take_drawn(self, sequences: list[InFlight], drawn: Drawn) -> None:
        """Append what was drawn; end those that have stopped."""
        for sequence, ids, log_probs, count in zip(
            sequences, drawn.ids.tolist(), drawn.log_probs.tolist(), drawn.counts.tolist(), strict=True
        ):
            stops = [i for i in range(count) if ids[i] in sequence.params.stop_ids]
            count = stops[0] + 1 if stops else count
            if not math.isfinite(sum(log_probs[:count])):
                raise NonFiniteError("the model's log-probs are not finite: its weights or activations overflow")
            num_before = len(sequence.ids)
            sequence.ids += ids[:count]
            sequence.log_probs += log_probs[:count]
            stop_text = sequence.cut_at_stop_text(num_before, self._decode) if sequence.params.stop_texts else None
            if stops or stop_text is not None or sequence.num_left == 0:
                self._end(sequence, stopped=bool(stops) or stop_text is not None, stop_text=stop_text)
            elif sequence.on_tokens is not None:
                sequence.on_tokens(tuple(sequence.ids), tuple(sequence.log_probs))

    def _end(self, sequence: InFlight, *, stopped: bool = False, stop_text: str | None = None) -> None:
        """Make room, and tell who waits. Keys of all its tokens but the last, which none was drawn after, are kept."""
        self._running.remove(sequence)
        self._tree = None
        ids = np.concatenate((sequence.state, np.array(sequence.ids[:-1], np.int32)))
        self._cache.release(sequence.slots[ids.size :])
        self._cache.keep_finished(ids, sequence.slots[: ids.size])
        if not sequence.dropped:
            sequence.on_end(Completion(tuple(sequence.ids), tuple(sequence.log_probs), stopped, stop_text))


def _plain_and_truncated(sequences: Sequence[InFlight]) -> Iterator[list[int]]:
    """Indices of those that draw from all tokens, then of those that leave some out: neither's numbers, nor the speed
    of the plain ones, depend on the others.
    """
    for truncated in (False, True):
        if members := [i for i, one in enumerate(sequences) if one.params.truncated == truncated]:
            yield members


def _call(loop: asyncio.AbstractEventLoop, function: Callable, *arguments: object) -> None:
    with suppress(RuntimeError):  # a loop that has ended waits for nothing
        loop.call_soon_threadsafe(function, *arguments)
