"""A backbone of four narrow blocks for the tests of the backbone and its loading."""

from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from downstream.dense.backbone.plain_vit import PlainViT
from pretrain.models.vit import Arch

TINY = Arch(dim=16, depth=4, heads=2)
POSITIONS = ("relative", "sincos")


def build_backbone(**options: Any) -> PlainViT:
    defaults = {"patch_size": 4, "img_size": (24, 32), "window_size": 3, "global_blocks": (1,), "out_indices": (3,)}
    defaults["drop_path_rate"] = 0.0
    torch.manual_seed(0)
    return MODELS.build({"type": "PlainViT", "arch": "vit_tiny", **defaults, **options})


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))
