"""The Gluon experiment (benchmarks/hopper_forward.py) without a GPU: what it compiles to, and how it synchronises.

The machine below runs the kernel's own source on numpy, as hostile to it as Hopper may be: warp groups take turns in
any order; a copy (TMA) fills its destination with NaN when it is issued and lands as late as its barrier allows; a
product (wgmma) reads its operands both when it is issued and when it is waited for, and must see the same; a result
is out of reach until then. Barriers count arrivals and bytes, and their waits know the parity of a round alone.
It knows nothing of the warps within a group, which the compiler keeps together: a test reads that off the PTX.
"""

from __future__ import annotations

import inspect
import re
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from benchmarks.experiments import hopper_forward
from swirl.kernels.schedule import build  # noqa: E402
from swirl.kernels.tree_attention import tree_attention_reference, tree_mask  # noqa: E402

pytestmark = pytest.mark.slow  # an experiment outside of the product

KERNEL = ("_weights", "_start_dots", "_start_values", "_consume", "_produce", "_hopper_forward_kernel")


class Fault(Exception):
    """What a GPU would not have told: a race, a deadlock, an access out of bounds."""


class Machine:
    """One program. Partitions are threads of which one runs at a time: a schedule is a seed, a deadlock is exact.

    late: copies land only when every partition waits for one; else at any moment.
    """

    def __init__(self, seed: int, late: bool):
        self.rng, self.late = np.random.default_rng(seed), late
        self.copies, self.partitions, self.running = [], [], None

    def run(self, functions):
        weights = self.rng.permutation([1.0, 0.2, 0.02])  # some are starved
        self.partitions = [Partition(self, *function, weight) for function, weight in zip(functions, weights)]
        while any(not partition.over for partition in self.partitions):
            ready = [partition for partition in self.partitions if not partition.over and partition.condition()]
            if self.copies and (not ready or (not self.late and self.rng.random() < 0.5)):
                self.copies.pop(self.rng.integers(len(self.copies)))()
            elif ready:
                share = np.array([partition.weight for partition in ready])
                self.running = ready[self.rng.choice(len(ready), p=share / share.sum())]
                self.running.turn()
            else:
                self.fail("deadlock")
            if self.running and self.running.error:
                self.fail(self.running.error)
        if self.copies:
            raise Fault("a copy lands in a program that is over")

    def fail(self, error):
        for partition in self.partitions:  # end the other threads
            partition.cancelled = True
            if not partition.over:
                partition.turn()
        raise error if isinstance(error, Exception) else Fault(error)

    def pause(self, condition=lambda: True):
        """Let others run, at least until the condition holds. Before the partitions there are no others."""
        if self.running:
            self.running.pause(condition)


class Partition:
    def __init__(self, machine, function, arguments, weight):
        self.weight, self.products, self.over, self.cancelled, self.error = weight, [], False, False, None
        self.unfenced = set()  # tiles it stored to without a fence since: copies and products may not see that
        self.condition, self.go, self.done = lambda: True, threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self.work, args=(function, arguments), daemon=True).start()

    def work(self, function, arguments):
        self.go.acquire()
        try:
            if not self.cancelled:
                function(*arguments)
        except Exception as error:
            self.error = error
        self.over = True
        self.done.release()

    def turn(self):
        self.go.release()
        self.done.acquire()

    def pause(self, condition):
        self.condition = condition
        self.done.release()
        self.go.acquire()
        if self.cancelled:
            raise Fault("cancelled")


class Barrier:
    """count arrivals and all expected bytes end a round; rounds are known by their parity alone."""

    def init(self, count):
        self.count, self.pending, self.bytes, self.round = count, count, 0, 0

    def change(self, arrivals=0, num_bytes=0):
        self.pending -= arrivals
        self.bytes += num_bytes
        if self.pending < 0:
            raise Fault("more arrivals than a barrier counts")
        if self.pending == self.bytes == 0:
            self.pending, self.round = self.count, self.round + 1


class Tile:
    """Shared memory: a view, so that everyone sees what is written to it."""

    def __init__(self, machine, data):
        self.machine, self.data, self.shape = machine, data, list(data.shape)

    def index(self, i):
        return Tile(self.machine, self.data[i])

    def permute(self, order):
        return Tile(self.machine, self.data.transpose(order))

    def address(self):
        return self.data.__array_interface__["data"][0]

    def store(self, value):
        self.data[...] = value
        self.machine.running.unfenced.add(self.address())

    def seen(self):
        """By the asynchronous units."""
        if self.address() in self.machine.running.unfenced:
            raise Fault("what was stored is read without a fence")
        return self.data


class Ring(list):
    """Barriers, as an array of them in shared memory."""

    index = list.__getitem__


class Product:
    """An asynchronous wgmma: its operands are read now, and again by the wait that ends it."""

    def __init__(self, a, b, start):
        self.a, self.b, self.start, self.over = a, b, start, False
        self.eager = self.value()

    def value(self):
        a = self.a.seen() if isinstance(self.a, Tile) else self.a
        return self.start + a @ self.b.seen()

    def end(self):
        if not np.array_equal(self.value(), self.eager):
            raise Fault("race: an operand of a product changed while it was read, or was not there")
        self.over = True


class Pointer:
    """Global memory: a flat array, and an offset or an array of them. Nothing may be read or written beyond."""

    def __init__(self, data, offset=0):
        self.data, self.offset = data, offset

    def __add__(self, offset):
        return Pointer(self.data, self.offset + offset)

    def at(self, mask):
        offset, mask = np.broadcast_arrays(self.offset, mask)
        if np.any(mask & ((offset < 0) | (offset >= self.data.size))):
            raise Fault("out of bounds")
        return np.where(mask, offset, 0), mask


class Descriptor:
    """A matrix that copies read in blocks, zeros beyond its end, and write, nothing beyond its end."""

    def __init__(self, data, rows, columns):
        self.data, self.shape, self.dtype, self.layout = data, (rows, columns), "float64", None
        self.block_type = SimpleNamespace(nbytes=8 * rows * columns)

    def block(self, place):
        return self.data[place[0] : place[0] + self.shape[0], place[1] : place[1] + self.shape[1]]


def language(machine: Machine, program: tuple[int, int]) -> dict:
    """What the kernel's source calls, by name. float64 throughout: only the order of sums may differ."""

    def load(pointer, mask=True, other=0):
        offset, mask = pointer.at(mask)
        return np.where(mask, pointer.data[offset], other)[()]

    def store(pointer, value, mask):
        offset, mask = pointer.at(mask)
        pointer.data[offset[mask]] = value[mask]

    def allocate(dtype, shape, layout):
        if layout == "barriers":
            return Ring(Barrier() for _ in range(shape[0]))
        return Tile(machine, np.full(shape, np.nan))

    def wait(barrier, phase):
        machine.pause(lambda: barrier.round % 2 != phase)

    def arrive(barrier, count):
        machine.pause()
        barrier.change(arrivals=count)

    def expect(barrier, num_bytes):
        machine.pause()
        barrier.change(arrivals=1, num_bytes=num_bytes)

    def tma_load(source, place, barrier, tile):
        def land():
            tile.data[...] = 0.0
            block = source.block(place)
            tile.data[: block.shape[0]] = block
            barrier.change(num_bytes=-source.block_type.nbytes)

        machine.pause()
        tile.data[...] = np.nan
        machine.copies.append(land)

    def tma_store(target, place, tile):
        block = target.block(place)
        block[...] = tile.seen()[: block.shape[0]]

    def warpgroup_mma(a, b, acc, use_acc=True, is_async=False):
        machine.pause()
        product = Product(a, b, acc if use_acc else 0.0)
        machine.running.products.append(product)
        return product

    def warpgroup_mma_wait(num_outstanding, deps):
        machine.pause()
        products = machine.running.products
        while len(products) > num_outstanding:
            products.pop(0).end()
        if not all(product.over for product in deps):
            raise Fault("a result is read before its product has ended")
        return deps[0].eager

    def fence():
        if machine.running:
            machine.running.unfenced.clear()

    def nothing(*_, **__):
        return None

    ttgl = SimpleNamespace(
        constexpr=None, int64=None, float32=None, SliceLayout=nothing, SwizzledSharedLayout=nothing,
        NVMMADistributedLayout=nothing, DotOperandLayout=nothing, static_range=range,
        arange=lambda start, stop, layout: np.arange(start, stop),
        full=lambda shape, value, dtype, layout: np.full(shape, value), where=np.where, exp2=np.exp2, log2=np.log2,
        zeros=lambda shape, dtype, layout: np.zeros(shape), rsqrt=lambda x: x**-0.5, sum=np.sum, maximum=max,
        cast=lambda x, dtype: x, convert_layout=lambda x, layout: x, load=load, store=store,
        allocate_shared_memory=allocate, program_id=lambda axis: program[axis],
        warp_specialize=lambda functions, num_warps, num_registers: machine.run(functions),
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda barrier, count: barrier.init(count), wait=wait, arrive=arrive,
        expect=expect,
    )  # fmt: skip
    gluon = SimpleNamespace(jit=lambda fn=None, **options: fn or (lambda fn: fn))
    return {
        "ttgl": ttgl, "mbarrier": mbarrier, "gluon": gluon, "tma": SimpleNamespace(store_wait=nothing),
        "tma_load": tma_load, "tma_store": tma_store, "fence_async_shared": fence,
        "warpgroup_mma": warpgroup_mma, "warpgroup_mma_wait": warpgroup_mma_wait,
        "LOG2E": float(hopper_forward.LOG2E.value),
    }  # fmt: skip


def forest(T, rng):
    """A random forest in depth-first order: subtree_end and position_ids, int32."""
    parents, position = [-1], [0]
    for _ in range(1, T):  # the next token descends from the last one, or from one of its ancestors, or from none
        parent = len(parents) - 1
        while parent >= 0 and rng.random() < 0.25:
            parent = parents[parent]
        parents.append(parent)
        position.append(0 if parent < 0 else position[parent] + 1)
    end = list(range(1, T + 1))
    for i in reversed(range(T)):
        if parents[i] >= 0:
            end[parents[i]] = max(end[parents[i]], end[i])
    return torch.tensor(end, dtype=torch.int32), torch.tensor(position, dtype=torch.int32)


ROWS, KEYS, D, HEADS, KV_HEADS = 8, 4, 8, 2, 1
SETTINGS = {"scale": 0.7, "softcap": 5.0}


def run(T, window, overlap, seed, late, text=None, stages=2):
    """The kernel on every program of a random case: o, lse, what o should be, and what lse is made of."""
    rng = np.random.default_rng(seed)
    mask = forest(T, rng)
    q, k, v = (rng.standard_normal((T, heads, D)) * 3 for heads in (HEADS, KV_HEADS, KV_HEADS))
    schedule = build(*mask, 2 * ROWS, KEYS, window, "queries")
    columns, num_full, num_live, order = (
        Pointer(x.numpy().ravel().astype(np.int64))
        for x in (schedule.columns, schedule.num_full, schedule.num_live, schedule.order)
    )
    o, lse = np.full((T, HEADS * D), np.nan), np.full(HEADS * T, np.nan)
    end, position = (Pointer(x.numpy()) for x in mask)
    for program in np.ndindex(HEADS, schedule.order.numel()):
        machine = Machine(int(rng.integers(1 << 30)), late)
        names = language(machine, program)
        exec(compile(text or source(), "the kernel", "exec"), names)
        names["_hopper_forward_kernel"](
            *(Descriptor(x.reshape(T, -1), size, D) for x, size in ((q, ROWS), (k, KEYS), (v, KEYS), (o, ROWS))),
            Pointer(lse), end, position, columns, num_full, num_live, order, T, schedule.columns.shape[1],
            HEADS // KV_HEADS, D, SETTINGS["scale"], SETTINGS["softcap"], window, ROWS, KEYS, stages, overlap,
        )  # fmt: skip
    truth = tree_attention_reference(*(torch.from_numpy(x) for x in (q, k, v)), *mask, **SETTINGS, window=window)
    return o.reshape(T, HEADS, D), lse.reshape(HEADS, T), truth.numpy(), (q, k, mask)


@pytest.mark.parametrize("late", [True, False], ids=["late", "any"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "plain"])
@pytest.mark.parametrize(("T", "window"), [(1, None), (7, 3), (16, None), (33, 5), (64, None), (97, 11)])
def test_every_order_of_events_gives_the_reference(T, window, overlap, late):
    for seed in range(3):
        o, lse, truth, (q, k, mask) = run(T, window, overlap, seed, late)
        np.testing.assert_allclose(o, truth, rtol=1e-10, atol=1e-12)
        dots, cap = np.einsum("ihd,jd->hij", q, k[:, 0]) * SETTINGS["scale"], SETTINGS["softcap"]
        total = np.where(tree_mask(*mask, window).numpy(), np.exp(cap * np.tanh(dots / cap)), 0.0).sum(-1)
        np.testing.assert_allclose(lse, np.log2(total), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stages", [1, 3])
def test_rings_of_other_lengths(stages):
    o, _, truth, _ = run(97, None, True, 0, True, stages=stages)
    np.testing.assert_allclose(o, truth, rtol=1e-10, atol=1e-12)


def source():
    return "\n\n".join(inspect.getsource(getattr(hopper_forward, name).fn) for name in KERNEL)


PLANTED = {  # what is wrong: (what stands in the source, what is put there, whether overlapped)
    "keys overwritten while they are read": ("mbarrier.wait(k_empty.index(slot), before)", "pass", True),
    "values overwritten while they are read": ("mbarrier.wait(v_empty.index(slot), before)", "pass", True),
    "the producer waits for the wrong round": ("(n // STAGES & 1) ^ 1", "n // STAGES & 1", True),
    "keys read before they are there": ("mbarrier.wait(k_full.index(n % STAGES), n // STAGES & 1)", "pass", False),
    "a consumer waits for the round before": (
        "mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)",
        "mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1 ^ 1)",
        False,
    ),
    "one group frees the keys for both": (
        "mbarrier.init(k_empty.index(i), count=2)",
        "mbarrier.init(k_empty.index(i), count=1)",
        True,
    ),
    "values are freed for the wrong block": ("v_empty.index((n - 1) % STAGES)", "v_empty.index(n % STAGES)", True),
    "scores read before their product has ended": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,", True),
    "keys freed before their product has ended": (
        "                dots = warpgroup_mma_wait(0, [dots])\n"
        "                mbarrier.arrive(k_empty.index(n % STAGES), count=1)\n",
        "                mbarrier.arrive(k_empty.index(n % STAGES), count=1)\n"
        "                dots = warpgroup_mma_wait(0, [dots])\n",
        False,
    ),
    "o is stored without a fence": ("fence_async_shared()\n    tma_store", "tma_store", False),
    "half of the bytes are expected": ("v_rows.block_type.nbytes)", "v_rows.block_type.nbytes // 2)", True),
    "queries not waited for": ("mbarrier.wait(q_full.index(GROUP), 0)", "pass", True),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(bug):
    right, wrong, overlap = PLANTED[bug]
    assert right in source()
    found = []
    for late, seed in ((late, seed) for late in (True, False) for seed in range(2)):
        try:
            o, _, truth, _ = run(97, None, overlap, seed, late, source().replace(right, wrong))
            found.append(not np.allclose(o, truth, rtol=1e-10, atol=1e-12))
        except Fault:
            found.append(True)
    assert any(found)  # a race may be missed by one order of events, not by all


LATER = tuple(int(part) for part in hopper_forward.triton.__version__.split(".")[:2]) > (3, 6)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "plain"])
@pytest.mark.parametrize("window", [None, 512])
def test_compiles_for_hopper(window, overlap):
    """Fits, spills nothing, overlaps its products, and keeps the warps of a group together where others rely on it."""
    result = hopper_forward.compiled_forward(window, overlap)
    assert result.shared <= 227 << 10
    assert not result.said
    # with both, ptxas keeps a few loop invariants on the stack: outside the loops, or after Triton 3.9 inside too
    assert result.stack <= ((16, 104)[LATER] if window and overlap else 0)
    assert len(result.loops) == 4  # full and partial blocks, two groups
    for loop in result.loops:
        count = hopper_forward.kinds(loop)
        assert count["LDL"] + count["STL"] <= (21 if LATER and window and overlap else 0)
        assert count["MUFU"] == 96  # three for each of a thread's 32 scores
        first, last = (i for i, line in enumerate(loop) if line.startswith("WARPGROUP.DEPBAR"))
        beside = hopper_forward.kinds(loop[first:last])["MUFU"]  # between the wait for q k^T and that for p v
        assert beside == 96
    registers = {int(x) for x in re.findall(r"setmaxnreg\.dec\.sync\.aligned\.u32\s+(\d+)", result.ptx)}
    assert {240, 24} <= registers and result.registers == 168
    arrivals = list(re.finditer(r"mbarrier\.arrive\.shared", result.ptx))
    assert len(arrivals) == (10 if overlap else 8)
    for arrival in arrivals:  # one thread says for its group that the product has ended: after all its warps know
        since = result.ptx[result.ptx.rindex("wgmma.wait_group", 0, arrival.start()) : arrival.start()]
        assert re.search(r"bar\.sync\s+\d+, 128;", since)


def test_what_it_does_not_know_is_refused():
    q, k, v, *mask = hopper_forward.meta_inputs(T=64)
    for softcap, dtype in ((None, torch.bfloat16), (90.0, torch.bfloat16), (50.0, torch.float16)):
        with pytest.raises(ValueError, match="softcap of at most 80"):
            x = (y.to(dtype) for y in (q, k, v))
            hopper_forward.hopper_forward(*x, *mask, scale=1 / 16, softcap=softcap)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert hopper_forward.main([]) == 0
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and "not measured" in said.err


def test_tiny_prints_what_it_compiles_to(capsys):
    assert hopper_forward.main(["--tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not measured" in lines[0] and len(lines) == 2 + 2 * (4 + 4 + 2)
