"""The parts of a run put together, and where it stands."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data.index import Index
from data.loader import Loader
from pretrain.average import Average, NoAverage
from pretrain.checkpoint import Checkpoints, TrainState
from pretrain.config import RunConfig
from pretrain.engine import build_engine, effective_settings
from pretrain.launch import World
from pretrain.loop import Run
from pretrain.report import introduce
from pretrain.runfolder import RunFolder


@dataclass
class Parts:
    """What differs from one kind of training to another.

    Attributes:
        method: not partitioned yet; `forward(images, view)` returns a dictionary with the `loss`.
        optimizer: of its parameters, for the ZeRO stage of the settings.
    """

    method: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | NoAverage
    loader: Loader


def assemble(
    config: RunConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    index: Index,
    settings: dict[str, Any],
    parts: Parts,
) -> Run:
    """Makes the engine, continues from the newest checkpoint if there is one, and says so. All ranks together.

    Args:
        index: what is trained on.
        settings: DeepSpeed's keys, of `ds_settings`.

    Raises:
        ValueError: as `Checkpoints.resume`.
    """
    engine = build_engine(parts.method, parts.optimizer, config, settings)
    fresh = TrainState(
        fingerprint=index.fingerprint,
        world_size=world.size,
        zero_stage=engine.zero_optimization_stage(),
        trained_function=config.trained_function(),
    )
    checkpoints = Checkpoints(folder.checkpoints, world, config.checkpoint)
    state, resumed = checkpoints.resume(engine, parts.average, fresh)
    run = Run(config, world, device, folder, parts.loader, engine, parts.average, checkpoints, state)
    if world.is_main:
        effective = effective_settings(engine)
        folder.config.write_text(config.to_yaml())
        folder.write_environment(deepspeed=effective, world_size=world.size, samples=len(index))
        introduce(run, effective, len(index), resumed)
    return run
