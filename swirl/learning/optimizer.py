"""AdamW for fine-tuning, Muon for training from nothing, both on float32 weights; schedule, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch


class Optimizer:
    """A torch optimizer that holds float32 copies of its narrower weights, steps on them, and rounds them back.

    A bfloat16 weight's neighbours are up to 0.8% away: steps of 1e-5 on one of 0.1 would all be rounded away. Its
    gradient would lose small micro-batches in the same way, so from here on backward passes sum it in float32
    (`grad_dtype`): those sums are reduced over ranks, clipped, and stepped on as they are.
    A bfloat16 weight costs 4 bytes for its copy, 4 for its gradient and 8 for AdamW's moments. Float32 and float64
    weights have no copy. Narrow weights are this object's to write: what others write to one after it was made is
    undone by the next step.
    """

    def __init__(self, make: Callable[[list[dict]], torch.optim.Optimizer], groups: list[dict]):
        """`make` builds the torch optimizer of `groups`, as torch takes them: {"params": weights, ...}."""
        self._weights = [weight for group in groups for weight in group["params"]]
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._torch = make([{**group, "params": [self._wide(p) for p in group["params"]]} for group in groups])
        self.param_groups = self._torch.param_groups

    def _wide(self, weight):
        if weight.dtype not in (torch.float16, torch.bfloat16):
            return weight
        weight.grad_dtype = torch.float32
        self._copies.append((weight, weight.detach().float()))
        return self._copies[-1][1]

    @torch.no_grad()
    def step(self) -> None:
        for weight, copy in self._copies:
            copy.grad = weight.grad
        self._torch.step()
        for weight, copy in self._copies:
            weight.copy_(copy)
            copy.grad = None
        # torch's fused steps tell nobody that the weights are others now; the sampler's cache of keys asks.
        torch.autograd.graph.increment_version(self._weights)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self._weights:
            weight.grad = None if set_to_none or weight.grad is None else weight.grad.zero_()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All that the next step needs besides the weights: state such as moments by `N.name`, copies by `N.copy`."""
        copies = {id(weight): copy for weight, copy in self._copies}
        tensors = {}
        for number, weight in enumerate(self._weights):
            copy = copies.get(id(weight))
            stepped = weight if copy is None else copy
            tensors |= {f"{number}.{name}": value for name, value in self._torch.state.get(stepped, {}).items()}
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
            mine = {name.partition(".")[2]: value.to(weight.device) for name, value in mine.items()}
            shapes = {tuple(value.shape) for value in mine.values() if value.ndim}
            if (copy is not None) != ("copy" in mine) or not shapes <= {tuple(weight.shape)}:
                raise ValueError(f"expected the optimizer state of weight {number}, of shape {tuple(weight.shape)}")
            if copy is not None:
                copy.copy_(mine.pop("copy"))
            self._torch.state[weight if copy is None else copy] = mine


def make_optimizer(model: torch.nn.Module, *, learning_rate: float, weight_decay: float = 0.0) -> Optimizer:
    """AdamW with betas (0.9, 0.95); norms (1-d weights) are never decayed."""
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Optimizer(partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True), groups)


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
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
