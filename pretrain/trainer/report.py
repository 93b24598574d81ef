"""What a run logs at its beginning and at its end."""

import json
import logging
from typing import Any

import torch

from data.pixel_format import RGB
from pretrain.trainer.loop import Run
from pretrain.trainer.phases import limited
from pretrain.trainer.run_folder import git_state, versions

_log = logging.getLogger(__name__)


def describe_run(
    run: Run, effective: dict[str, Any], numerics: dict[str, Any], samples: int, resumed: str | None
) -> str:
    """The model, batch sizes, length, engine settings, versions, and where the run starts."""
    config, world = run.config, run.world
    train, optim = config.train, config.optim
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())  # ZeRO-3 empties p
    accumulation = train.gradient_accumulation_steps
    micro_batch = train.global_batch_size // (world.size * accumulation)
    return (
        f"{config.name}: {config.task} with {config.model.arch}/{config.model.patch_size} at {_sizes(run)}"
        f"{_format(run)}, {parameters / 1e6:.1f}M parameters; git {git_state()}\n"
        f"global batch {train.global_batch_size} = {world.size} ranks x {accumulation} micro-batches x {micro_batch}; "
        f"learning rate {config.peak_lr:.3g} = {optim.base_lr:g} x {train.global_batch_size} / {optim.lr_batch_size}\n"
        f"{samples} samples, {run.loader.steps_per_epoch} steps per epoch, {train.epochs} epochs{_passes(run)}, "
        f"{run.total_steps} steps\n"
        f"DeepSpeed uses {json.dumps(effective)}\n"
        f"computes with {json.dumps(numerics)}\n"
        f"versions {json.dumps(versions())}\n"
        f"{f'resumes from {resumed}' if resumed else 'starts at step 0'}; writes to {run.folder.root}/"
    )


def _sizes(run: Run) -> str:
    """The sizes of the images; if there are several, from which epoch on each."""
    spe = run.loader.steps_per_epoch
    return ", ".join(
        f"{height}x{width}" + (f" from epoch {begin // spe} on" if begin else "")
        for begin, (height, width) in run.loader.sizes
    )


def _format(run: Run) -> str:
    """What images are, if they are not 8-bit RGB."""
    format = run.config.data.pixels.format
    return "" if format == RGB else f" of {format}"


def _passes(run: Run) -> str:
    """How epochs are counted if each decoded image is shown several times."""
    epochs, repeats = run.config.train.epochs, run.config.data.repeats
    if repeats == 1:
        return ""
    passes = epochs // repeats
    return f" in {passes} {'passes' if passes > 1 else 'pass'} of {repeats} crops of each image"


def log_outputs(run: Run) -> None:
    """Lists the files that the run has written, and waits for all ranks."""
    if run.world.is_main:
        _log.info("%s", describe_outputs(run))
    wait_for_all()


def wait_for_all() -> None:
    """Waits for all ranks at the end: a launcher may kill the others as soon as one exits."""
    with limited("waiting for the other ranks at the end", "evaluation_minutes"):
        torch.distributed.barrier()


def describe_outputs(run: Run) -> str:
    """The files that the run has written, at its end or until it was stopped."""
    folder, newest = run.folder, run.checkpoints.names()[:1]  # none if stopped before the first step
    step = None if run.state.step == run.total_steps else run.state.step
    written = {
        folder.metrics: "loss, learning rate and speed",
        folder.tensorboard: "the same for TensorBoard",
        folder.loss_curve: "the loss curve",
        folder.evaluation: "evaluations during training",
        folder.reconstructions: "reconstructed images",
        **{folder.checkpoints / name: "the last checkpoint: resumes this run" for name in newest},
        folder.result(folder.encoder, step): "the encoder: fp32, timm's parameter names",
        folder.result(folder.encoder_ema, step): "the teacher's encoder, a moving average",
        folder.model: "the classifier: fp32, timm's parameter names",
        folder.model_ema: "its moving average",
    }
    written = {path: what for path, what in written.items() if path.exists()}
    width = max((len(str(path)) for path in written), default=0)
    heading = "done:" if step is None else f"so far, after step {step} of {run.total_steps}:"
    return f"{heading}\n" + "\n".join(f"  {path!s:{width}}  {what}" for path, what in written.items())
