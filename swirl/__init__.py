"""swirl: step-wise reinforcement learning of tool-using language models (SWiRL, arXiv 2504.04736)."""

import os
from importlib import import_module

__version__ = "0.1.0"

# A thread that waits spins this often, some microseconds, before it sleeps. libgomp, which reads it when torch is
# loaded, spins for milliseconds by itself, at the cost of whoever shares the cores; not to spin at all would cost
# every short operation a wake-up. Beside a busy process an update takes three times as long with libgomp's own count
# (docs/log.md). What the user has set stays.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ["GOMP_SPINCOUNT"] = "500"

# Names are handed on lazily, so that `python -m swirl.filter --help` loads no torch.
_HOMES = {
    "Gemma": "swirl.model.gemma",
    "GemmaConfig": "swirl.model.config",
    "PackedBatch": "swirl.tree.batch",
    "pack": "swirl.tree.pack",
    "Tokenizer": "swirl.model.tokenizer",
    "Question": "swirl.trajectories.record",
    "Task": "swirl.rollout.task",
    "Tool": "swirl.rollout.tool",
    "batched": "swirl.judging.functions",
    "Step": "swirl.trajectories.record",
    "Trajectory": "swirl.trajectories.record",
    "read_trajectories": "swirl.trajectories.log",
    "write_trajectories": "swirl.trajectories.log",
}
__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'swirl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return [*globals(), *__all__]
