"""RMSNorm, RoPE and GeGLU: which share of copy bandwidth?

    python -m benchmarks.pointwise [--device cuda] [--json]

Bytes are the fewest the op can move, read once and written once, over a copy measured in the same run. On
CUDA: Gemma-2 2b's sizes over 16,384 tokens, against the reference, eager and compiled.
"""

from __future__ import annotations

import torch

from benchmarks.harness import Report, copy_bandwidth, settings
from swirl.kernels.geglu import geglu, geglu_reference
from swirl.kernels.rms_norm import norm_add_norm, norm_add_norm_reference, rms_norm, rms_norm_reference
from swirl.kernels.rope import rope, rope_reference


def _cases(T, d, H, D, ffn, how):
    """(op name, ours, reference, inputs, tensors of the first input's size moved forward, and by the
    backward)."""

    def random(*shape):
        return torch.randn(shape, device=how.device).to(how.dtype).requires_grad_()

    position_ids = torch.arange(T, dtype=torch.int32, device=how.device)
    yield "rms_norm", rms_norm, rms_norm_reference, (random(T, d), random(d)), 2, 3
    yield (
        "rms_norm + residual",
        lambda x, weight, residual: rms_norm(x, weight, residual=residual),
        lambda x, weight, residual: rms_norm_reference(x, weight, residual=residual),
        (random(T, d), random(d), random(T, d)),
        3,
        3,
    )
    several = (random(T, d), random(d), random(T, d), random(d))
    yield "norm + residual + norm", norm_add_norm, norm_add_norm_reference, several, 4, 6
    heads = (random(T, H, D),)
    yield "rope", lambda x: rope(x, position_ids), lambda x: rope_reference(x, position_ids), heads, 2, 2
    yield "geglu", geglu, geglu_reference, (random(T, ffn), random(T, ffn)), 3, 5


def main(arguments: list[str] | None = None) -> None:
    how = settings(__doc__.splitlines()[0], arguments)
    cuda = how.device.type == "cuda"
    sizes = (16384, 2304, 8, 256, 9216) if cuda else (2048, 256, 4, 64, 1024)
    sizes = (33, 40, 2, 16, 65) if how.tiny else sizes
    report, bandwidth = Report("pointwise", how), copy_bandwidth(how)
    for name, ours, reference, inputs, forward_tensors, backward_tensors in _cases(*sizes, how):
        providers = [("swirl", ours), ("reference, eager", reference)]
        if cuda:
            providers.append(("reference, compiled", torch.compile(reference)))
        size = inputs[0].numel() * inputs[0].element_size()
        dy = torch.randn_like(inputs[0])
        for provider, op in providers:

            def forward(op=op, inputs=inputs):
                with torch.no_grad():
                    return op(*inputs)

            report.add(
                provider,
                forward,
                floor_s=forward_tensors * size / bandwidth,
                op=name,
                phase="forward",
                gigabytes=round(forward_tensors * size / 1e9, 4),
            )
            y = op(*inputs)

            def backward(y=y, inputs=inputs, dy=dy):
                return torch.autograd.grad(y, inputs, [dy] * len(y) if isinstance(y, tuple) else dy, retain_graph=True)

            report.add(
                provider,
                backward,
                floor_s=backward_tensors * size / bandwidth,
                op=name,
                phase="backward",
                gigabytes=round(backward_tensors * size / 1e9, 4),
            )
    report.finish()


if __name__ == "__main__":
    main()
