"""Every way to compute tree attention that is worth a row, for benchmarks.attention.

An op takes q (T, Hq, D), k and v (T, Hkv, D) and the scale, and returns (T, Hq, D). Ops are built where they are
first called, so that a library that refuses these shapes costs a row and not the run. The calls are written for
flash-attn 2.8.3 and flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.harness import Settings, importable
from benchmarks.workloads import Workload, forest_of
from swirl.kernels import cpu, schedule
from swirl.kernels.tree_attention import tree_attention, tree_attention_reference, tree_mask

SOFTCAP = 50.0
DENSE_BYTES = {"cpu": 8 << 30, "cuda": 40 << 30}  # no dense scores beyond this
MOST_ROWS = 16  # times the packed tokens: beyond, unshared rows are counted, not run

Op = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Provider:
    """One way. make None: not for this machine or this workload, and the note says why."""

    name: str
    make: Callable[[], Op] | None
    num_tokens: int
    note: str = ""
    exact: bool = False  # the same operator on the same tokens: held against swirl before it is timed
    turn: int = 1  # cheap to build first: 0 ours, 2 and 3 what is compiled, and tuned, for each workload


def _flex(mask, window, mode):
    """FlexAttention on (1, H, T, D) with the tree as its mask, compiled in `mode`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    subtree_end, position_ids = mask
    T = subtree_end.numel()

    def visible(b, h, i, j):
        seen = (j <= i) & (i < subtree_end[j])
        return seen if window is None else seen & (position_ids[i] - position_ids[j] < window)

    def capped(score, b, h, i, j):
        return SOFTCAP * torch.tanh(score / SOFTCAP)

    blocks = create_block_mask(visible, None, None, T, T, device=subtree_end.device)
    torch._dynamo.reset()  # after a handful of compilations of one function it would run eagerly, unannounced
    compiled = torch.compile(flex_attention, mode=mode, dynamic=False)
    return _heads_first(
        lambda q, k, v, scale: compiled(
            q, k, v, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    )


def _heads_first(op: Op) -> Op:
    """An op on (1, H, T, D) as one on (T, H, D)."""
    return lambda q, k, v, scale: op(*(x.transpose(0, 1)[None] for x in (q, k, v)), scale)[0].transpose(0, 1)


def _sdpa(attn_mask=None, is_causal=False) -> Op:
    return _heads_first(
        lambda q, k, v, scale: F.scaled_dot_product_attention(
            q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    )


def _bounds(subtree_end) -> list[int]:
    """[0, ..., T]: where the trees of a forest begin and end."""
    bounds = [0]
    while bounds[-1] < subtree_end.numel():
        bounds.append(int(subtree_end[bounds[-1]]))
    return bounds


def _block_diagonal(subtree_end) -> Op:
    """SDPA, causal, one call for all trees if they are of one length: the forks in a tree are not seen as such."""
    bounds, one = _bounds(subtree_end), _sdpa(is_causal=True)
    if len(set(torch.tensor(bounds).diff().tolist())) > 1:
        parts = [slice(*part) for part in zip(bounds, bounds[1:])]
        return lambda q, k, v, scale: torch.cat([one(q[part], k[part], v[part], scale) for part in parts])

    def batched(q, k, v, scale):
        q, k, v = (x.view(len(bounds) - 1, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2).flatten(0, 1)

    return batched


def _cumulative(lengths: Sequence[int], device):
    bounds = torch.tensor((0, *lengths), device=device).cumsum(0).int()
    return bounds, bounds, max(lengths), max(lengths)


def _flash2(flash, lengths, window, device) -> Op:
    """flash-attn 2 over rows that share nothing, softcap and window included."""
    rows = _cumulative(lengths, device)
    left = -1 if window is None else window - 1
    return lambda q, k, v, scale: flash.flash_attn_varlen_func(
        q, k, v, *rows, softmax_scale=scale, causal=True, window_size=(left, 0 if window else -1), softcap=SOFTCAP
    )


def _flash4_rows(flash, lengths, window, device) -> Op:
    """flash-attn-4 over rows that share nothing, softcap and window included."""
    bounds, _, longest, _ = _cumulative(lengths, device)
    return lambda q, k, v, scale: flash.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(None, None) if window is None else (window - 1, 0),
        softcap=SOFTCAP,
    )[0]


def _block_lists(flags):
    """(counts (1, 1, rows), columns (1, 1, rows, columns)) of the True entries of flags (rows, columns)."""
    order = flags.int().argsort(dim=1, descending=True, stable=True).int()
    return flags.sum(1, dtype=torch.int32)[None, None], order[None, None].contiguous()


def sparse_blocks(mask, window, block_q: int, block_k: int, of_queries: bool):
    """(partial counts, partial columns, full counts, full columns): the blocks that flash-attn-4 visits, for each
    block of queries its blocks of keys, or the other way round."""
    live, full = schedule.live_and_full(*mask, block_q, block_k, window)
    partial = live & ~full
    maps = (partial, full) if of_queries else (partial.T, full.T)
    return tuple(x for flags in maps for x in _block_lists(flags))


def _flash4_tree(flash, mask, window, D) -> Op:
    """flash-attn-4 on the tree itself: mask_mod over subtree_end and position_ids, dead blocks skipped."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    @cute.jit
    def tree(batch, head, i, j, seqlen_info, tensors):
        return (j <= i) & (i < utils.scalar_to_ssa(tensors[0][j[0]], cutlass.Int32))

    @cute.jit
    def windowed_tree(batch, head, i, j, seqlen_info, tensors):
        seen = (j <= i) & (i < utils.scalar_to_ssa(tensors[0][j[0]], cutlass.Int32))
        i_depth = utils.scalar_to_ssa(tensors[1][i[0]], cutlass.Int32)
        j_depth = utils.scalar_to_ssa(tensors[1][j[0]], cutlass.Int32)
        return seen & (i_depth - j_depth < utils.scalar_to_ssa(window, cutlass.Int32))

    # sm_90 takes only these: at head_dim 256 its backward has tiles of 64 keys, and the lists of both must fit
    block = 128, 64 if D > 128 else 128
    forward, backward = (
        BlockSparseTensorsTorch(*sparse_blocks(mask, window, *block, of_queries), block_size=block)
        for of_queries in (True, False)
    )
    tensors = [F.pad(x, (0, 256)) for x in mask]  # the last tiles look beyond T
    return lambda q, k, v, scale: flash.flash_attn_func(
        q[None],
        k[None],
        v[None],
        softmax_scale=scale,
        softcap=SOFTCAP,
        mask_mod=tree if window is None else windowed_tree,
        aux_tensors=tensors,
        block_sparse_tensors=forward,
        block_sparse_tensors_bwd=backward,
    )[0][0]


def swirl_op(forest, window: int | None) -> Op:
    """Ours, over (subtree_end, position_ids)."""
    return lambda q, k, v, scale: tree_attention(q, k, v, *forest, scale=scale, softcap=SOFTCAP, window=window)


def _reference(mask, window) -> Op:
    return lambda q, k, v, scale: tree_attention_reference(q, k, v, *mask, scale=scale, softcap=SOFTCAP, window=window)


def _sdpa_tree(mask, window) -> Op:
    return _sdpa(tree_mask(*mask, window))


def providers(workload: Workload, heads: int, D: int, window: int | None, how: Settings) -> Iterator[Provider]:
    """All ways, each with its turn."""
    cuda, T = how.device.type == "cuda", workload.num_tokens
    mask = tuple(x.to(how.device) for x in (workload.subtree_end, workload.position_ids))
    built = cuda or cpu.supports(torch.empty(0, dtype=how.dtype))
    yield Provider("swirl", partial(swirl_op, mask, window), T, "" if built else "C++ not built: the reference", turn=0)
    if heads * T * T * 4 * 3 <= DENSE_BYTES[how.device.type]:
        yield Provider("reference", partial(_reference, mask, window), T, exact=True)
        yield Provider("SDPA, tree mask", partial(_sdpa_tree, mask, window), T, "no softcap")
    else:
        yield Provider("reference", None, T, "dense scores too large")
        yield Provider("SDPA, tree mask", None, T, "dense scores too large")
    diagonal = partial(_block_diagonal, workload.subtree_end)
    yield Provider("SDPA, block-diagonal", diagonal, T, "no softcap, no forks, no window")
    flash2 = importable("flash_attn.flash_attn_interface") if cuda else None
    flash4 = importable("flash_attn.cute") if cuda else None
    tree = partial(_flash4_tree, flash4, mask, window, D) if flash4 else None
    yield Provider("flash-attn-4, tree", tree, T, "" if flash4 else "not importable", exact=True)
    for name, lengths in (("separate passes", workload.separate), ("merged rows", workload.merged)):
        if lengths:
            yield from _unshared(name, lengths, T, flash2, flash4, window, how.device)
    for turn, name, mode in ((2, "default", "default"), (3, "max-autotune", "max-autotune-no-cudagraphs")):
        make = partial(_flex, mask, window, mode) if cuda and not how.tiny else None
        note = "" if make else "no backward on CPU"
        yield Provider(f"FlexAttention, {name}", make, T, note, exact=True, turn=turn)


def _unshared(name, lengths, T, flash2, flash4, window, device) -> Iterator[Provider]:
    """Rows of these lengths, nothing shared: by swirl, and by the libraries that have no trees."""
    tokens = sum(lengths)
    note = f"{tokens / T:.2f} times the tokens"
    if tokens > MOST_ROWS * T:
        yield Provider(f"swirl, {name}", None, tokens, f"{note}: not run", turn=0)
        return
    forest = tuple(x.to(device) for x in forest_of(lengths))
    same = name == "merged rows" and tokens == T
    make = None if same else partial(swirl_op, forest, window)
    yield Provider(f"swirl, {name}", make, tokens, "the packed chain itself" if same else note, turn=0)
    make = partial(_flash2, flash2, lengths, window, device) if flash2 else None
    yield Provider(f"flash-attn, {name}", make, tokens, note if flash2 else "not importable")
    make = partial(_flash4_rows, flash4, lengths, window, device) if flash4 else None
    yield Provider(f"flash-attn-4, {name}", make, tokens, note if flash4 else "not importable")
