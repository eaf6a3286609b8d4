"""Every Triton kernel, in every launch config, compiled ahead of time for sm_80, sm_90 and sm_100: no GPU.

The launchers themselves say what to compile: they run on the meta device, with a recorder where the kernel
stands. Each launch must fit shared memory and keep its stack (registers spilt to memory) within SPILLS.
`python tests/test_triton_compile.py` prints the table of registers, stack and shared memory.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile

import pytest
import torch

from swirl.kernels import (
    _triton,
    geglu,
    head_draw,
    linear_log_prob,
    norm_rope,
    rms_norm,
    rope,
    schedule,
    tree_attention,
    tree_decode,
)
from tests.kernels.recording import recorded

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Stack bytes a thread that are allowed, by kernel and type, to Triton 3.6 and to later ones (read with 3.9);
# what is not here may have none.
SPILLS = {
    # tf32x3 splits every float32 operand in two: float32 is there to be exact, not fast
    ("_tree_attention_fwd_kernel", "fp32"): (48, 64),
    ("_tree_attention_dq_kernel", "fp32"): (112, 144),
    ("_tree_attention_dkv_kernel", "fp32"): (208, 240),
    ("_tree_kernel", "fp32"): (304, 304),  # its rows are gathered: an address each
    ("_own_kernel", "fp32"): (96, 96),
    # a few loop invariants beside accumulators that fill the register file
    ("_tree_attention_fwd_kernel", "bf16"): (0, 64),
    ("_tree_attention_fwd_kernel", "fp16"): (32, 80),
    ("_tree_attention_dq_kernel", "bf16"): (56, 32),
    ("_tree_attention_dkv_kernel", "bf16"): (32, 192),
    # in the epilogue alone, once after a loop of at least 1024 products: the loop itself spills nothing
    ("_linear_log_prob_fwd_kernel", "bf16"): (0, 152),
    ("_d_logits_kernel", "bf16"): (336, 384),
    ("_d_hidden_kernel", "bf16"): (448, 384),
    # not spills: where sin and cos reduce arguments beyond 1e5, a path that is hardly ever taken
    ("_rope_kernel", "bf16"): (32, 32),
    ("_rope_kernel", "fp32"): (32, 32),
    ("_norm_rope_fwd_kernel", "bf16"): (32, 0),
    ("_norm_rope_fwd_kernel", "fp32"): (32, 0),
    ("_norm_rope_bwd_kernel", "bf16"): (32, 0),
    ("_norm_rope_bwd_kernel", "fp32"): (32, 8),
}
HOPPERS_OWN = ("attention-256-bf16", "attention-256-capless-512-bf16", "attention-128-capless-1024-bf16", "head-bf16")
LATER = tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6)


def empty(*shape, dtype=torch.bfloat16, requires_grad=True):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=requires_grad)


def integers(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(D, dtype, scratch_bytes=1 << 40, softcap=50.0, window=512, kv_heads=4):
    tree_attention.SCRATCH_BYTES = scratch_bytes  # put back by launches_of
    q, k, v = (empty(2000, heads, D, dtype=dtype) for heads in (8, kv_heads, kv_heads))
    mask = integers(2000), integers(2000)
    o = tree_attention.tree_attention(q, k, v, *mask, scale=D**-0.5, softcap=softcap, window=window)
    if dtype != torch.float16:  # its backward is bfloat16's
        o.sum().backward()


def head(dtype, return_entropy, softcap=30.0, d=2304, V=256_000):
    hidden, weight = empty(8192, d, dtype=dtype), empty(V, d, dtype=dtype)
    target_ids = integers(8192, dtype=torch.int64)
    settings = dict(softcap=softcap, return_entropy=return_entropy)
    log_probs = linear_log_prob.linear_log_prob(hidden, weight, target_ids, **settings)
    (sum(log_probs) if return_entropy else log_probs).sum().backward()


def pointwise(d, dtype):
    x, weight = empty(1000, d, dtype=dtype), empty(d, dtype=dtype)
    rms_norm.rms_norm(x, weight).sum().backward()
    rms_norm.rms_norm(x, weight, residual=x).sum().backward()
    sum(rms_norm.norm_add_norm(x, weight, x, weight)).sum().backward()
    geglu.geglu(x, x).sum().backward()
    rope.rope(x.view(1000, -1, 256), integers(1000)).sum().backward()


def head_norms(H, D, dtype):
    x, weight = empty(1000, H, D, dtype=dtype), empty(D, dtype=dtype)
    norm_rope.norm_rope(x, weight, integers(1000)).sum().backward()


def decode(D, dtype, softcap=50.0):
    q, pool = empty(64, 8, D, dtype=dtype), empty(9000, 4, D, dtype=dtype)
    tree, rows = [integers(4096)] * 3, [integers(64), integers(64, 64), integers(64)]
    with torch.no_grad():
        tree_decode.tree_decode(q, pool, pool, *tree, *rows, scale=D**-0.5, softcap=softcap, window=4096)


def draw(rows, dtype, softcap=30.0, d=2304, V=256_000):
    hidden, weight = empty(rows, d, dtype=dtype), empty(V, d, dtype=dtype)
    head_draw.head_draw(hidden, weight, *[empty(rows, dtype=torch.float64)] * 2, softcap=softcap)


CASES = {
    **{
        f"attention-{D}-{TYPES[dtype]}": ((tree_attention,), attention, (D, dtype))
        for D in (64, 128, 256)
        for dtype in (torch.bfloat16, torch.float32)
    },
    "attention-256-anew-bf16": ((tree_attention,), attention, (256, torch.bfloat16, 0)),
    # Gemma 3: no softcap, so a running maximum; windows of 512 (1b and smaller) and 1024, and layers without one
    **{
        f"attention-{D}-capless-{name}-{TYPES[dtype]}": (
            (tree_attention,),
            attention,
            (D, dtype, scratch, None, window, 2 if window == 512 else 4),  # four query heads a key head, as the 1b has
        )
        for D, name, window, scratch, dtype in (
            (256, "512", 512, 1 << 40, torch.bfloat16),
            (256, "anew-full", None, 0, torch.bfloat16),
            (256, "1024", 1024, 1 << 40, torch.float32),
            (128, "1024", 1024, 1 << 40, torch.bfloat16),
            (128, "full", None, 1 << 40, torch.bfloat16),
            (64, "512", 512, 1 << 40, torch.bfloat16),
        )
    },
    "attention-256-fp16": ((tree_attention,), attention, (256, torch.float16)),
    "head-bf16": ((linear_log_prob,), head, (torch.bfloat16, False)),
    "head-entropy-bf16": ((linear_log_prob,), head, (torch.bfloat16, True)),
    "head-fp32": ((linear_log_prob,), head, (torch.float32, True)),
    "head-capless-bf16": ((linear_log_prob,), head, (torch.bfloat16, False, None, 1152, 262_144)),
    **{
        f"head-draw-{rows}-{TYPES[dtype]}": ((head_draw,), draw, (rows, dtype))
        for rows, dtype in ((64, torch.bfloat16), (512, torch.bfloat16), (64, torch.float32))
    },
    "head-draw-capless-bf16": ((head_draw,), draw, (64, torch.bfloat16, None, 1152, 262_144)),
    **{
        f"head-norms-{H}x{D}-{TYPES[dtype]}": ((norm_rope,), head_norms, (H, D, dtype))
        for H, D in ((1, 256), (16, 256), (32, 128))
        for dtype in (torch.bfloat16, torch.float32)
    },
    "decode-256-capless-bf16": ((tree_decode,), decode, (256, torch.bfloat16, None)),
    **{
        f"{name}-{size}-{TYPES[dtype]}": (modules, op, (size, dtype))
        for name, modules, op, size, dtype in (
            ("pointwise", (rms_norm, geglu, rope), pointwise, 2304, torch.bfloat16),
            ("pointwise", (rms_norm, geglu, rope), pointwise, 4608, torch.float32),
            ("decode", (tree_decode,), decode, 64, torch.bfloat16),
            ("decode", (tree_decode,), decode, 256, torch.bfloat16),
            ("decode", (tree_decode,), decode, 256, torch.float32),
        )
    },
}


def launches_of(case, architecture, monkeypatch):
    modules, op, arguments = CASES[case]
    launches = recorded(monkeypatch, architecture, modules)
    blocks = schedule.LiveBlocks(integers(8), integers(8, 8), 30)  # the meta device cannot count them
    monkeypatch.setattr(tree_attention, "live_blocks_of", lambda *mask: blocks)
    monkeypatch.setattr(tree_attention, "SCRATCH_BYTES", tree_attention.SCRATCH_BYTES)
    op(*arguments)
    return launches


def compiled(kernel, arguments, architecture):
    """What triton.compile makes of one launch, with the facts its just-in-time compiler would have known."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, _triton.TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(result):
    """Registers and stack bytes a thread, from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))


def serialized(ptx):
    """What ptxas says where it must let one of Hopper's asynchronous products end before the next may start."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-arch=sm_90a", "-v", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return [line for line in said.splitlines() if "serialized" in line]


def results(case, architecture, monkeypatch):
    """(name, type, registers, stack, shared memory, ptx) of each distinct launch of one case."""
    seen = set()
    for kernel, arguments in launches_of(case, architecture, monkeypatch):
        result = compiled(kernel, arguments, architecture)
        if result.hash not in seen:
            seen.add(result.hash)
            registers, stack = resources(result)
            yield kernel.fn.__name__, registers, stack, result.metadata.shared, result.asm["ptx"]


# One kernel of each kind for one chip (the head's own for Hopper takes long); the whole matrix is `make test-all`'s.
QUICK = {
    ("attention-256-bf16", 90),
    ("attention-256-capless-512-bf16", 90),
    ("head-bf16", 80),
    ("head-norms-1x256-bf16", 90),
    ("pointwise-2304-bf16", 90),
}
MATRIX = [
    pytest.param(case, architecture, marks=[] if (case, architecture) in QUICK else pytest.mark.slow)
    for case in CASES
    for architecture in ARCHITECTURES
]


def test_the_quick_cases_are_cases():
    assert QUICK <= {(case, architecture) for case in CASES for architecture in ARCHITECTURES}


@pytest.mark.parametrize(("case", "architecture"), MATRIX)
def test_compiles_fits_and_does_not_spill(case, architecture, monkeypatch):
    dtype = case.rpartition("-")[2]
    found = list(results(case, architecture, monkeypatch))
    assert found
    for name, _, stack, shared, ptx in found:
        assert shared <= SHARED_MEMORY[architecture], f"{name}: {shared} bytes of shared memory"
        assert stack <= SPILLS.get((name, dtype), (0, 0))[LATER], f"{name}: {stack} bytes of stack"
        if architecture == 90 and case.startswith(HOPPERS_OWN):
            assert "wgmma" in ptx and "cp.async.bulk.tensor" in ptx, f"{name}: not on Hopper's own instructions"
            assert not serialized(ptx), f"{name}: {serialized(ptx)}"


if __name__ == "__main__":
    for case in CASES:
        for architecture in ARCHITECTURES:
            with pytest.MonkeyPatch.context() as monkeypatch:
                for name, registers, stack, shared, _ in results(case, architecture, monkeypatch):
                    row = f"{case:18} sm_{architecture:<4} {name:28}"
                    print(f"{row} {registers:4} {stack:5} {shared / 1024:5.0f} KB", flush=True)
