"""Configuration -> method, teacher, loader and what is measured."""

import functools
from typing import Any

import torch

from data.index import Index
from data.loader import Loader
from pretrain.average import Average, NoAverage, Teacher
from pretrain.config import Config, RunConfig
from pretrain.launch import World
from pretrain.loop import Evaluation, Run
from pretrain.methods import METHODS
from pretrain.methods.context import LUT
from pretrain.models.vit import ViT
from pretrain.probe import Probe


def build_method(config: Config[Any]) -> Any:
    """The method around its encoder, initialised from the seed alone: the same weights on every rank."""
    torch.manual_seed(config.seed)
    model = config.model
    encoder = ViT(model.arch, model.patch, config.grid, model.position == "relative", model.checkpoint_blocks)
    method = METHODS[config.method.name](config.method, encoder, config.partial)
    return LUT(config.context, method) if config.context else method


def build_average(config: Config[Any], method: Any, device: torch.device) -> Average | NoAverage:
    """The teacher of a method that has not been partitioned yet."""
    if config.context is None:
        return NoAverage()
    return Teacher(method, config.context, device, bf16=config.train.precision == "bf16")


def build_probe(config: Config[Any], method: Any, world: World, device: torch.device) -> Probe | None:
    """Of a method that has not been partitioned yet."""
    return Probe(config, method.encoder, world, device) if config.probe else None


def build_evaluation(run: Run, probe: Probe | None) -> Evaluation | None:
    """What the loop measures between steps."""
    if probe is None:
        return None
    return Evaluation(
        probe.every * run.loader.steps_per_epoch, functools.partial(probe.measure, run.engine.module.encoder)
    )


def build_loader(config: RunConfig, index: Index, world: World, **own: Any) -> Loader:
    """What a run trains on, as one rank sees it; `own` is what this kind of training asks of the loader beside."""
    return Loader(
        index,
        size=config.data.height_width,
        batch=config.train.batch,
        accumulation=config.train.accumulation,
        rank=world.rank,
        world=world.size,
        seed=config.seed,
        pictures=config.pictures,
        workers=config.data.workers,
        **own,
    )
