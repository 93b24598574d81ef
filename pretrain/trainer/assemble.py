"""Assembles the parts of a run, and resumes it if it has a checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from data.batch import MaskSampler, SizedUntil
from data.cores import count_workers
from data.image_file import READS_HEIC
from data.index import Index
from data.loader import Loader
from pretrain.trainer.cautions import cautions
from pretrain.trainer.checkpoint import CannotContinueError, Checkpoints, first_problem
from pretrain.trainer.checkpoint_layout import TrainState
from pretrain.trainer.config import RunConfig
from pretrain.trainer.durable import write_durably
from pretrain.trainer.ema import NoEMA
from pretrain.trainer.engine import build_engine, effective_settings
from pretrain.trainer.launch import World
from pretrain.trainer.loop import Evaluation, Run
from pretrain.trainer.moments import Moments, set_moments
from pretrain.trainer.phases import report_if_slow
from pretrain.trainer.preflight import room_problem
from pretrain.trainer.report import describe_run
from pretrain.trainer.retention import remove_leftovers
from pretrain.trainer.run_folder import RunFolder, device_name, versions
from pretrain.trainer.shard_record import ChangedShards, describe_change, record_shards

_COMPUTES = ("torch", "triton", "deepspeed")  # packages; another version of one may give other bits
_log = logging.getLogger(__name__)


@dataclass
class Parts:
    """What differs between kinds of training.

    Attributes:
        module: not partitioned yet; `forward(images, **batch.model_inputs())` returns a dictionary with the `loss`.
        optimizer: for the module's parameters and the ZeRO stage in use.
        evaluation: what is measured during training, if anything.
        numerics: how a step is computed, beyond the configuration; a run resumes with the same.
        start: the file that a new run starts from and its digest, for the record.
        moments: what a new run's optimizer starts with, if not with zeros.
        code: digests of code outside this project; other code may give other bits.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    ema: NoEMA
    loader: Loader
    evaluation: Evaluation | None = None
    numerics: dict[str, Any] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)
    moments: Moments | None = None
    code: dict[str, str] = field(default_factory=dict)


def assemble(
    config: RunConfig,
    world: World,
    device: torch.device,
    folder: RunFolder,
    index: Index,
    settings: dict[str, Any],
    parts: Parts,
) -> Run:
    """Builds the engine, resumes from the newest checkpoint if any, and logs the run; called by all ranks together.

    Args:
        index: the training samples.
        settings: DeepSpeed's keys, from `ds_settings`.

    Raises:
        ValueError: as `Checkpoints.resume`.
    """
    with report_if_slow("building the DeepSpeed engine"):
        engine = build_engine(parts.module, parts.optimizer, config, settings)
    if parts.moments:
        set_moments(engine, parts.moments)
    fresh = TrainState(
        fingerprint=index.fingerprint,
        shards=record_shards(index),
        index_samples=len(index),
        world_size=world.size,
        zero_stage=engine.zero_optimization_stage(),
        resume_signature=config.resume_signature(),
        numerics=parts.numerics,
        start=parts.start,
        machine={"device": device_name(), **_versions_that_compute(), **parts.code},
    )
    checkpoints = Checkpoints(folder.checkpoints, world, config.checkpoint)
    changed = ChangedShards(config.train.global_batch_size, config.data.repeats)
    try:
        with report_if_slow("finding, checking and loading the newest checkpoint"):
            accepts = changed if config.data.accept_changed_shards else None
            state, resumed = checkpoints.resume(engine, parts.ema, fresh, accepts)
    except CannotContinueError as error:
        raise ValueError(f"{error}, or {config.new_run_advice}") from None
    run = Run(config, world, device, folder, parts.loader, engine, parts.ema, checkpoints, state, parts.evaluation)
    with report_if_slow("recording the start in the run's folder"):
        if world.is_main:
            remove_leftovers(folder.checkpoints)
        if problem := first_problem(_no_room(run) if world.is_main else None):
            raise ValueError(problem)
        if world.is_main:
            _record_start(run, index, parts.numerics, resumed)
    return run


def _no_room(run: Run) -> str | None:
    if run.state.step >= run.total_steps:
        return None  # a finished run saves nothing
    parameters = (p for p in run.engine.module.parameters() if p.requires_grad)
    return room_problem(run.folder.root, sum(getattr(p, "ds_numel", p.numel()) for p in parameters))


def _record_start(run: Run, index: Index, numerics: dict[str, Any], resumed: str | None) -> None:
    """Logs what is trained, how and from where, and records it in the run's folder."""
    config, folder, state, effective = run.config, run.folder, run.state, effective_settings(run.engine)
    write_durably(folder.config, config.to_yaml())
    folder.write_environment(
        deepspeed=effective,
        numerics=numerics,
        start=state.start,
        world_size=run.world.size,
        samples=len(index),
        shard_changes=state.shard_changes,
    )
    _log.info("%s", describe_run(run, effective, numerics, len(index), resumed))
    for change in state.shard_changes:
        _log.info("%s", describe_change(change))
    if index.shrunk:
        _log.info("%s: %s", index.root, index.shrunk)
    for caution in cautions(config, len(index), run.loader.steps_per_epoch, run.device):
        _log.warning("%s", caution)


def _versions_that_compute() -> dict[str, str | None]:
    heic = ("pillow-heif",) if READS_HEIC else ()  # older runs do not record that they had none
    return {name: versions()[name] for name in (*_COMPUTES, *heic)}


def build_loader(
    config: RunConfig,
    index: Index,
    world: World,
    mask_sampler: MaskSampler | None = None,
    labels: bool = False,
    num_classes: int | None = None,
    earlier: Sequence[SizedUntil] = (),
) -> Loader:
    """This rank's loader of the training samples; arguments that are not in the configuration are `Loader`'s."""
    return Loader(
        index,
        size=config.data.height_width,
        batch=config.train.global_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        rank=world.rank,
        world_size=world.size,
        seed=config.seed,
        augmentations=config.augmentations,
        num_workers=count_workers(config.data.num_workers),
        repeats=config.data.repeats,
        format=config.data.pixels.format,
        shuffle_shards=config.data.shuffle_shards,
        mask_sampler=mask_sampler,
        labels=labels,
        num_classes=num_classes,
        earlier=earlier,
    )
