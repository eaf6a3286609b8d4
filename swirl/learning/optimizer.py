"""AdamW for fine-tuning, Muon for training from nothing, both on float32 weights; schedule, and clipping.

AdamW's moments are float32, or 8 bits each in blocks of 256 (bitsandbytes; arXiv:2110.02861). With the float32 copies
of the weights they may live on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch

from swirl.errors import ConfigError
from swirl.learning import sharding


class Optimizer:
    """A torch optimizer that holds float32 copies of its narrower weights, steps on them, and rounds them back.

    A bfloat16 weight's neighbours are up to 0.8% away: steps of 1e-5 on one of 0.1 would all be rounded away. Its
    gradient would lose small micro-batches in the same way, so from here on backward passes sum it in float32
    (`grad_dtype`): those sums are reduced over ranks, clipped, and stepped on as they are.
    A bfloat16 weight costs 4 bytes for its copy, 4 for its gradient and 8 for AdamW's moments. Float32 and float64
    weights have no copy, unless it lives on another device, `copies_on`: the host, say, with the moments. A weight
    with a copy is this object's to write: what others write to one after it was made is undone by the next step.
    """

    def __init__(
        self,
        make: Callable[[list[dict]], torch.optim.Optimizer],
        groups: list[dict],
        *,
        copies_on: torch.device | None = None,
    ):
        """`make` builds the torch optimizer of `groups`, as torch takes them: {"params": weights, ...}."""
        self._copies_on = copies_on
        self._weights = [weight for group in groups for weight in group["params"]]
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._torch = make([{**group, "params": [self._wide(p) for p in group["params"]]} for group in groups])
        self.param_groups = self._torch.param_groups

    def _wide(self, weight):
        narrow = weight.dtype in (torch.float16, torch.bfloat16)
        if not narrow and self._copies_on is None:
            return weight
        if narrow:
            weight.grad_dtype = torch.float32
        copy = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if self._copies_on is not None:
            copy = _on(self._copies_on, copy)
        self._copies.append((weight, copy))
        return copy

    @torch.no_grad()
    def step(self) -> None:
        for weight, copy in self._copies:
            copy.grad = weight.grad if weight.grad is None or self._copies_on is None else weight.grad.to(copy.device)
        self._torch.step()
        for weight, copy in self._copies:
            weight.copy_(copy)
            copy.grad = None
        # torch's fused steps tell nobody that the weights are others now; the sampler's cache of keys asks.
        torch.autograd.graph.increment_version(self._weights)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self._weights:
            weight.grad = None if set_to_none or weight.grad is None else weight.grad.zero_()

    def weights_by_number(self) -> dict[str, torch.Tensor]:
        """The weights by the number that `state_tensors` gives them."""
        return {str(number): weight for number, weight in enumerate(self._weights)}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All that the next step needs besides the weights: state such as moments by `N.name`, copies by `N.copy`."""
        copies = {id(weight): copy for weight, copy in self._copies}
        tensors = {}
        for number, weight in enumerate(self._weights):
            copy = copies.get(id(weight))
            stepped = weight if copy is None else copy
            state = self._torch.state.get(stepped, {})
            tensors |= {f"{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
            if copy is not None:
                tensors[f"{number}.copy"] = copy
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError where it was of other weights."""
        copies = {id(weight): copy for weight, copy in self._copies}
        for number, weight in enumerate(self._weights):
            copy = copies.get(id(weight))
            mine = {name: value for name, value in tensors.items() if name.partition(".")[0] == str(number)}
            stepped = weight if copy is None else copy
            mine = {name.partition(".")[2]: value.to(stepped.device) for name, value in mine.items()}
            shapes = {tuple(value.shape) for value in mine.values() if value.ndim}
            is_shard = sharding.is_sharded(weight)  # float32 itself, also where passes compute in a narrower dtype
            expects_copy = "copy" in mine if is_shard else copy is not None
            if expects_copy != ("copy" in mine) or (shapes and tuple(weight.shape) not in shapes):
                raise ValueError(f"expected the optimizer state of weight {number}, of shape {tuple(weight.shape)}")
            if "copy" in mine:
                (weight if is_shard else copy).copy_(mine.pop("copy"))
            # bitsandbytes counts its steps in an int
            counts = {name: int(value) for name, value in mine.items() if value.dtype == torch.int64 and not value.ndim}
            self._torch.state[stepped] = mine | counts


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor there; on the host, of a tensor on a GPU, in pinned memory."""
    pinned = tensor.is_cuda and device.type == "cpu"
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned).copy_(tensor)


def why_refused(kind: str, *, offload: bool, sharded: bool, on_gpu: bool) -> str | None:
    """Why there is no such optimizer of trained weights that are sharded, or whole; None where there is."""
    if sharded and offload and on_gpu:
        return "--offload-optimizer: moves whole weights alone; shards need it less: leave it out"
    if sharded and kind == "adamw-8bit":
        return "--optimizer adamw-8bit: steps on whole weights alone; take adamw with sharded ones"
    return None


def make_optimizer(
    model: torch.nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    kind: Literal["adamw", "adamw-8bit"] = "adamw",
    offload: bool = False,
) -> Optimizer:
    """AdamW with betas (0.9, 0.95); norms (1-d weights) are never decayed.

    adamw-8bit keeps its moments in 8 bits each, but those of weights of fewer than 4,096 elements. `offload` keeps
    moments and float32 copies of the weights on the host, where the steps are then made; on a CPU it changes nothing.
    Raises ConfigError where bitsandbytes is not installed, or weights are sharded, which neither takes.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    settings = {"lr": learning_rate, "betas": (0.9, 0.95), "eps": 1e-8}
    make = partial(torch.optim.AdamW, fused=True, **settings)
    sharded, on_gpu = any(map(sharding.is_sharded, weights)), any(weight.is_cuda for weight in weights)
    if reason := why_refused(kind, offload=offload, sharded=sharded, on_gpu=on_gpu):
        raise ConfigError(reason)
    if kind == "adamw-8bit":
        make = partial(adamw_8bit(), **settings)
    return Optimizer(make, groups, copies_on=torch.device("cpu") if offload and on_gpu else None)


def adamw_8bit() -> type[torch.optim.Optimizer]:
    """That of bitsandbytes. Raises ConfigError where it is not installed."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError("--optimizer adamw-8bit: needs bitsandbytes: pip install 'swirl[adamw-8bit]'") from None
    return AdamW8bit


def make_optimizers_from_nothing(
    model: torch.nn.Module, *, embedding: torch.nn.Parameter, learning_rate: float, weight_decay: float
) -> list[Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms, at one learning rate.

    From random weights Muon needs a fraction of AdamW's updates (docs/log.md).
    Source: Keller Jordan, "Muon", 2024; update scaled to AdamW's RMS as in arXiv:2502.16982.
    """
    layers = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    norms = [p for p in model.parameters() if p.ndim == 1]
    muon = partial(torch.optim.Muon, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Optimizer(muon, [{"params": layers}]), Optimizer(adamw, [{"params": [embedding, *norms]}])]


def learning_rate_at(update: int, num_updates: int, peak: float, *, warmup: int, floor: float) -> float:
    """Linear warm-up over `warmup` updates, then linear decay to `floor` times the peak at the last update."""
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, num_updates - 1 - warmup)
    return peak * (1 - (1 - floor) * min(1.0, done))


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_grad_norm(model: torch.nn.Module, limit: float) -> torch.Tensor:
    """Scale gradients in place to a global L2 norm of at most `limit`; returns the norm before, a scalar."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    return sharding.whole(norm)
