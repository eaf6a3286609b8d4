"""What `train` finds out before it loads a model: its data, and its config with every `auto` settled."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from swirl import config as configs
from swirl.app import command, resolve, training_data
from swirl.app.resolve_tasks import require_named
from swirl.app.tracking import require_trackers
from swirl.config import TrainConfig
from swirl.errors import ConfigError
from swirl.learning import distributed
from swirl.model.lora import is_adapter
from swirl.trajectories.files import TrajectoryFiles
from swirl.trajectories.record import Trajectory


@dataclass(frozen=True)
class FoundData:
    """--data before the first update: its files, what was looked at of them (by place), and the tasks it answers."""

    files: TrajectoryFiles
    seen: dict[int, Trajectory]
    tasks: set[str]

    @property
    def streamed(self) -> bool:
        """Whether trajectories are read as updates reach them."""
        return len(self.seen) < len(self.files)


def prepared(config: TrainConfig) -> tuple[TrainConfig, torch.device, FoundData | None]:
    """The config settled and sized, this rank's device, and the data where there is --data.

    Raises ConfigError, InputError, CheckpointError.
    """
    config = configs.smoke(config) if config.smoke else config
    device = distributed.local_device(resolve.device_for(config.device))
    found = _found(config) if config.data else None
    require_named(() if config.data else config.task, config.tool)  # before it matters who judges them
    config = configs.settled(config, found and found.tasks, device.type)
    config = configs.sized(config, resolve.num_weights(config.model))
    asked = f"--lora {config.lora}" if config.lora else f"--shard {config.shard}"
    if (config.lora or config.shard in ("node", "all")) and is_adapter(resolve.model_folder(config.model)):
        raise ConfigError(f"{asked}: --model {config.model} holds adapters already; merge them (export) first")
    if config.offload_optimizer and device.type == "cpu":
        command.warn("--offload-optimizer changes nothing on a CPU, whose memory is where it would go")
    require_trackers(config.track)
    require_named(config.evaluate_on, ())
    return config, device, found


def _found(config: TrainConfig) -> FoundData:
    files = TrajectoryFiles(config.data)
    seen = training_data.looked_at(files)
    unseen = set(config.task if len(seen) < len(files) else ())
    return FoundData(files, seen, {trajectory.question.task for trajectory in seen.values()} | unseen)
