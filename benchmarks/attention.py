"""Tree attention against every other way to compute it: where does the tree pay, and how near is the floor?

    python -m benchmarks.attention [--device cuda] [--json]     all workloads, forward, and forward + backward
    python -m benchmarks.attention --crossover                  tree against separate passes, by trunk and branches

TFLOP/s and the floor count live pairs alone: 4 * heads * head_dim FLOPs a pair forward, 3.5 times that with
the backward, over the rate of a matrix product measured in the same run. Providers: swirl; the reference
(dense, eager); SDPA with the same mask, and block-diagonal (neither has a softcap, and the second no forks:
speed references); FlexAttention, default and max-autotune, and flash-attn-4, with the same mask and softcap; and
the ways that share nothing, by swirl, flash-attn and flash-attn-4: separate passes, a row a sub-trajectory, and
merged rows, a row a leaf (benchmarks/workloads.py). `difference`: what claims to be the same operator, against
swirl, the largest relative norm over the output and the three gradients.
On CUDA, Gemma-2 2b's heads; on CPU those of the model that ships wherever the workload is not a bar's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks import workloads
from benchmarks.attention_peers import Op, Provider, providers, swirl_op
from benchmarks.harness import Report, Settings, command_line, difference, gemm_flops, reason, settings_of

BRANCH = 64  # tokens a branch of the crossover
WRONG = 0.05  # difference, beyond what any rounding makes


def _workloads(how: Settings):
    """(workload, query heads, key heads, head_dim, window): first those a bar is set for."""
    from_data = workloads.from_data
    if how.tiny:
        yield workloads.trees_of_256(256), 2, 1, 32, None
        yield from_data("comb", "musique", 300), 2, 1, 32, 64
        yield from_data("chain", "gsm8k", 300), 2, 1, 32, None
    elif how.device.type == "cuda":  # 16,384 tokens each, so that what is compiled for one serves all
        yield from_data("comb", "musique", 16384), 8, 4, 256, None
        yield from_data("tree", "hotpotqa", 16384), 8, 4, 256, None
        yield workloads.causal(16384), 8, 4, 256, None
        yield from_data("comb", "gsm8k", 16384), 8, 4, 256, None
        yield from_data("chain", "gsm8k", 16384), 8, 4, 256, None
        yield workloads.agent(32768), 8, 4, 256, None
        yield workloads.agent(32768), 8, 4, 256, 4096
    else:
        yield workloads.trees_of_256(4096), 4, 4, 32, None
        yield workloads.density_039(2048), 8, 8, 256, None
        yield workloads.causal(2048), 8, 8, 256, None
        yield from_data("chain", "gsm8k", 2048), 4, 2, 32, None
        yield from_data("comb", "musique", 2048), 4, 2, 32, None
        yield from_data("tree", "hotpotqa", 4096), 4, 2, 32, None
        yield workloads.agent(32768), 4, 2, 32, None


def _inputs(T, heads, kv_heads, D, how: Settings):
    """q, k, v (leaves) and the gradient of the output."""
    shapes = [(T, heads, D), (T, kv_heads, D), (T, kv_heads, D), (T, heads, D)]
    *leaves, do = (torch.randn(shape, device=how.device).to(how.dtype) for shape in shapes)
    return *(x.requires_grad_() for x in leaves), do


def _results(op: Op, q, k, v, do):
    """The output and the gradients of q, k and v."""
    o = op(q, k, v, q.shape[2] ** -0.5)
    return o.detach(), *torch.autograd.grad(o, (q, k, v), do)


@dataclass
class Case:
    """A workload and shapes, with inputs; `truth` holds swirl's results, once there are some."""

    workload: workloads.Workload
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    inputs: tuple[torch.Tensor, ...]
    truth: tuple[torch.Tensor, ...] | None = None


def _measure_all(report: Report, shapes, ceiling: float):
    """Every provider on every workload, the cheap ones on all before the dear ones on any: a run that is cut short
    lacks what takes minutes to compile, and nothing of swirl's own.
    """
    how, turns = report.how, []
    for workload, heads, kv_heads, D, window in shapes:
        case = Case(workload, heads, kv_heads, D, window, _inputs(workload.num_tokens, heads, kv_heads, D, how))
        turns += [(provider, case) for provider in providers(workload, heads, D, window, how)]
    for provider, case in sorted(turns, key=lambda turn: turn[0].turn):
        if how.compile_only and provider.name != "swirl":
            break  # swirl's come first
        _measure(report, provider, case, ceiling)


def _measure(report: Report, provider: Provider, case: Case, ceiling: float):
    heads, kv_heads, D, workload = case.heads, case.kv_heads, case.head_dim, case.workload
    how = report.how
    flops = 4 * heads * D * workloads.live_pairs(workload.position_ids, case.window)
    facts = {"workload": workload.name, "window": case.window, "heads": f"{heads}/{kv_heads}", "head_dim": D}
    facts["tokens"] = provider.num_tokens
    op, note, distance, x = None, provider.note, 0.0, case.inputs
    if provider.make and provider.num_tokens != workload.num_tokens:
        x = _inputs(provider.num_tokens, heads, kv_heads, D, how)
    try:
        op = provider.make and provider.make()
        if op and (provider.exact or case.truth is None):
            results = _results(op, *x)
            case.truth = case.truth or results
            distance = difference(results, case.truth) if provider.exact else 0.0
            if not distance <= WRONG:
                note = f"another result than swirl's: {distance:.2e} of its norm"
    except Exception as error:
        if provider.name == "swirl":
            raise
        op, note = None, reason(error)
    if op is None:
        report.add(provider.name, None, note=note, phase="both", **facts)
        return

    def forward():
        with torch.no_grad():
            return op(*x[:3], D**-0.5)

    def both():
        return _results(op, *x)

    for phase, run, factor in (("forward", forward, 1.0), ("both", both, 3.5)):
        row = report.add(provider.name, run, floor_s=factor * flops / ceiling, note=note, phase=phase, **facts)
        if provider.exact and distance <= WRONG:
            row["difference"] = float(f"{distance:.2e}")
        if "median_ms" in row:
            row["live_tflops"] = round(factor * flops / row["median_ms"] / 1e9, 3)


def _crossover(report: Report):
    """Trunks of n tokens with 2, 4 or 16 branches of 64 at their end, against as many sequences of n + 64."""
    how = report.how
    heads, D, most_tokens = (8, 256, 1 << 18) if how.device.type == "cuda" else (4, 32, 1 << 14)
    heads, D, most_tokens = (2, 32, 1) if how.tiny else (heads, D, most_tokens)
    for branches in (2, 4) if how.tiny else (2, 4, 16):
        for trunk in (0, 16) if how.tiny else (0, 16, 64, 256, 1024, 4096):
            repeats = max(1, most_tokens // (branches * (trunk + BRANCH)))  # of them, so that the machine is busy
            workload = workloads.fork(trunk, branches, BRANCH, repeats)
            forms = {
                "tree": (workload.subtree_end, workload.position_ids),
                "separate": workloads.forest_of(workload.separate),
            }
            rows = []
            for form, mask in forms.items():
                op = swirl_op(tuple(x.to(how.device) for x in mask), None)
                x = _inputs(mask[0].numel(), heads, heads, D, how)
                row = report.add(
                    "swirl",
                    lambda op=op, x=x: _results(op, *x),
                    phase="both",
                    form=form,
                    trunk=trunk,
                    branches=branches,
                    branch=BRANCH,
                    heads=f"{heads}/{heads}",
                    head_dim=D,
                    tokens=mask[0].numel(),
                )
                rows.append(row)
            if how.compile_only:
                return  # one shape is compiled for all
            tree, separate = rows
            separate["time_ratio"] = round(separate["median_ms"] / tree["median_ms"], 3)
            separate["token_ratio"] = round(separate["tokens"] / tree["tokens"], 3)


def main(arguments: list[str] | None = None) -> None:
    parser = command_line(__doc__.splitlines()[0])
    parser.add_argument("--crossover", action="store_true", help="the tree against separate passes, by trunk")
    given = parser.parse_args(arguments)
    how = settings_of(given)
    report = Report("crossover" if given.crossover else "attention", how)
    if given.crossover:
        _crossover(report)
    else:
        _measure_all(report, _workloads(how), gemm_flops(how))
    report.finish()


if __name__ == "__main__":
    main()
