"""Convolutions on grids of tokens, parallel to a block's attention or after a block.

Shapes: B images, L tokens of a (H, W) grid, with or without prefix tokens in front, D width.
"""

import torch.nn.functional as F
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from downstream.dense.backbone.relative_position import Grid
from pretrain.models.heads import SyncBatchNorm
from pretrain.models.vit import init_weights


def on_grid(convolutions: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """Applies convolutions, (B, D, H, W) -> (B, D, H, W), to (B, L, D) tokens; prefix tokens get zeros."""
    num_prefix_tokens = x.shape[1] - grid[0] * grid[1]
    image = x[:, num_prefix_tokens:].transpose(1, 2).unflatten(2, grid)
    return F.pad(convolutions(image).flatten(2).transpose(1, 2), (0, 0, num_prefix_tokens, 0))


@MODELS.register_module(name="RankBN")
class ChannelBatchNorm(SyncBatchNorm):
    """Batch normalization of (B, D, H, W) with statistics over all ranks; `norm_cfg=dict(type="RankBN")`.

    It replaces SyncBN, which has no CPU path and which mmengine converts to only under its own launchers.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return super().forward(rows.flatten(0, 2)).view(rows.shape).permute(0, 3, 1, 2)


def propagation(dim: int) -> nn.Sequential:
    """ViTDet's cross-window propagation: a residual bottleneck whose last norm is initially zero."""
    half = dim // 2
    last = LayerNorm2d(dim)
    layers = nn.Sequential(
        nn.Conv2d(dim, half, 1, bias=False),
        LayerNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        LayerNorm2d(half),
        nn.GELU(),
        nn.Conv2d(half, dim, 1, bias=False),
        last,
    ).apply(init_weights)
    nn.init.zeros_(last.weight)
    return layers


def parallel_branch(dim: int) -> nn.Sequential:
    """ViTAE's convolutions parallel to attention; the last one is initially zero.

    They work on groups of 4 channels, D -> 4D -> D, with batch normalization and SiLU in between.
    """
    last = nn.Conv2d(4 * dim, dim, 3, padding=1, groups=dim // 4)
    layers = nn.Sequential(
        nn.Conv2d(dim, 4 * dim, 3, padding=1, groups=dim // 4), ChannelBatchNorm(4 * dim), nn.SiLU(), last
    ).apply(init_weights)
    nn.init.zeros_(last.weight)
    return layers
