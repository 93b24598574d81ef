"""The end of a run: its encoder, its loss curve and its reconstructions, from the trained weights."""

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.index import Index
from data.loader import Loader
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


def save_encoder(state: dict[str, Tensor], config: Config[Any], folder: RunFolder) -> None:
    """The encoder alone under timm's names, with what is needed to rebuild it in the file's metadata."""
    prefix = "encoder."
    encoder = {k.removeprefix(prefix): v.contiguous() for k, v in state.items() if k.startswith(prefix)}
    metadata = {
        "arch": config.model.arch,
        "patch": str(config.model.patch),
        "size": "x".join(map(str, config.data.height_width)),
        "position": config.model.position,
        "method": config.method.name,
        "epochs": str(config.train.epochs),
    }
    save_file(encoder, folder.encoder, metadata=metadata)


def draw_reconstructions(
    state: dict[str, Tensor], config: Config[Any], index: Index, folder: RunFolder, device: torch.device
) -> None:
    """Reconstructs the first images of an unshuffled pass with the trained weights in fp32, without an engine."""
    method = build_method(config)
    method.load_state_dict(state)
    method.to(device).eval()
    count = min(config.log.panel_images, len(index))
    # An epoch that is never trained on: its crops and masks are new to the model.
    loader = Loader(index, size=config.data.height_width, batch=count, seed=config.seed, view=method.view(), flip=0.0)
    unseen = config.train.epochs * loader.steps_per_epoch
    ((batch,),) = loader.batches(unseen, unseen + 1)
    view = {name: array.to(device) for name, array in batch.view.items()}
    pictures = method.reconstruct(batch.images.to(device), view)
    draw_panel({name: images.cpu() for name, images in pictures.items()}, folder.reconstructions)


def finish(
    engine: Any, config: Config[Any], index: Index, folder: RunFolder, world: World, device: torch.device
) -> None:
    """Writes encoder.safetensors, loss.png and reconstructions.png; called by all ranks together."""
    state = full_state(engine, world)
    if world.is_main:
        save_encoder(state, config, folder)
        draw_loss(read_metrics(folder.metrics), folder.loss_curve)
        draw_reconstructions(state, config, index, folder, device)
