"""An experiment, its speed not measured: tree attention's forward in Gluon, warp-specialised for Hopper.

    python -m benchmarks.hopper_forward           on a Hopper GPU: check, then time against the Triton kernel
    python -m benchmarks.hopper_forward --tiny    compile ahead of time, anywhere: registers, shared memory, SASS

The operator, the schedule and the numerics of `_tree_attention_fwd_kernel` (swirl/kernels/tree_attention.py), bfloat16
with a softcap alone. There two warp groups share a tile and every barrier of a step; here only the keys. One warp
copies blocks of keys and values into two rings (TMA); two warp groups of 64 queries each take them from there at their
own pace, so that the three special functions a score of one may run while the tensor cores work for the other. With
OVERLAP a group also runs them beside its own product: q k^T of the next block is started before p v of this one has
ended. That is the shape of FlashAttention-3 (arXiv:2407.08608): 240 registers a consumer's thread, 24 the producer's.

Barriers, one a slot of a ring: `full` counts the copy's bytes, `empty` the two groups that are done with it. Block n
is in slot n % STAGES, and waits for round n // STAGES of that slot, by its parity.
ptxas wants two things of OVERLAP: p is rounded after the wait for p v, or it serialises all products (C7513); and a
store that needs the row sums stands before that wait, though nobody reads it, or the wait moves up, before two thirds
of the special functions.
tests/test_hopper_forward.py runs this source on a CPU where copies land late and operands are read late. No GPU has.
"""

from __future__ import annotations

import collections
import functools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import torch

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as ttgl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    print(f"hopper_forward: not run, {error}", file=sys.stderr)
    raise SystemExit(0) from None

from benchmarks import workloads
from benchmarks.harness import Report, Settings, gemm_flops, settings
from swirl.kernels import tree_attention
from swirl.kernels.schedule import schedule_of

LOG2E = ttgl.constexpr(1.4426950408889634)
# Triton 3.9 calls them otherwise than 3.6
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _weights(
    dots, o_q, o_k, q_position, p_end, p_position, T,
    ROWS: ttgl.constexpr, KEYS: ttgl.constexpr, LAYOUT: ttgl.constexpr, SCALE: ttgl.constexpr,
    SOFTCAP: ttgl.constexpr, WINDOW: ttgl.constexpr, MASKED: ttgl.constexpr,
):  # fmt: skip
    """exp(softcap(scale * dots)), 0 where a query does not see a key."""
    root = ttgl.rsqrt(1.0 + ttgl.exp2(dots * (2 * LOG2E * SCALE / SOFTCAP)))
    p = ttgl.exp2(SOFTCAP * LOG2E - (2 * SOFTCAP * LOG2E) * (root * root))
    if MASKED:
        i_q = o_q + ttgl.arange(0, ROWS, ttgl.SliceLayout(1, LAYOUT))
        i_k = ttgl.arange(0, KEYS, ttgl.SliceLayout(0, LAYOUT))  # within the block: addresses of few registers
        end = ttgl.load(p_end + o_k + i_k, mask=i_k < T - o_k, other=0)
        visible = (i_k[None, :] <= (i_q - o_k)[:, None]) & (i_q[:, None] < end[None, :])
        if WINDOW is not None:
            k_position = ttgl.load(p_position + o_k + i_k, mask=i_k < T - o_k, other=0)
            visible = visible & (q_position[:, None] - WINDOW < k_position[None, :])
        p = ttgl.where(visible, p, 0.0)
    return p


@gluon.jit
def _start_dots(q, k_ring, k_full, n, KEYS: ttgl.constexpr, LAYOUT: ttgl.constexpr, STAGES: ttgl.constexpr):
    """q k^T of block n, once it is there; its slot is free when this product has ended."""
    mbarrier.wait(k_full.index(n % STAGES), n // STAGES & 1)
    zero = ttgl.full([q.shape[0], KEYS], 0.0, ttgl.float32, LAYOUT)
    return warpgroup_mma(q, k_ring.index(n % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _start_values(p, v_ring, v_full, n, o, STAGES: ttgl.constexpr):
    """o + p v of block n, once it is there; its slot is free when this product has ended."""
    mbarrier.wait(v_full.index(n % STAGES), n // STAGES & 1)
    return warpgroup_mma(p, v_ring.index(n % STAGES), o, is_async=True)


@gluon.jit
def _consume(
    GROUP: ttgl.constexpr, o_rows, tiles, barriers, pointers, T, block,
    ROWS: ttgl.constexpr, KEYS: ttgl.constexpr, D: ttgl.constexpr, STAGES: ttgl.constexpr, OVERLAP: ttgl.constexpr,
    SCALE: ttgl.constexpr, SOFTCAP: ttgl.constexpr, WINDOW: ttgl.constexpr,
):  # fmt: skip
    """One warp group: ROWS queries, from the first key block to the stores of o and lse."""
    q_tiles, k_ring, v_ring, sums = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    p_lse, p_end, p_position, p_columns = pointers
    o_q, num_full, num_live = block
    DTYPE: ttgl.constexpr = o_rows.dtype
    LAYOUT: ttgl.constexpr = ttgl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # of dots
    O_LAYOUT: ttgl.constexpr = ttgl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: ttgl.constexpr = ttgl.DotOperandLayout(0, O_LAYOUT, 2)
    o_q += GROUP * ROWS
    q = q_tiles.index(GROUP)
    i_row = ttgl.arange(0, ROWS, ttgl.SliceLayout(1, LAYOUT))
    q_position = ttgl.load(p_position + o_q + i_row, mask=i_row < T - o_q, other=0)
    total = ttgl.zeros([ROWS], ttgl.float32, ttgl.SliceLayout(1, LAYOUT))
    o = ttgl.zeros([ROWS, D], ttgl.float32, O_LAYOUT)
    mbarrier.wait(q_full.index(GROUP), 0)
    if OVERLAP:
        # block 0 is masked whatever it is: the mask of a full block hides nothing
        dots = _start_dots(q, k_ring, k_full, 0, KEYS, LAYOUT, STAGES)
        o_k = ttgl.load(p_columns) * KEYS
        dots = warpgroup_mma_wait(0, [dots])
        mbarrier.arrive(k_empty.index(0), count=1)
        p = _weights(dots, o_q, o_k, q_position, p_end, p_position, T, ROWS, KEYS, LAYOUT, SCALE, SOFTCAP, WINDOW, True)
        total += ttgl.sum(p, 1)
        weights = ttgl.convert_layout(ttgl.cast(p, DTYPE), P_LAYOUT)
        start = 1
        for MASKED in ttgl.static_range(2):
            stop = num_live if MASKED else num_full
            for n in range(start, stop):
                dots = _start_dots(q, k_ring, k_full, n, KEYS, LAYOUT, STAGES)
                o_next = _start_values(weights, v_ring, v_full, n - 1, o, STAGES)
                o_k = ttgl.load(p_columns + n) * KEYS
                dots = warpgroup_mma_wait(1, [dots])
                mbarrier.arrive(k_empty.index(n % STAGES), count=1)
                p = _weights(
                    dots, o_q, o_k, q_position, p_end, p_position, T,
                    ROWS, KEYS, LAYOUT, SCALE, SOFTCAP, WINDOW, MASKED,
                )  # fmt: skip
                total += ttgl.sum(p, 1)
                sums.index(GROUP).store(total)
                o = warpgroup_mma_wait(0, [o_next])
                mbarrier.arrive(v_empty.index((n - 1) % STAGES), count=1)
                weights = ttgl.convert_layout(ttgl.cast(p, DTYPE), P_LAYOUT)
            start = ttgl.maximum(num_full, 1)
        o_next = _start_values(weights, v_ring, v_full, num_live - 1, o, STAGES)
        o = warpgroup_mma_wait(0, [o_next])
    else:
        start = 0
        for MASKED in ttgl.static_range(2):
            stop = num_live if MASKED else num_full
            for n in range(start, stop):
                dots = _start_dots(q, k_ring, k_full, n, KEYS, LAYOUT, STAGES)
                o_k = ttgl.load(p_columns + n) * KEYS
                dots = warpgroup_mma_wait(0, [dots])
                mbarrier.arrive(k_empty.index(n % STAGES), count=1)
                p = _weights(
                    dots, o_q, o_k, q_position, p_end, p_position, T,
                    ROWS, KEYS, LAYOUT, SCALE, SOFTCAP, WINDOW, MASKED,
                )  # fmt: skip
                total += ttgl.sum(p, 1)
                weights = ttgl.convert_layout(ttgl.cast(p, DTYPE), P_LAYOUT)
                o_next = _start_values(weights, v_ring, v_full, n, o, STAGES)
                o = warpgroup_mma_wait(0, [o_next])
                mbarrier.arrive(v_empty.index(n % STAGES), count=1)
            start = stop
    total = ttgl.where(i_row < T - o_q, total, 1.0)  # rows beyond T saw nothing
    head = ttgl.program_id(0)
    p_lse += ttgl.cast(head, ttgl.int64) * T
    ttgl.store(p_lse + o_q + i_row, ttgl.log2(total), mask=i_row < T - o_q)
    share = ttgl.convert_layout(1.0 / total, ttgl.SliceLayout(1, O_LAYOUT))
    q.store(ttgl.cast(o * share[:, None], DTYPE))  # where the queries were, which nobody reads any more
    fence_async_shared()
    tma_store(o_rows, [o_q, head * D], q)
    tma.store_wait(0)


@gluon.jit
def _produce(
    descriptors, tiles, barriers, p_columns, block, o_kv,
    ROWS: ttgl.constexpr, KEYS: ttgl.constexpr, D: ttgl.constexpr, STAGES: ttgl.constexpr,
):  # fmt: skip
    """One warp: the queries of both groups, then every live block of keys and of values."""
    q_rows, k_rows, v_rows = descriptors
    q_tiles, k_ring, v_ring, sums = tiles
    q_full, k_full, k_empty, v_full, v_empty = barriers
    o_q, num_full, num_live = block
    for GROUP in ttgl.static_range(2):
        full = q_full.index(GROUP)
        mbarrier.expect(full, q_rows.block_type.nbytes)
        tma_load(q_rows, [o_q + GROUP * ROWS, ttgl.program_id(0) * D], full, q_tiles.index(GROUP))
    for n in range(num_live):
        slot = n % STAGES
        before = (n // STAGES & 1) ^ 1  # the round before this one; of the first, a new barrier counts it as over
        o_k = ttgl.load(p_columns + n) * KEYS
        mbarrier.wait(k_empty.index(slot), before)
        mbarrier.expect(k_full.index(slot), k_rows.block_type.nbytes)
        tma_load(k_rows, [o_k, o_kv], k_full.index(slot), k_ring.index(slot))
        mbarrier.wait(v_empty.index(slot), before)
        mbarrier.expect(v_full.index(slot), v_rows.block_type.nbytes)
        tma_load(v_rows, [o_k, o_kv], v_full.index(slot), v_ring.index(slot))


@gluon.jit(do_not_specialize=["T", "num_columns"])
def _hopper_forward_kernel(
    q_rows, k_rows, v_rows, o_rows, p_lse, p_end, p_position, p_columns, p_num_full, p_num_live, p_order,
    T, num_columns,
    GROUPED: ttgl.constexpr, D: ttgl.constexpr, SCALE: ttgl.constexpr, SOFTCAP: ttgl.constexpr,
    WINDOW: ttgl.constexpr, ROWS: ttgl.constexpr, KEYS: ttgl.constexpr, STAGES: ttgl.constexpr,
    OVERLAP: ttgl.constexpr,
):  # fmt: skip
    b_q = ttgl.load(p_order + ttgl.program_id(1))
    p_columns += ttgl.cast(b_q, ttgl.int64) * num_columns
    block = (b_q * (2 * ROWS), ttgl.load(p_num_full + b_q), ttgl.load(p_num_live + b_q))
    q_tiles = ttgl.allocate_shared_memory(q_rows.dtype, [2, ROWS, D], q_rows.layout)
    k_ring = ttgl.allocate_shared_memory(k_rows.dtype, [STAGES, KEYS, D], k_rows.layout)
    v_ring = ttgl.allocate_shared_memory(v_rows.dtype, [STAGES, KEYS, D], v_rows.layout)
    sums = ttgl.allocate_shared_memory(ttgl.float32, [2, ROWS], ttgl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = ttgl.allocate_shared_memory(ttgl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in ttgl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in ttgl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()  # the copies see the barriers
    o_kv = ttgl.program_id(0) // GROUPED * D
    tiles = (q_tiles, k_ring, v_ring, sums)
    barriers = (q_full, k_full, k_empty, v_full, v_empty)
    pointers = (p_lse, p_end, p_position, p_columns)
    ttgl.warp_specialize(
        [
            (_consume, (0, o_rows, tiles, barriers, pointers, T, block,
                        ROWS, KEYS, D, STAGES, OVERLAP, SCALE, SOFTCAP, WINDOW)),
            (_consume, (1, o_rows, tiles, barriers, pointers, T, block,
                        ROWS, KEYS, D, STAGES, OVERLAP, SCALE, SOFTCAP, WINDOW)),
            (_produce, ((q_rows, k_rows, v_rows), tiles, barriers, p_columns, block, o_kv, ROWS, KEYS, D, STAGES)),
        ],
        [4, 1],
        [240, 24],  # registers a thread; the first group has what is left of 504 (65,536 / 128, in eights): 240 again
    )  # fmt: skip


ROWS, KEYS, STAGES = 64, 64, 2  # a warp group's queries, a block's keys, blocks in flight: 193 KB of shared memory


def launch_arguments(q, k, v, subtree_end, position_ids, scale, softcap, window, overlap):
    """The grid and, by name, what `_hopper_forward_kernel` takes: o and lse among it, yet unwritten."""
    T, Hq, D = q.shape
    if q.dtype != torch.bfloat16 or D != 256 or softcap is None or not 0 < softcap <= 80:
        raise ValueError("the experiment knows bfloat16, head_dim 256 and a softcap of at most 80")
    schedule = schedule_of(subtree_end, position_ids, 2 * ROWS, KEYS, window, "queries")
    num_blocks, num_columns = schedule.columns.shape
    layout = ttgl.NVMMASharedLayout.get_default_for([ROWS, D], ttgl.bfloat16)
    o, lse = torch.empty_like(q), torch.empty(Hq, T, dtype=torch.float32, device=q.device)
    arguments = {}
    for name, x, rows in (("q", q, ROWS), ("k", k, KEYS), ("v", v, KEYS), ("o", o, ROWS)):
        arguments[f"{name}_rows"] = TensorDescriptor.from_tensor(x.view(T, -1), [rows, D], layout)
    arguments |= dict(p_lse=lse, p_end=subtree_end, p_position=position_ids, T=T, num_columns=num_columns)
    arguments |= {f"p_{name}": getattr(schedule, name) for name in ("columns", "num_full", "num_live", "order")}
    arguments |= dict(GROUPED=Hq // k.shape[1], D=D, ROWS=ROWS, KEYS=KEYS, STAGES=STAGES, OVERLAP=overlap)
    arguments |= dict(SCALE=scale, SOFTCAP=softcap, WINDOW=window if window is None or window < T else None)
    return (Hq, num_blocks), arguments


def hopper_forward(q, k, v, subtree_end, position_ids, *, scale, softcap, window=None, overlap=True):
    """o (T, Hq, 256) as q, and lse (Hq, T) float32 in log2: what `tree_attention` computes, on sm_90 alone.

    q (T, Hq, 256), k and v (T, Hkv, 256) contiguous bfloat16; subtree_end, position_ids (T,) int32.
    Raises ValueError for any other type, head_dim, or a softcap beyond 80.
    """
    grid, arguments = launch_arguments(q, k, v, subtree_end, position_ids, scale, softcap, window, overlap)
    _hopper_forward_kernel[grid](**arguments, num_warps=4)
    return arguments["o_rows"].base.view(q.shape), arguments["p_lse"]


TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch for sm_90.

    registers and stack bytes a thread; shared bytes a block; said: ptxas on products that may not overlap; loops:
    the instructions of each loop that holds the two products of one key block, in order.
    """

    ptx: str
    registers: int
    stack: int
    shared: int
    said: tuple[str, ...]
    loops: tuple[tuple[str, ...], ...]


def compiled(kernel, arguments, num_warps=4, num_stages=2) -> Compiled:
    """Compile one launch ahead of time, with the facts that its just-in-time compiler would have known."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif hasattr(value, "block_shape"):
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}{layout}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    result = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("cubin", result.asm["cubin"]), ("ptx", result.asm["ptx"].encode())):
            with open(f"{folder}/{name}", "wb") as file:
                file.write(data)

        def ask(tool, *words):
            return subprocess.run([tool, *words], capture_output=True, text=True, check=True, cwd=folder)

        usage = ask(f"{TOOLS}/cuobjdump", "--dump-resource-usage", "cubin").stdout
        sass = ask(f"{TOOLS}/cuobjdump", "-sass", "cubin").stdout
        said = ask(get_ptxas(90).path, "-arch=sm_90a", "-v", "ptx", "-o", os.devnull).stderr
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    said = tuple(line for line in said.splitlines() if "serialized" in line)
    products = arguments["D"] // 16 + (arguments.get("KEYS") or arguments["BLOCK_K"]) // 16
    return Compiled(result.asm["ptx"], registers, stack, result.metadata.shared, said, _loops(sass, products))


def kinds(loop: tuple[str, ...]) -> collections.Counter:
    """How many instructions of a kind: MUFU.EX2 and MUFU.RSQ are two MUFU."""
    return collections.Counter(re.match(r"\w+", line).group() for line in loop)


def _loops(sass: str, products: int) -> tuple[tuple[str, ...], ...]:
    """Every loop with that many wgmma."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(\w.*?) ;", sass)
    places, lines, loops = [int(place, 16) for place, _ in found], [line for _, line in found], {}
    for last, line in enumerate(lines):
        target = re.match(r"BRA.* 0x([0-9a-f]+)", line)
        if target and int(target.group(1), 16) <= places[last]:
            first = places.index(int(target.group(1), 16))
            loop = tuple(lines[first : last + 1])
            # back from a barrier's second try, far below the end: what stores results on its way is no loop
            if kinds(loop)["HGMMA"] == products and not kinds(loop)["STG"]:
                loops[first] = min(loops.get(first, loop), loop, key=len)
    return tuple(loops.values())


def meta_inputs(T=1000, heads=8, kv_heads=4):
    """q, k, v, subtree_end and position_ids without storage: enough to compile a launch."""
    q, k, v = (torch.empty(T, h, 256, dtype=torch.bfloat16, device="meta") for h in (heads, kv_heads, kv_heads))
    return q, k, v, *(torch.empty(T, dtype=torch.int32, device="meta") for _ in range(2))


@functools.cache
def compiled_forward(window: int | None, overlap: bool) -> Compiled:
    """This kernel."""
    return compiled(_hopper_forward_kernel, launch_arguments(*meta_inputs(), 1 / 16, 50.0, window, overlap)[1])


def compiled_triton(window: int | None) -> Compiled:
    """The Triton kernel that the product runs, with the launch config it has for sm_90."""
    kernel, kept = tree_attention._tree_attention_fwd_kernel, {}
    # where kernel[grid](...) stands, something that keeps the arguments
    tree_attention._tree_attention_fwd_kernel = collections.defaultdict(lambda: lambda **given: kept.update(given))
    try:
        tree_attention._tree_attention_fwd(*meta_inputs(), 1 / 16, 50.0, window)
    finally:
        tree_attention._tree_attention_fwd_kernel = kernel
    return compiled(kernel, kept, kept.pop("num_warps"), kept.pop("num_stages"))


def _table() -> None:
    """Resources, and the instructions a warp issues for one key block."""
    names = ("HGMMA", "MUFU", "FMUL", "FADD", "FFMA", "F2FP", "ISETP", "FSEL", "LDG", "BAR", "SYNCS", "LDL", "STL")
    print(f"compiled for sm_90 by Triton {triton.__version__}; not run, its speed is not measured")
    print(f"{'kernel':18} window  registers stack shared   loop     all " + " ".join(f"{name:>5}" for name in names))
    for window in (None, 512):
        for name, result in (
            ("gluon, overlap", compiled_forward(window, True)),
            ("gluon", compiled_forward(window, False)),
            ("triton", compiled_triton(window)),
        ):
            head = f"{name:18} {window or '-':>6} {result.registers:>10} {result.stack:>5} {result.shared:>6}"
            for i, loop in enumerate(result.loops):
                counts = " ".join(f"{kinds(loop)[name]:>5}" for name in names)
                print(f"{head}   {('full', 'partial')[i % 2]:8}{len(loop):>4} {counts}")
            for line in result.said:
                print(f"{head}   {line}")


def _cases():
    """What is checked: (workload, window), odd sizes first; the last is as large as what is timed."""
    for num_tokens, window in ((1, None), (63, None), (129, None), (1000, None), (1000, 300)):
        yield workloads.causal(num_tokens), window
    for num_tokens, window in ((2047, None), (2047, 100), (4096, None), (4096, 1000)):
        yield workloads.from_data("comb", "musique", num_tokens), window
        yield workloads.from_data("tree", "hotpotqa", num_tokens), window
    yield workloads.causal(16384), None


def _inputs(workload, device, heads=8, kv_heads=4):
    torch.manual_seed(workload.num_tokens)
    shapes = [(workload.num_tokens, n, 256) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, device=device).to(torch.bfloat16) for shape in shapes)
    return q, k, v, workload.subtree_end.to(device), workload.position_ids.to(device)


def _check(how: Settings) -> int:
    """No further from float32 truth than the Triton kernel, and 20 runs bitwise the same: a race is seldom so kind."""
    wrong = 0
    for workload, window in _cases():
        x = _inputs(workload, how.device)
        triton_o, triton_lse = tree_attention._tree_attention_fwd(*x, 1 / 16, 50.0, window)
        truth = triton_o.float()
        if workload.num_tokens <= 4096:  # beyond, the reference's scores take gigabytes
            exact = (y.float() for y in x[:3])
            truth = tree_attention.tree_attention_reference(*exact, *x[3:], scale=1 / 16, softcap=50.0, window=window)
        allowed = 1.1 * float((triton_o.float() - truth).norm() / truth.norm()) + 4e-3
        for overlap in (True, False):
            settings = {"scale": 1 / 16, "softcap": 50.0, "window": window, "overlap": overlap}
            o, lse = hopper_forward(*x, **settings)
            error = float((o.float() - truth).norm() / truth.norm())
            lse_error = float((lse - triton_lse).abs().max())
            same = all(torch.equal(o, hopper_forward(*x, **settings)[0]) for _ in range(20))
            good = error <= allowed and lse_error <= 1e-3 and same
            wrong += not good
            what = f"{workload.name}, {workload.num_tokens} tokens, window {window}, overlap {overlap}"
            found = f"error {error:.1e} (allowed {allowed:.1e}), lse {lse_error:.1e}, 20 runs the same: {same}"
            print(f"{'right' if good else 'WRONG'}: {what}: {found}", file=sys.stderr, flush=True)
    return int(wrong > 0)


def _time(how: Settings) -> int:
    report, ceiling = Report("hopper_forward", how), gemm_flops(how)
    for workload, window in (
        (workloads.causal(16384), None),
        (workloads.from_data("comb", "musique", 16384), None),
        (workloads.from_data("comb", "musique", 16384), 1000),
        (workloads.from_data("tree", "hotpotqa", 16384), None),
    ):
        x = _inputs(workload, how.device)
        flops = 4 * x[0].shape[1] * 256 * workloads.live_pairs(workload.position_ids, window)
        settings = {"scale": 1 / 16, "softcap": 50.0, "window": window}
        for provider, op, overlap in (
            ("swirl", tree_attention.tree_attention, {}),
            ("gluon", hopper_forward, {"overlap": False}),
            ("gluon, overlap", hopper_forward, {"overlap": True}),
        ):
            run = functools.partial(op, *x, **settings, **overlap)
            row = report.add(provider, run, floor_s=flops / ceiling, workload=workload.name, window=window)
            row["live_tflops"] = round(flops / row["median_ms"] / 1e9, 1) if "median_ms" in row else None
    report.finish()
    return 0


PARTS = {"--check": (_check, 180), "--time": (_time, 120)}  # seconds at most: a wrong barrier waits for ever


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    how = settings(__doc__.splitlines()[0], [word for word in arguments if word not in PARTS])
    if how.tiny:
        _table()
        return 0
    cuda = how.device.type == "cuda" and torch.cuda.is_available()
    if not cuda or torch.cuda.get_device_capability(how.device)[0] != 9:
        print("hopper_forward: needs a Hopper GPU, none here: nothing run, its speed is not measured", file=sys.stderr)
        return 0
    for part in PARTS.keys() & set(arguments):
        return PARTS[part][0](how)
    for part, (_, limit) in PARTS.items():  # each in a process of its own, which can be ended
        command = [sys.executable, "-m", "benchmarks.hopper_forward", part, *arguments]
        try:
            code = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"not over after {limit} s: a barrier that nobody completes?"
        if code:
            print(f"hopper_forward: {part} failed: {code}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
