"""The end of a run: its encoder, its loss curve and its reconstructions, from the trained weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from data.index import Index
from data.loader import Loader
from pretrain.average import Average, NoAverage
from pretrain.build import build_method
from pretrain.config import Config
from pretrain.figures import draw_loss, draw_panel
from pretrain.launch import World
from pretrain.metrics import read_metrics
from pretrain.runfolder import RunFolder


def full_state(engine: Any, world: World) -> dict[str, Tensor]:
    """The method's fp32 weights on the main rank's CPU, whatever the ZeRO stage; called by all ranks together."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):  # no-op below stage 3
        if not world.is_main:
            return {}
        return {name: tensor.detach().cpu().clone() for name, tensor in engine.module.state_dict().items()}


def encoder_of(method: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a method's weights, under timm's names."""
    prefix = next(name for name, module in method.named_modules() if module is method.encoder) + "."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def save_encoder(encoder: dict[str, Tensor], config: Config[Any], path: Path) -> None:
    """With what is needed to rebuild it in the file's metadata."""
    metadata = {
        "arch": config.model.arch,
        "patch": str(config.model.patch),
        "size": "x".join(map(str, config.data.height_width)),
        "position": config.model.position,
        "method": config.method.name,
        "epochs": str(config.train.epochs),
    }
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in encoder.items()}, metadata))


def draw_reconstructions(
    state: dict[str, Tensor], config: Config[Any], index: Index, folder: RunFolder, device: torch.device
) -> None:
    """Reconstructs the first images of an unshuffled pass with the trained weights in fp32, without an engine."""
    method = build_method(config)
    method.load_state_dict(state)
    method.to(device).eval()
    count = min(config.log.panel_images, len(index))
    # An epoch that is never trained on: its crops and masks are new to the model.
    size, view = config.data.height_width, method.view()
    loader = Loader(index, size=size, batch=count, seed=config.seed, view=view, pictures=config.pictures)
    unseen = config.train.epochs * loader.steps_per_epoch
    ((batch,),) = loader.batches(unseen, unseen + 1)
    pictures = method.reconstruct(
        batch.images.to(device), {name: array.to(device) for name, array in batch.view.items()}
    )
    draw_panel({name: images.cpu() for name, images in pictures.items()}, folder.reconstructions)


def finish(
    engine: Any,
    average: Average | NoAverage,
    config: Config[Any],
    index: Index,
    folder: RunFolder,
    world: World,
    device: torch.device,
) -> None:
    """Writes encoder.safetensors, the teacher's if there is one, and the pictures; called by all ranks together."""
    state = full_state(engine, world)
    if world.is_main:
        save_encoder(encoder_of(engine.module, state), config, folder.encoder)
        if averaged := average.weights():
            save_encoder(encoder_of(average.target, averaged), config, folder.encoder_ema)
        draw_loss(read_metrics(folder.metrics), folder.loss_curve)
        draw_reconstructions(state, config, index, folder, device)
