"""The C++ ops of cpp/ (module swirl.kernels._cpu) as autograd functions; absent, the references serve."""

from __future__ import annotations


def supports(q) -> bool:
    """Whether the C++ ops are built and take this tensor."""
    return False
