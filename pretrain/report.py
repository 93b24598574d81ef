"""What a run prints at its beginning and end."""

import json
from typing import Any

import torch

from pretrain.loop import Run
from pretrain.runfolder import RunFolder, git_state, versions


def introduce(run: Run, effective: dict[str, Any], samples: int, resumed: str | None) -> None:
    """Who trains what, with which arithmetic, on which engine settings, from where."""
    config, world = run.config, run.world
    train, (height, width) = config.train, config.data.height_width
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())  # ZeRO-3 empties p
    micro = train.batch // (world.size * train.accumulation)
    print(
        f"{config.name}: {config.task} with {config.model.arch}/{config.model.patch} at {height}x{width}, "
        f"{parameters / 1e6:.1f}M parameters; git {git_state()}\n"
        f"batch {train.batch} = {world.size} ranks x {train.accumulation} accumulation x {micro}; "
        f"learning rate {config.peak_lr:.3g} = {config.optim.base_lr:g} x {train.batch} / 256\n"
        f"{samples} samples, {run.loader.steps_per_epoch} steps an epoch, {train.epochs} epochs, "
        f"{run.total_steps} steps\n"
        f"DeepSpeed uses {json.dumps(effective)}\n"
        f"versions {json.dumps(versions())}\n"
        f"{f'continues from {resumed}' if resumed else 'starts'}; everything goes to {run.folder.root}/",
        flush=True,
    )


def conclude(run: Run) -> None:
    """Names what the run has written, and waits for all ranks."""
    if run.world.is_main:
        _name_written(run.folder, run.checkpoints.names()[0])
    torch.distributed.barrier()  # a launcher may end the ranks that outlive the first to leave


def _name_written(folder: RunFolder, newest: str) -> None:
    written = {
        folder.metrics: "loss, learning rate, speed of each logged step",
        folder.tensorboard: "the same for TensorBoard",
        folder.loss_curve: "the loss curve",
        folder.evaluation: "what was measured while it trained",
        folder.reconstructions: "what the model reconstructs",
        folder.checkpoints / newest: "continues this run",
        folder.encoder: "the encoder, fp32, timm's names",
        folder.encoder_ema: "the teacher's encoder, their moving average",
        folder.model: "the classifier, fp32, timm's names",
        folder.model_ema: "the same of the moving average",
    }
    written = {path: what for path, what in written.items() if path.exists()}
    width = max(len(str(path)) for path in written)
    print("done:\n" + "\n".join(f"  {path!s:{width}}  {what}" for path, what in written.items()), flush=True)
