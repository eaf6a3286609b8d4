"""flash-attn and xformers on CUDA, where they are installed: what they are swapped in for, they must equal.

An output or gradient of theirs may be no further from float64 than swirl's tree kernel or eager torch in the same
dtype, whichever is further, and a tenth more: all three round, and none bounds another exactly.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from swirl.kernels.chain_attention import Chains, chain_attention, refusal
from swirl.kernels.tree_attention import tree_attention, tree_attention_reference
from swirl.model.gemma import Gemma
from swirl.tree.pack import pack_chains
from tests.kernels.chains import CONFIG, trajectories
from tests.kernels.test_gpu import eager_attention, outputs_and_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
BACKENDS = [("flash", 50.0), ("flash", None), ("xformers", None)]


def require(backend, softcap, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    reason = refusal(backend, head_dim=256, softcap=softcap, dtype=dtype, device=device)
    if reason:
        pytest.skip(f"{backend} {reason}")
    return device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
@pytest.mark.parametrize("lengths", [(1,), (63, 1, 200), (1000, 37)], ids=str)
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize(("Hq", "Hkv", "D"), [(8, 4, 256), (4, 4, 128), (4, 1, 96)])
def test_no_further_from_the_truth_than_the_tree_kernel(Hq, Hkv, D, window, lengths, backend, softcap, dtype):
    device = require(backend, softcap, dtype)
    torch.manual_seed(0)
    T, chains = sum(lengths), Chains(backend, lengths, device)
    mask = (
        chains.bounds[1:].repeat_interleave(chains.bounds.diff()).int(),
        torch.cat([torch.arange(n) for n in lengths]).int().cuda(),
    )
    options = {"scale": D**-0.5, "softcap": softcap, "window": window}
    inputs = [torch.randn(T, heads, D, device=device).to(dtype) for heads in (Hq, Hkv, Hkv)]
    weights = [torch.randn(T, Hq, D, device=device, dtype=torch.float64)]
    ours, again = (
        outputs_and_gradients(lambda *x: chain_attention(*x, chains, **options), inputs, weights) for _ in range(2)
    )
    truth = outputs_and_gradients(
        lambda *x: tree_attention_reference(*x, *mask, **options), [x.double() for x in inputs], weights
    )
    tree = outputs_and_gradients(lambda *x: tree_attention(*x, *mask, **options), inputs, weights)
    eager = outputs_and_gradients(lambda *x: eager_attention(*x, mask, **options), inputs, weights)
    size = torch.stack([t.norm() for t in truth]).max()  # with one token, gradients of q and k are rounding
    for x, y, others, t in zip(ours, again, zip(tree, eager), truth, strict=True):
        assert backend == "xformers" or torch.equal(x, y), "two runs of flash-attn differ"
        bound = max((other.double() - t).norm() for other in others)
        assert (x.double() - t).norm() <= 1.1 * bound + 1e-4 * size


@pytest.mark.parametrize(("backend", "softcap"), BACKENDS)
def test_a_model_s_log_probs_are_as_near_as_the_tree_s(backend, softcap):
    device = require(backend, softcap, torch.bfloat16)
    config = replace(CONFIG, head_dim=64, attn_logit_softcapping=softcap)
    ((batch, _),) = pack_chains(trajectories(), 10_000)
    batch, model = batch.to(device), Gemma(config).init_weights(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)
        model.to(device, torch.bfloat16)
        truth = copy.deepcopy(model).double().token_log_probs(batch)
        tree = model.token_log_probs(batch)
        ours = model.use_attention(backend).token_log_probs(batch)
    assert (ours - truth).norm() <= 1.1 * (tree - truth).norm() + 1e-3 * truth.norm()
