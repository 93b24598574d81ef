"""Features of whole images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.relative_position import grid_buckets, offset_buckets
from pretrain.models.vit import ViT


def features(encoder: ViT, images: Tensor) -> Tensor:
    """(B, 3, H, W) standardized pixels of the encoder's image size -> (B, 1+N, D), the class token first.

    Of an encoder without a class token, the mean of the others stands first.
    """
    embed = encoder.patch_embed.proj
    patches = F.conv2d(images, embed.weight, embed.bias, stride=encoder.patch_size)
    assert patches.shape[2:] == encoder.grid, (patches.shape, encoder.grid)
    tokens = patches.flatten(2).transpose(1, 2)
    if not (encoder.relative or encoder.bias):
        tokens = encoder(tokens + encoder.pos_embed[:, 1:])
        return tokens if encoder.cls_token is not None else torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
    buckets = grid_buckets(*encoder.grid) if encoder.relative else offset_buckets(*encoder.grid)
    return encoder(tokens, buckets.to(images.device))
