"""Parameter groups with layer decay, and the optimizer of a classifier."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import Lars, param_groups_layer_decay

from downstream.classify.config import FinetuneConfig
from pretrain.trainer.nonfinite import NonfiniteGuard
from pretrain.trainer.optim import build_adamw


class GuardedLars(NonfiniteGuard, Lars):
    """LARS that refuses steps with a non-finite gradient; for ZeRO stage 0."""


def layer_decay_groups(vit: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups each trainable parameter once, with `lr_scale` = layer_decay ** (blocks above it + 1), or 1 for the head.

    Tokens, positions and vectors have no weight decay. Call it before ZeRO-3 empties the shapes.
    """
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        vit,
        weight_decay=weight_decay,
        no_weight_decay_list=vit.no_weight_decay(),
        layer_decay=layer_decay,
    )
    return groups


def build_optimizer(vit: VisionTransformer, config: FinetuneConfig, stage: int) -> torch.optim.Optimizer:
    """The optimizer for a ZeRO stage.

    Raises:
        ValueError: LARS with ZeRO.
    """
    optim = config.optim
    groups = layer_decay_groups(vit, optim.weight_decay, optim.layer_decay)
    if optim.name == "adamw":
        return build_adamw(groups, config, stage)
    if stage:
        raise ValueError(
            f"optim.name=lars scales each matrix by its norm, but ZeRO stage {stage} partitions matrices: "
            f"set train.ds_config=zero0"
        )
    for group in groups:  # as in MAE's code, adapt every matrix, with or without weight decay
        group["always_adapt"] = all(p.ndim > 1 for p in group["params"])
    options: Any = {"lr": config.peak_lr, "momentum": optim.momentum}
    return GuardedLars(groups, **options)
