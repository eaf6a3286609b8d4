"""Tree attention against every other way to compute it: where does the tree pay, and how near is the floor?

    python -m benchmarks.attention [--device cuda] [--json]     all workloads, forward, and forward + backward
    python -m benchmarks.attention --crossover                  tree against separate passes, by trunk

TFLOP/s and the floor count live pairs alone: 4 * heads * head_dim FLOPs a pair forward, 3.5 times that with
the backward, over the rate of a matrix product measured in the same run. Providers: swirl; the reference
(dense, eager); SDPA with the same mask, and block-diagonal (neither has a softcap, and the second no forks:
speed references); FlexAttention, default and max-autotune, with the same mask and score modification;
flash-attn by sequence; and "swirl, separate passes": one sequence a sub-trajectory, nothing shared.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from benchmarks import workloads
from benchmarks.harness import Report, Settings, gemm_flops, importable, settings
from swirl.kernels import cpu
from swirl.kernels.tree_attention import tree_attention, tree_attention_reference, tree_mask

SOFTCAP, DENSE_BYTES = 50.0, 8 << 30  # no dense score matrix beyond this


def _workloads(how: Settings):
    """(workload, query heads, key heads, head_dim, window)."""
    if how.tiny:
        yield workloads.trees_of_256(256), 2, 1, 32, None
        yield workloads.from_data("comb", "musique", 300), 2, 1, 32, 64
    elif how.device.type == "cuda":  # Gemma-2 2b
        for kind, dataset in (
            ("chain", "gsm8k"),
            ("comb", "gsm8k"),
            ("comb", "musique"),
            ("tree", "hotpotqa"),
        ):
            yield workloads.from_data(kind, dataset, 16384), 8, 4, 256, None
        yield workloads.agent(32768), 8, 4, 256, None
        yield workloads.agent(32768), 8, 4, 256, 4096
        yield workloads.causal(16384), 8, 4, 256, None
    else:
        yield workloads.trees_of_256(4096), 4, 4, 32, None
        yield workloads.density_039(2048), 8, 8, 256, None
        yield workloads.causal(2048), 8, 8, 256, None
        yield workloads.from_data("comb", "musique", 2048), 4, 2, 32, None


def _flex(mask, softcap, window, mode):
    """FlexAttention on (1, H, T, D) with the tree as its mask, compiled in `mode`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    subtree_end, position_ids = mask
    T = subtree_end.numel()

    def visible(b, h, i, j):
        seen = (j <= i) & (i < subtree_end[j])
        return seen if window is None else seen & (position_ids[i] - position_ids[j] < window)

    def capped(score, b, h, i, j):
        return softcap * torch.tanh(score / softcap)

    blocks = create_block_mask(visible, None, None, T, T, device=subtree_end.device)
    compiled = torch.compile(flex_attention, mode=mode, dynamic=False)
    return lambda q, k, v, scale: compiled(
        q, k, v, score_mod=capped, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _heads_first(op):
    """An op on (1, H, T, D) as one on (T, H, D)."""
    return lambda q, k, v, scale: op(*(x.transpose(0, 1)[None] for x in (q, k, v)), scale)[0].transpose(0, 1)


def _sdpa(attn_mask=None, is_causal=False):
    return _heads_first(
        lambda q, k, v, scale: F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    )


def _block_diagonal(subtree_end):
    """SDPA, causal, one call for all trees of a length: the forks within a tree are not seen as such."""
    ends = subtree_end[subtree_end.long().roll(-1) != subtree_end].unique().tolist()
    T, roots, start = subtree_end.numel(), [], 0
    while start < T:
        roots.append((start, int(subtree_end[start])))
        start = roots[-1][1]
    sizes = {end - start for start, end in roots}
    if len(sizes) > 1 or not ends:
        parts = [slice(*root) for root in roots]
        one = _sdpa(is_causal=True)
        return lambda q, k, v, scale: torch.cat([one(q[part], k[part], v[part], scale) for part in parts])

    def batched(q, k, v, scale):
        q, k, v = (x.view(len(roots), -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2).reshape(T, q.shape[1], -1)

    return batched


def _flash(flash, subtree_end):
    """flash-attn over separate sequences, with the softcap."""
    T, ends, start = subtree_end.numel(), [0], 0
    while start < T:
        start = int(subtree_end[start])
        ends.append(start)
    bounds = torch.tensor(ends, dtype=torch.int32, device=subtree_end.device)
    longest = int(bounds.diff().max())
    return lambda q, k, v, scale: flash.flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=scale, causal=True, softcap=SOFTCAP
    )


def _providers(workload, heads, window, how):
    """(name, op or None, mask, note); op(q, k, v, scale) on the tokens of that mask."""
    cuda = how.device.type == "cuda"
    mask = tuple(x.to(how.device) for x in (workload.subtree_end, workload.position_ids))
    T, options = workload.num_tokens, {"softcap": SOFTCAP, "window": window}
    ready = cuda or cpu.supports(torch.empty(0, dtype=how.dtype))
    yield (
        "swirl",
        lambda *x: tree_attention(*x[:3], *mask, scale=x[3], **options),
        mask,
        "" if ready else "not built",
    )
    dense = None if heads * T * T * 4 * 3 > DENSE_BYTES else True
    too_large = "" if dense else "dense scores too large"
    yield (
        "reference",
        dense and (lambda *x: tree_attention_reference(*x[:3], *mask, scale=x[3], **options)),
        mask,
        too_large,
    )
    yield "SDPA, tree mask", dense and _sdpa(tree_mask(*mask, window)), mask, too_large or "no softcap"
    yield (
        "SDPA, block-diagonal",
        _block_diagonal(workload.subtree_end),
        mask,
        "no softcap, no forks, no window",
    )
    for mode in ("default", "max-autotune"):
        name = f"FlexAttention, {mode}"
        if cuda and not how.tiny:
            yield name, _heads_first(_flex(mask, SOFTCAP, window, mode)), mask, ""
        else:
            yield name, None, mask, "no backward on CPU"
    if workload.separate is not None:
        separate = tuple(x.to(how.device) for x in workload.separate)
        if separate[0].numel() <= 16 * T:
            yield (
                "swirl, separate passes",
                lambda *x: tree_attention(*x[:3], *separate, scale=x[3], **options),
                separate,
                f"{separate[0].numel() / T:.2f} times the tokens",
            )
        flash = importable("flash_attn") if cuda else None
        note = "separate passes" if flash else "not importable"
        yield "flash-attn, varlen", flash and _flash(flash, separate[0]), separate, note


def _measure(report, workload, shape, ceiling):
    heads, kv_heads, D, window = shape
    how, scale = report.how, D**-0.5
    flops = 4 * heads * D * workloads.live_pairs(workload.position_ids, window)
    facts = {
        "workload": workload.name,
        "tokens": workload.num_tokens,
        "heads": f"{heads}/{kv_heads}",
        "head_dim": D,
    }
    for name, op, mask, note in _providers(workload, heads, window, how):
        T = mask[0].numel()
        q, k, v = (torch.randn(T, h, D, device=how.device).to(how.dtype) for h in (heads, kv_heads, kv_heads))
        do = torch.randn_like(q)
        for x in (q, k, v):
            x.requires_grad_()

        def forward(op=op, q=q, k=k, v=v):
            with torch.no_grad():
                return op(q, k, v, scale)

        def both(op=op, q=q, k=k, v=v, do=do):
            return torch.autograd.grad(op(q, k, v, scale), (q, k, v), do)

        for phase, run, factor in (("forward", forward, 1.0), ("both", both, 3.5)):
            floor_s = factor * flops / ceiling
            report.add(name, op and run, floor_s=floor_s, note=note, phase=phase, window=window, **facts)
            row = report.rows[-1]
            if "median_ms" in row:
                row["live_tflops"] = round(factor * flops / row["median_ms"] / 1e9, 3)


def _crossover(report):
    """A trunk of n tokens with 4 branches of 64 at its end, against 4 sequences of n + 64."""
    how = report.how
    heads, D, repeats = (8, 256, 16) if how.device.type == "cuda" else (4, 32, 2)
    heads, D = (2, 32) if how.tiny else (heads, D)
    for trunk in (0, 16) if how.tiny else (0, 16, 64, 256, 1024, 4096):
        size = trunk + 256
        end = torch.tensor([size] * trunk + [trunk + 64 * (i // 64 + 1) for i in range(256)])
        position = torch.cat([torch.arange(trunk), *[torch.arange(trunk, trunk + 64)] * 4])
        end = (end + size * torch.arange(repeats)[:, None]).reshape(-1).int()
        forms = {
            "tree": (end, position.repeat(repeats).int()),
            "separate": workloads.forest_of([trunk + 64] * 4 * repeats),
        }
        for form, mask in forms.items():
            mask = tuple(x.to(how.device) for x in mask)
            x = [torch.randn(mask[0].numel(), heads, D, device=how.device).to(how.dtype) for _ in range(4)]
            for leaf in x[:3]:
                leaf.requires_grad_()

            def both(x=x, mask=mask):
                o = tree_attention(*x[:3], *mask, scale=D**-0.5, softcap=SOFTCAP)
                return torch.autograd.grad(o, x[:3], x[3])

            report.add("swirl", both, workload=f"{form}, trunk {trunk}", tokens=mask[0].numel(), phase="both")
        tree, separate = (row["median_ms"] for row in report.rows[-2:])
        report.rows[-1]["tree_pays"] = round(separate / tree, 3)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    crossover = "--crossover" in arguments
    how = settings(__doc__.splitlines()[0], [word for word in arguments if word != "--crossover"])
    report = Report("attention", how)
    if crossover:
        _crossover(report)
    else:
        ceiling = gemm_flops(how)
        for workload, *shape in _workloads(how):
            _measure(report, workload, shape, ceiling)
    report.finish()


if __name__ == "__main__":
    main()
