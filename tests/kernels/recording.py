"""What a GPU would be asked for, seen without one: tensors on the meta device, and recorders where the kernels stand.

On that device whatever would make the host wait (`item`, `tolist`, `cpu`, a comparison's truth) raises.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swirl.kernels import _triton, geglu, linear_log_prob, norm_rope, rms_norm, rope, tree_attention, tree_decode

OPS = (geglu, linear_log_prob, norm_rope, rms_norm, rope, tree_attention, tree_decode)
NO_LAUNCH = """alias as_strided detach empty empty_like empty_strided expand new_empty permute reshape select slice
split split_with_sizes squeeze t transpose unbind unsqueeze view _unsafe_view""".split()


class Recorder:
    """Stands where a kernel stands, and writes down its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, arguments))


def recorded(monkeypatch, architecture: int, modules=OPS) -> list[tuple]:
    """(kernel, arguments by name) of each launch from here on, as on a GPU of that architecture."""
    launches = []
    monkeypatch.setattr(_triton, "takes", lambda *tensors: True)
    monkeypatch.setattr(_triton, "architecture", lambda device: architecture)
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), launches))
    return launches


class MetaOps(TorchDispatchMode):
    """Counts torch's own operations on the meta device that a GPU would have to be asked for, by name."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) and result else result
        name = function.overloadpacket.__name__
        if isinstance(first, torch.Tensor) and first.is_meta and name not in NO_LAUNCH:
            self.names[name] += 1
        return result
