"""Decoding over a shared trunk: what does it save to read the trunk's keys once for all branches?

    python -m benchmarks.decode [--device cuda] [--json]

One new token for each of B branches of a trunk of L tokens, each with keys of its own. The floor is the
bytes of all keys and values, moved once, over a copy measured in the same run. Providers: swirl; the
reference; and SDPA over a copy of the trunk for every branch (no softcap), which is what decoding without a
shared trunk does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import Report, copy_bandwidth, settings
from swirl.kernels.tree_decode import tree_decode, tree_decode_reference

SOFTCAP = 50.0


def _measure(report, bandwidth, B, L, N, heads, kv_heads, D):
    how = report.how

    def random(*shape):
        return torch.randn(shape, device=how.device).to(how.dtype)

    def integers(x):
        return x.to(device=how.device, dtype=torch.int32)

    q, pools = random(B, heads, D), [random(L + B * N, kv_heads, D) for _ in range(2)]
    trunk = torch.arange(L)
    tree = [integers(x) for x in (trunk, torch.full((L,), L), trunk)]
    own_slots = L + torch.arange(B * N).view(B, N)
    rows = [integers(x) for x in (torch.full((B,), L - 1), own_slots, torch.full((B,), N))]
    seen = torch.cat((trunk.expand(B, -1), own_slots), 1).to(how.device)
    whole = [pool[seen].transpose(1, 2) for pool in pools]
    options = {"scale": D**-0.5, "softcap": SOFTCAP}
    floor_s = 2 * (L + B * N) * kv_heads * D * q.element_size() / bandwidth
    facts = {"floor_s": floor_s, "branches": B, "trunk": L, "own": N, "head_dim": D}
    report.add("swirl", lambda: tree_decode(q, *pools, *tree, *rows, **options), **facts)
    report.add("reference", lambda: tree_decode_reference(q, *pools, *tree, *rows, **options), **facts)
    report.add(
        "SDPA, a trunk a branch",
        lambda: F.scaled_dot_product_attention(q[:, :, None], *whole, scale=D**-0.5, enable_gqa=True),
        note="no softcap",
        **facts,
    )


def main(arguments: list[str] | None = None) -> None:
    how = settings(__doc__.splitlines()[0], arguments)
    cuda = how.device.type == "cuda"
    shapes = [(4, 4096), (16, 8192), (64, 32768)] if cuda else [(4, 512), (16, 2048)]
    shape = (256, 8, 4, 256) if cuda else (64, 4, 2, 32)
    report, bandwidth = Report("decode", how), copy_bandwidth(how)
    for B, L in [(3, 50)] if how.tiny else shapes:
        _measure(report, bandwidth, B, L, *((8, 4, 2, 32) if how.tiny else shape))
    report.finish()


if __name__ == "__main__":
    main()
