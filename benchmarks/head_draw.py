"""Head and draw of a token step: what does it save never to write the logits down?

    python -m benchmarks.head_draw [--device cuda] [--json]

Gemma-2 2b's head (d 2304, 256,000 words, softcap 30) and one draw for each of 1 to 512 sequences on CUDA; a small one
on CPU. The floor is the longer of the weights' bytes over a copy's rate and the product's FLOPs over a matrix product's
rate, both measured in the same run. The reference makes the logits, in float32, and draws from them by torch.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Report, copy_bandwidth, gemm_flops, settings
from swirl.kernels.head_draw import head_draw, head_draw_reference

SOFTCAP = 30.0


def main(arguments: list[str] | None = None) -> None:
    how = settings(__doc__.splitlines()[0], arguments)
    d, V, sizes = (2304, 256_000, (1, 16, 64, 256, 512)) if how.device.type == "cuda" else (256, 32_000, (1, 64))
    d, V, sizes = (64, 500, (1, 33)) if how.tiny else (d, V, sizes)
    report, flops, bandwidth = Report("head_draw", how), gemm_flops(how), copy_bandwidth(how)
    weight = (torch.randn(V, d, device=how.device) * d**-0.5).to(how.dtype)
    for B in sizes:
        hidden = torch.randn(B, d, device=how.device).to(how.dtype)
        uniforms = torch.rand(B, dtype=torch.float64, device=how.device)
        inputs = hidden, weight, uniforms, torch.ones_like(uniforms)
        floor_s = max(weight.nbytes / bandwidth, 2 * B * d * V / flops)
        for provider, op in (("swirl", head_draw), ("reference", head_draw_reference)):
            facts = {"sequences": B, "d": d, "vocabulary": V}
            report.add(provider, lambda op=op, x=inputs: op(*x, softcap=SOFTCAP), floor_s=floor_s, **facts)
    report.finish()


if __name__ == "__main__":
    main()
