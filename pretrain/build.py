"""Configuration -> modules."""

from typing import Any

import torch

from pretrain.config import Config
from pretrain.methods import METHODS
from pretrain.models.vit import ViT


def build_method(config: Config[Any]) -> Any:
    """The method around its encoder, initialised from the seed alone: the same weights on every rank."""
    torch.manual_seed(config.seed)
    model = config.model
    encoder = ViT(model.arch, model.patch, config.grid, model.position == "relative", model.checkpoint_blocks)
    return METHODS[config.method.name](config.method, encoder, config.partial)
