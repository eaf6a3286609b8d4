"""Launch configs of tree_attention and linear_log_prob, timed: is one better than those that ship?

    python -m benchmarks.tune [--minutes 20] [--out FILE.jsonl]             on a CUDA GPU
    TRITON_INTERPRET=1 python -m benchmarks.tune --tiny --device cpu        shows that it runs

One slot of the table of configs after another; a slot's best is kept while the next ones are searched. Candidates
come in the order of how little they differ from what ships, so that a search cut short has seen the nearest; each
slot may take its share of the time. What does not compile, does not fit shared memory or gives another result is
skipped, and its row says so. Nothing is written to the tables: a better config is for a person to put there.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from benchmarks import workloads
from benchmarks.harness import Report, Settings, command_line, difference, reason, settings_of
from swirl.kernels import _triton, linear_log_prob, tree_attention

WRONG = 0.02  # of a result's norm

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Slot:
    """One config of a table entry. `values`: what its fields may be, in their order."""

    name: str
    index: int  # in the entry
    backward: bool  # which pass is timed, whole
    values: tuple[tuple[int, ...], ...]
    tiny: tuple[tuple[int, ...], ...]
    or_none: bool = False  # the entry may do without
    without: int | None = None  # the slot that would hide this one


@dataclass(frozen=True)
class Case:
    """An op on its inputs; `table[key]` is the entry that its launches read."""

    name: str
    table: dict
    key: object
    slots: tuple[Slot, ...]
    forward: Callable[[], Tensors]
    backward: Callable[[], Tensors]


WARPS, TINY = (4, 8), ((16, 32), (16,), (4,), (1,))
ATTENTION_SLOTS = (  # block_q, block_k, num_warps, num_stages
    Slot("forward", 0, False, ((64, 128), (32, 64, 128), WARPS, (2, 3, 4)), TINY),
    Slot("dq", 1, True, ((64, 128), (32, 64), WARPS, (1, 2, 3)), TINY),
    Slot("dk and dv, stored", 4, True, ((32, 64, 128), (64, 128), WARPS, (2, 3, 4, 5)), TINY, or_none=True),
    Slot("dk, anew", 2, True, ((32, 64), (64, 128), WARPS, (1, 2, 3)), TINY, without=4),
    Slot("dv, anew", 3, True, ((32, 64), (64, 128), WARPS, (2, 3, 4)), TINY, or_none=True, without=4),
)
LOGITS, TINY_HEAD = ((64, 128), (128, 256), (32, 64), WARPS, (2, 3, 4)), ((16, 32), (16,), (16,), (4,), (1,))
HEAD_SLOTS = (  # block_m, block_v, block_d, num_warps, num_stages; the table has one config for the first two
    Slot("forward", 0, False, LOGITS, TINY_HEAD),
    Slot("d_logits", 0, True, LOGITS, TINY_HEAD),
    Slot("d_hidden", 1, True, ((64, 128), (32, 64), (128, 256), WARPS, (2, 3, 4)), TINY_HEAD),
)


def attention_case(how: Settings) -> Case:
    """Gemma-2 2b's heads over the two workloads that have bars."""
    heads, kv_heads, D = (2, 1, 256) if how.tiny else (8, 4, 256)
    forests = [workloads.fork(9, 2, 4, 1), workloads.causal(19)]
    if not how.tiny:
        forests = [workloads.from_data("comb", "musique", 16384), workloads.causal(16384)]
    inputs = []
    for forest in forests:
        mask = (forest.subtree_end.to(how.device), forest.position_ids.to(how.device))
        shapes = [(forest.num_tokens, h, D) for h in (heads, kv_heads, kv_heads)]
        inputs.append(([_random(shape, how) for shape in shapes], mask))

    def outputs():
        return tuple(tree_attention.tree_attention(*x, *mask, scale=D**-0.5, softcap=50.0) for x, mask in inputs)

    table = tree_attention._CONFIGS[_triton.architecture(how.device), how.dtype.itemsize]
    return _case("tree_attention", table, max(D, 64), ATTENTION_SLOTS, outputs, [x for x, _ in inputs])


def head_case(how: Settings) -> Case:
    """Gemma-2 2b's head over 8192 rows."""
    M, d, V = (17, 32, 40) if how.tiny else (8192, 2304, 256_000)
    x = [_random((M, d), how), _random((V, d), how, d**-0.5)]
    target_ids = torch.randint(0, V, (M,), device=how.device)

    def outputs():
        return (linear_log_prob.linear_log_prob(*x, target_ids, softcap=30.0),)

    key = _triton.architecture(how.device), how.dtype.itemsize
    return _case("linear_log_prob", linear_log_prob._CONFIGS, key, HEAD_SLOTS, outputs, [x])


def _random(shape, how: Settings, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=how.device) * scale).to(how.dtype).requires_grad_()


def _case(name, table, key, slots, outputs, leaves) -> Case:
    """`leaves`: of each output, the inputs it has gradients of."""

    def forward():
        with torch.no_grad():
            return outputs()

    made = outputs()
    gradients = [torch.randn_like(y) for y in made]

    def backward():
        parts = zip(made, leaves, gradients)
        return tuple(dx for y, x, dy in parts for dx in torch.autograd.grad(y, x, dy, retain_graph=True))

    return Case(name, table, key, slots, forward, backward)


def with_config(entry, index: int, config):
    """The entry with another config in one slot."""
    values = list(entry)
    values[index] = config
    return entry._make(values) if hasattr(entry, "_make") else tuple(values)


@contextmanager
def entry_of(case: Case, entry) -> Iterator[None]:
    """Launches read `entry`; afterwards what they read before."""
    before = case.table[case.key]
    case.table[case.key] = entry
    try:
        yield
    finally:
        case.table[case.key] = before


def candidates(slot: Slot, shipped, tiny: bool) -> list:
    """All values of a slot, what ships first, then by the number of fields that differ from it."""
    kind, own = type(shipped), _fields(shipped)
    others = [values for values in itertools.product(*(slot.tiny if tiny else slot.values)) if values != own]
    others.sort(key=lambda values: sum(a != b for a, b in zip(values, own)))
    return [shipped, *([None] if slot.or_none else []), *(kind(*values) for values in others)]


def _fields(config) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in config.__annotations__)


def tune(case: Case, report: Report, seconds: float) -> None:
    """Search the slots of one case in about `seconds`, and print the best of each beside what ships."""
    entry = all_shipped = case.table[case.key]
    truth = {False: case.forward(), True: case.backward()}
    slots = [slot for slot in case.slots if entry[slot.index] is not None]
    for number, slot in enumerate(slots):
        until = time.monotonic() + seconds / (len(slots) - number)
        started, run = time.monotonic(), case.backward if slot.backward else case.forward
        base = entry if slot.without is None else with_config(entry, slot.without, None)
        shipped = all_shipped[slot.index]
        times, left = {}, candidates(slot, shipped, report.how.tiny)
        while left and (len(times) < 2 or time.monotonic() < until):
            config = left.pop(0)
            fields = "none" if config is None else " ".join(map(str, _fields(config)))
            with entry_of(case, with_config(base, slot.index, config)):
                op, note = run, ""
                try:
                    if not difference(run(), truth[slot.backward]) <= WRONG:
                        op, note = None, "another result"
                except Exception as error:  # does not compile, does not fit, or the blocks do not go together
                    op, note = None, reason(error)
                facts = {"op": case.name, "slot": slot.name, "shipped": config == shipped}
                row = report.add(fields, op, note=note, **facts)
            if report.how.device.type == "cuda":
                torch.cuda.synchronize()  # a launch that broke the device ends the search here
            times[config] = row.get("median_ms", float("inf"))
        _say(case, slot, shipped, times, len(left))
        best = min(times, key=times.get)
        entry = with_config(entry, slot.index, best)
        seconds -= time.monotonic() - started


def _say(case: Case, slot: Slot, shipped, times: dict, num_left: int) -> None:
    best = min(times, key=times.get)
    skipped = sum(ms == float("inf") for ms in times.values())
    words = f"{case.name}, {slot.name}: shipped {shipped} {times[shipped]:.4f} ms"
    if times[best] < 0.98 * times[shipped]:
        words += f"; better {best} {times[best]:.4f} ms, {times[shipped] / times[best]:.2f}x"
    else:
        words += "; nothing better"
    words += f" ({len(times)} tried, {skipped} of them skipped, {num_left} not reached)"
    print(words, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of the whole search, about")
    given = parser.parse_args(arguments)
    how = settings_of(given)
    if not _triton.takes(torch.empty(0, dtype=how.dtype, device=how.device)):
        raise SystemExit("tune: needs a CUDA GPU, or TRITON_INTERPRET=1 and --tiny: the configs are Triton's")
    report = Report("tune", how)
    for make in (attention_case, head_case):
        tune(make(how), report, 60 * given.minutes / 2)
    report.finish()


if __name__ == "__main__":
    main()
