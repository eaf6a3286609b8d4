"""LM head and log-prob: how near the rate of a matrix product, in how much memory, against every fused peer?

    python -m benchmarks.linear_log_prob [--device cuda] [--json]

Gemma-2 2b's head (d 2304, 256,000 words, softcap 30) over 8192 rows on CUDA; a small one on CPU. FLOPs are
counted 2 M d V forward and 6 M d V with the backward: recomputing the logits counts for nothing. extra_bytes
is the peak beyond the two gradients. Liger and cut-cross-entropy are measured where they are installed;
Liger's takes the mean over rows, which is the same work.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Report, gemm_flops, importable, settings
from swirl.kernels.linear_log_prob import _ChunkedLinearLogProb, linear_log_prob, linear_log_prob_reference

SOFTCAP = 30.0


def _providers(cuda: bool, logits_bytes: int):
    """(name, op(hidden, weight, target_ids) -> a tensor to sum, note)."""
    yield "swirl", lambda *x: linear_log_prob(*x, softcap=SOFTCAP), ""
    if cuda:  # by itself it takes what is free, up to 1 GB
        yield "swirl, in 64 MB", lambda *x: linear_log_prob(*x, softcap=SOFTCAP, extra_bytes=64 << 20), ""
    yield "swirl, with entropy", lambda *x: sum(linear_log_prob(*x, softcap=SOFTCAP, return_entropy=True)), ""
    fits = logits_bytes < 32 << 30
    reference = (lambda *x: linear_log_prob_reference(*x, softcap=SOFTCAP)) if fits else None
    yield "reference", reference, "" if fits else "logits too large"
    yield "torch, chunked by rows", lambda *x: _ChunkedLinearLogProb.apply(*x, SOFTCAP, False)[0], ""
    liger = importable("liger_kernel.transformers.functional") if cuda else None
    op = liger and (
        lambda hidden, weight, target_ids: liger.liger_fused_linear_cross_entropy(
            hidden, weight, target_ids, softcap=SOFTCAP
        )
    )
    yield "Liger", op, "" if op else "not importable"
    peer = importable("cut_cross_entropy") if cuda else None
    op = peer and (
        lambda hidden, weight, target_ids: peer.linear_cross_entropy(
            hidden, weight, target_ids, softcap=SOFTCAP, reduction="none"
        )
    )
    yield "cut-cross-entropy", op, "" if op else "not importable"


def main(arguments: list[str] | None = None) -> None:
    how = settings(__doc__.splitlines()[0], arguments)
    cuda = how.device.type == "cuda"
    M, d, V = (8192, 2304, 256_000) if cuda else (512, 256, 32_000)
    M, d, V = (33, 64, 500) if how.tiny else (M, d, V)
    report, ceiling = Report("linear_log_prob", how), gemm_flops(how)
    hidden = torch.randn(M, d, device=how.device).to(how.dtype).requires_grad_()
    weight = (torch.randn(V, d, device=how.device) * d**-0.5).to(how.dtype).requires_grad_()
    target_ids = torch.randint(0, V, (M,), device=how.device)
    gradients = (M * d + V * d) * hidden.element_size()
    for name, op, note in _providers(cuda, 6 * M * V * 4):

        def forward(op=op):
            with torch.no_grad():
                return op(hidden, weight, target_ids)

        def both(op=op):
            return torch.autograd.grad(op(hidden, weight, target_ids).sum(), (hidden, weight))

        for phase, run, flops in (("forward", forward, 2 * M * d * V), ("both", both, 6 * M * d * V)):
            facts = {"phase": phase, "rows": M, "d": d, "vocabulary": V}
            row = report.add(name, op and run, floor_s=flops / ceiling, note=note, **facts)
            if "median_ms" in row:
                row["tflops"] = round(flops / row["median_ms"] / 1e9, 3)
                if row["peak_bytes"] is not None:
                    row["extra_bytes"] = row["peak_bytes"] - (gradients if phase == "both" else 0)
    report.finish()


if __name__ == "__main__":
    main()
