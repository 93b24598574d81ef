"""Writes the results of a run: the encoder, the loss curve and reconstructions by the trained weights."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from data.index import Index
from data.loader import Loader
from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.engine import gather_state_dict
from pretrain.trainer.figures import draw_image_grid, draw_loss
from pretrain.trainer.loop import Run
from pretrain.trainer.metrics import read_metrics


def encoder_state_dict(method: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's weights, under timm's names, out of those of a module that has an `encoder`."""
    prefix = next(name for name, module in method.named_modules() if module is method.encoder) + "."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def save_encoder(encoder: dict[str, Tensor], config: PretrainConfig, path: Path) -> None:
    """Writes a safetensors file whose metadata is the `EncoderSpec`."""
    spec = EncoderSpec.from_signature(config.resume_signature(), config.train.epochs)
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in encoder.items()}, spec.to_metadata()))


def draw_reconstructions(
    state: dict[str, Tensor], config: PretrainConfig, index: Index, path: Path, device: torch.device
) -> None:
    """Draws reconstructions of a few training images by the trained weights, in fp32 and without an engine."""
    method = build_method(config)
    method.load_state_dict(state)
    method.to(device).eval()
    loader = Loader(
        index,
        size=config.data.height_width,
        batch=min(config.log.num_reconstructions, len(index)),
        seed=config.seed,
        mask_sampler=method.mask_sampler(),
        augmentations=config.augmentations,
    )
    # The epoch after the last one: its crops and masks are new to the model.
    step = config.train.epochs * loader.steps_per_epoch
    ((batch,),) = loader.batches(step, step + 1)
    batch = batch.to(device)
    images = method.reconstruct(batch.images, batch.mask_indices)
    draw_image_grid({name: column.cpu() for name, column in images.items()}, path)


def finish(run: Run, index: Index) -> None:
    """Writes the encoder, the teacher's encoder if there is one, and the figures; called by all ranks together."""
    config, folder = run.config, run.folder
    assert isinstance(config, PretrainConfig)
    state = gather_state_dict(run.engine, run.world)
    if run.world.is_main:
        save_encoder(encoder_state_dict(run.engine.module, state), config, folder.encoder)
        if run.ema.model is not None:
            save_encoder(encoder_state_dict(run.ema.model, run.ema.state_dict()), config, folder.encoder_ema)
        draw_loss(read_metrics(folder.metrics), folder.loss_curve)
        draw_reconstructions(state, config, index, folder.reconstructions, run.device)
