"""Writes the results of a run from its current weights: the encoder, the loss curve and reconstructions."""

import copy
import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.index import Index
from data.loader import Loader
from pretrain.build import build_method, feature_teacher
from pretrain.config import PretrainConfig
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import CLASS_ADAPTER, fold_class_adapter
from pretrain.reconstructions import draw_reconstructions, drawn_method
from pretrain.trainer.engine import gather_state_dict
from pretrain.trainer.figures import draw_loss
from pretrain.trainer.loop import Run
from pretrain.trainer.metrics import read_metrics
from pretrain.trainer.phases import limited
from pretrain.trainer.report import wait_for_all
from pretrain.trainer.safetensors_file import save_state_dict
from pretrain.trainer.signals import Stopped

_log = logging.getLogger(__name__)


def encoder_state_dict(method: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights, under timm's names, from the state of a module that has an `encoder`."""
    prefix = next(name for name, module in method.named_modules() if module is method.encoder) + "."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if adapter := [encoder.pop(name) for name in CLASS_ADAPTER if name in encoder]:
        encoder["cls_token"] = fold_class_adapter(encoder["cls_token"], *adapter)
    return encoder


def save_encoder(encoder: dict[str, Tensor], config: PretrainConfig, path: Path, epochs: int) -> None:
    """Writes a safetensors file with the `EncoderSpec` as metadata; `epochs` is how many were trained."""
    spec = EncoderSpec.from_signature(config.resume_signature(), epochs)
    save_state_dict(encoder, spec.to_metadata(), path)


@limited("writing the encoder, the loss curve and reconstructions", "evaluation_minutes")
def finish(run: Run, index: Index, draw_images: bool = True) -> None:
    """Writes the encoder, the teacher's encoder if there is one, and the figures; called by all ranks together.

    If the run was stopped before its end, the encoders' files have the step in their names.

    Args:
        draw_images: whether to draw reconstructions, for which training images are read.
    """
    config, folder, epochs = run.config, run.folder, int(run.epoch)
    assert isinstance(config, PretrainConfig)
    state = gather_state_dict(run.engine, run.world)
    if not run.world.is_main:
        return
    step = None if run.state.step == run.total_steps else run.state.step
    old = folder.partial_results()
    save_encoder(encoder_state_dict(run.engine.module, state), config, folder.result(folder.encoder, step), epochs)
    if run.ema.model is not None:
        averaged = encoder_state_dict(run.ema.model, run.ema.state_dict())
        save_encoder(averaged, config, folder.result(folder.encoder_ema, step), epochs)
    for path in old:
        if step is None or path not in (folder.result(folder.encoder, step), folder.result(folder.encoder_ema, step)):
            path.unlink()
    try:
        metrics = read_metrics(folder.metrics)
        draw_loss(metrics, folder.loss_curve)
        if draw_images:
            _draw_training_images(run, state, config, index, metrics)
    except Exception as error:  # the run is complete without them, even if the GPU's memory is full
        _warn("the figures could not be drawn: %s; run the same command again to draw them", error)


def finish_stopped(run: Run, index: Index, stopped: Stopped) -> None:
    """Like `finish`, after a signal: what fails is only logged, since the checkpoint is complete."""
    try:
        finish(run, index, draw_images=not stopped.lacks_data)
    except Exception as error:
        _warn("the stopped run's encoder and figures are incomplete: %s", error)
    wait_for_all()


def _warn(message: str, error: Exception) -> None:
    """Logs what failed, with a traceback if it is not an error that a user can fix."""
    _log.warning(message, error, exc_info=not isinstance(error, OSError | ValueError))


def _draw_training_images(
    run: Run, state: dict[str, Tensor], config: PretrainConfig, index: Index, metrics: list[dict[str, Any]]
) -> None:
    """Draws reconstructions of a few training images, in fp32 and without an engine."""
    method = build_method(config, copy.deepcopy(feature_teacher(run.engine.module)))  # a copy is not compiled
    method.load_state_dict(state)
    method.to(run.device).eval()
    loader = Loader(
        index,
        size=config.data.height_width,
        batch=min(config.log.num_reconstructions, len(index)),
        seed=config.seed,
        mask_sampler=drawn_method(method).mask_sampler(),
        augmentations=config.augmentations[:1],
        format=config.data.pixels.format,
        shuffle_shards=1 if index.is_remote else 0,  # few images, so fetch few shards
    )
    # The epoch after the last one: its crops and masks are new to the model.
    step = config.train.epochs * loader.steps_per_epoch
    ((batch,),) = loader.batches(step, step + 1)
    batch = batch.to(run.device)
    losses = [row["loss"] for row in metrics if row["loss"] is not None]
    fell = f", loss {losses[0]:.2f} -> {losses[-1]:.2f}" if losses else ""
    draw_reconstructions(
        drawn_method(method),
        batch.images,
        batch.mask_indices,
        run.folder.reconstructions,
        f"{config.name}: after {run.state.step} of {run.total_steps} steps{fell}",
        "Training images, with crops and masks that the model has not seen.",
    )
