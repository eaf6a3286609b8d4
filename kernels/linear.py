"""Linear layer without bias: y = x weight^T.

x (..., K), weight (N, K) -> (..., N) as x.
Numerics: float32 accumulation in the library's or the C++ kernel's own fixed order.
Floor: 2 * rows * K * N FLOPs forward, twice that backward.
On CPUs whose AVX-512 the BLAS of torch leaves unused, the C++ kernel serves (kernels/cpu.py says where); else the BLAS.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import cpu

linear_reference = F.linear


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K), weight (N, K) -> (..., N) in x's dtype, differentiable. Raises RuntimeError on shapes that differ."""
    if cpu.supports_linear(x, weight) and x.shape[-1] == weight.shape[1]:
        return cpu.linear(x, weight)
    return linear_reference(x, weight)
