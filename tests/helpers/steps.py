"""Four optimizer steps of small methods on fixed random batches, with our loop on DeepSpeed or in plain torch.

As a script, this is one rank of a launch that runs many jobs, since starting processes takes longer than steps. A job
trains to the end, and again from the checkpoint in the middle with an engine that started with another seed. The second
step's loss is made infinite on one rank, in one micro-batch, so there are fewer updates than steps.
"""

import gc
import itertools
import json
import math
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from downstream.checkpoints.feature_teachers import read_feature_teacher
from helpers.processes import SMALL
from helpers.recomputed import graphs_on_a_cpu
from pretrain.build import build_ema, build_method
from pretrain.config import PretrainConfig, load
from pretrain.methods.targets.features import EMAConfig
from pretrain.trainer.config import RunConfig
from pretrain.trainer.launch import World, exit_process, find_world, init_distributed
from pretrain.trainer.optim import build_adamw, learning_rate, parameter_groups, set_learning_rate
from pretrain.trainer.run_folder import RunFolder

STEPS, MIDDLE, POISONED, BATCH = 4, 2, 1, 16


def run_jobs(start: Callable[..., Any], folder: Path, jobs: dict[str, list[str]]) -> None:
    """Launch two ranks that run `jobs` (name -> recipe and overrides) in one process group.

    Each job leaves the run folders `<folder>/<name>/whole` and `<folder>/<name>/resumed`, with the method's complete
    state and the engine's settings.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    start(folder, script=__file__).finish()


def configure(recipe: str, *overrides: str) -> PretrainConfig:
    """Load a config without warm-up, whose first learning rate would be 0, so that every update changes the weights."""
    keys = [f"train.global_batch_size={BATCH}", f"checkpoint.every_steps={MIDDLE}", "optim.warmup_epochs=0"]
    with SMALL:  # block numbers in keys are checked against the architecture
        return load(recipe, [*keys, *overrides])


def build_small(config: PretrainConfig) -> Any:
    with SMALL:
        return build_method(config, read_feature_teacher(config.target, config.grid, config.model.patch_size))


def global_batch(step: int, draw: Callable[..., dict[str, Any]], config: RunConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Return random images, and what `draw` returns for each of them, given a generator."""
    rng, batch = np.random.default_rng(step), config.train.global_batch_size
    shape = (batch, len(config.augmentations), 64, 80, 3)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)).squeeze(1)
    drawn = [draw(rng) for _ in range(batch)]
    return images, {name: torch.from_numpy(np.stack([one[name] for one in drawn])) for name in drawn[0]}


def plain_steps(config: PretrainConfig) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Train in one process without DeepSpeed, with a moving average in float64.

    Returns:
        (loss, gradient norm) of each step, of which the poisoned one changes nothing, and a teacher's weights, if any.
    """
    method, parts = build_small(config), config.train.gradient_accumulation_steps
    optimizer = torch.optim.AdamW(parameter_groups(method, config.optim.weight_decay), betas=config.optim.betas)
    teacher = PlainTeacher(method, config) if config.lut or isinstance(config.target, EMAConfig) else None
    results = []
    for step in range(STEPS):
        updates = step - (step > POISONED)
        set_learning_rate(optimizer.param_groups, learning_rate(updates, STEPS, 1, config.peak_lr, config.optim))
        optimizer.zero_grad()
        losses = []
        for part in range(parts):
            images, mask_indices = global_batch(step, method.mask_sampler(), config)
            mine = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
            features = {"teacher_features": teacher.module(images[mine])} if config.lut and teacher else {}
            losses.append(
                method(images[mine], {name: index[mine] for name, index in mask_indices.items()}, **features)["loss"]
            )
            (losses[-1] / parts).backward()
        norm = torch.nn.utils.clip_grad_norm_(method.parameters(), config.optim.clip_grad or 1e9)
        if step != POISONED:
            optimizer.step()
            if teacher:
                teacher.update(method, updates + 1)
        results.append((torch.stack(losses).mean().item(), norm.item()))
    return results, teacher.averages if teacher else {}


class PlainTeacher:
    """m * average + (1 - m) * weight in float64; m goes from its first to its last value along half a cosine."""

    def __init__(self, method: Any, config: PretrainConfig):
        section = config.lut or config.target
        self.first, self.last = section.momentum, section.final_momentum
        self.module = method.teacher_model() if config.lut else method.target.teacher
        self.averages = {name: tensor.double() for name, tensor in self.module.state_dict().items()}

    def update(self, method: Any, updates: int) -> None:
        m = self.last - (self.last - self.first) * (math.cos(math.pi * updates / STEPS) + 1) / 2
        student = {name.removeprefix("method."): tensor for name, tensor in method.state_dict().items()}
        self.averages = {name: m * ema + (1 - m) * student[name] for name, ema in self.averages.items()}
        self.module.load_state_dict(self.averages)


class FixedBatches:
    """A stand-in for the loader that returns each rank's part of `global_batch`."""

    steps_per_epoch = STEPS
    sizes = ((0, (64, 80)),)

    def __init__(self, config: RunConfig, draw: Callable[..., dict[str, Any]], world: World):
        self.config, self.draw, self.world = config, draw, world

    def batches(self, start_step: int, end_step: int) -> Iterator[list[Batch]]:
        parts = self.config.train.gradient_accumulation_steps
        size = self.config.train.global_batch_size // (self.world.size * parts)
        for step in range(start_step, end_step):
            images, drawn = global_batch(step, self.draw, self.config)
            micro_batches = []
            for part in range(parts):
                samples = torch.arange(size) + (part * self.world.size + self.world.rank) * size
                mask_indices = {name: index[samples] for name, index in drawn.items()}
                labels = mask_indices.pop("labels", None)
                keys = tuple(f"{step}/{sample}" for sample in samples.tolist())
                micro_batches.append(Batch(images[samples], mask_indices, labels, samples, keys, skipped=()))
            yield micro_batches


def begin_elsewhere(config: PretrainConfig) -> Any:
    """Build the method with another seed's weights and wrong buffers, so that only loading can correct them."""
    method = build_small(config.model_copy(update={"seed": config.seed + 1}))
    saved = method.state_dict()
    for name, buffer in method.named_buffers():
        if name in saved:
            buffer.add_(1)
    return method


def poison(method: Any, config: PretrainConfig) -> None:
    """Make the loss of the poisoned step's first micro-batch infinite on the rank that calls this."""
    calls = itertools.count()

    def spoil(module: Any, inputs: Any, losses: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if next(calls) != POISONED * config.train.gradient_accumulation_steps:
            return None
        return {**losses, "loss": losses["loss"] * float("inf")}

    method.register_forward_hook(spoil)


def small_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return `ds_settings`; in stage 3, everything is partitioned, since such a small model would stay gathered."""
    from pretrain.trainer.engine import ds_settings, zero_stage

    settings = ds_settings(config, world_size)
    if zero_stage(settings) == 3:
        for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
            settings["zero_optimization"][f"stage3_{key}"] = 0
    return settings


def train_small(
    method: Any, config: PretrainConfig, world: World, device: torch.device, folder: RunFolder
) -> str | None:
    """Do what pretrain/run.py does, on fixed batches; returns the checkpoint from which it continued."""
    from pretrain.finish import encoder_state_dict, save_encoder
    from pretrain.trainer.checkpoint import Checkpoints
    from pretrain.trainer.checkpoint_layout import TrainState
    from pretrain.trainer.cuda_graphs import graph_steps
    from pretrain.trainer.engine import build_engine, effective_settings, gather_state_dict, zero_stage
    from pretrain.trainer.loop import Run, train

    loader: Any = FixedBatches(config, method.mask_sampler(), world)
    ema = build_ema(config, method, device)
    settings = small_settings(config, world.size)
    if config.model.cuda_graphs == "on":
        graph_steps(method, zero_stage(settings))
    groups = parameter_groups(method, config.optim.weight_decay)
    engine = build_engine(method, build_adamw(groups, config, zero_stage(settings)), config, settings)
    fresh = TrainState(
        world_size=world.size,
        zero_stage=engine.zero_optimization_stage(),
        resume_signature=config.resume_signature(),
    )
    checkpoints = Checkpoints(folder.checkpoints, world, config.checkpoint)
    state, resumed = checkpoints.resume(engine, ema, fresh)
    with graphs_on_a_cpu():
        train(Run(config, world, device, folder, loader, engine, ema, checkpoints, state))
    weights, effective = gather_state_dict(engine, world), effective_settings(engine)
    if world.is_main:
        save_encoder(encoder_state_dict(method, weights), config, folder.encoder, config.train.epochs)
        torch.save(weights, folder.root / "state.pt")
        (folder.root / "effective.json").write_text(json.dumps(effective))
    engine.destroy()
    return resumed


def do_job(config: PretrainConfig, world: World, device: torch.device, root: Path) -> None:
    whole, again = RunFolder(root / "whole"), RunFolder(root / "resumed")
    if world.is_main:
        whole.checkpoints.mkdir(parents=True)
    torch.distributed.barrier()
    method = build_small(config)
    if world.rank == 1:
        poison(method, config)
    assert train_small(method, config, world, device, whole) is None
    if world.is_main:
        shutil.copytree(whole.root, again.root, ignore=shutil.ignore_patterns(f"step_{STEPS:08d}"))
    torch.distributed.barrier()
    assert train_small(begin_elsewhere(config), config, world, device, again) == f"step_{MIDDLE:08d}"


def do_jobs(configure: Callable[..., Any], do_job: Callable[..., None]) -> None:
    """Run one rank of a launch: `do_job` for each job in the folder given on the command line."""
    folder = Path(sys.argv[1])
    world = find_world()
    device = init_distributed(world)
    try:
        for name, arguments in json.loads((folder / "jobs.json").read_text()).items():
            print(f"job {name}", flush=True)
            do_job(configure(*arguments), world, device, folder / name)
            gc.collect()  # the hooks of an engine form reference cycles
            gc.freeze()  # objects created by importing DeepSpeed
    except Exception:
        traceback.print_exc()
        exit_process(1)
    exit_process(0)


if __name__ == "__main__":
    do_jobs(configure, do_job)
