"""Features of whole images."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ViT

Kind = Literal["class", "mean", "patches"]


def features(encoder: ViT, images: Tensor, block: int | None = None) -> Tensor:
    """All tokens of whole images.

    Args:
        encoder: of any kind of position; with LoMaR's relative one, images of other sizes than its own are encoded too.
        images: (B, 3, H, W) standardized pixels.
        block: whose output is wanted, 1 being the first block's, before the encoder's last norm; unless given, the
            output of the encoder.

    Returns:
        (B, P+N, D), the P prefix tokens first, of which the first is the class token; where there is none, the mean of
        the others is put in front.

    Raises:
        ValueError: images of a size that the encoder's positions are not for, or that patches do not divide; or no
            such block.
    """
    if block is not None and not 1 <= block <= len(encoder.blocks):
        raise ValueError(f"block {block}: the encoder has blocks 1 to {len(encoder.blocks)}")
    tokens, position = embed_image(encoder, images)
    tokens = encoder(tokens, position, stop=block)
    return tokens if encoder.cls_token is not None else torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


def embed_image(encoder: ViT, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """What `encoder` takes for whole images: all of their patches' tokens (B, N, D), and the relative positions.

    Arguments and errors as of `features`.
    """
    rows, cols = encoder.grid
    if images.shape[-2:] != encoder.image_size:
        rows, cols = _grid_of_other_size(encoder, *images.shape[-2:])
    embed = encoder.patch_embed.proj
    tokens = F.conv2d(images, embed.weight, embed.bias, stride=encoder.patch_size).flatten(2).transpose(1, 2)
    return tokens, encoder.grid_position((rows, cols)).to(images.device)


def _grid_of_other_size(encoder: ViT, height: int, width: int) -> tuple[int, int]:
    patch_size, own = encoder.patch_size, "x".join(map(str, encoder.image_size))
    if height % patch_size or width % patch_size or not (height and width):
        raise ValueError(
            f"images of {height}x{width} pixels cannot be cut into patches of {patch_size}: give images of {own}"
        )
    if not encoder.relative:
        raise ValueError(
            f"images of {height}x{width} pixels, but the encoder's positions are for {own}: give images of that size, "
            f"or load it with image_size=({height}, {width}), which resizes them"
        )
    return height // patch_size, width // patch_size


def image_features(
    encoder: ViT, images: Tensor, kind: Kind = "mean", block: int | None = None, norm_after_pool: bool = False
) -> Tensor:
    """The features of uint8 images that k-NN compares and `downstream.embed` writes.

    Args:
        encoder, block: as of `features`.
        images: (B, H, W, 3) uint8.
        kind: the `class` token, the `mean` of the patch tokens, or all `patches`.
        norm_after_pool: whether the encoder's last norm is that of a classifier, of the mean and not of every token.

    Returns:
        (B, D), or (B, N, D) of patches in raster order.
    """
    if norm_after_pool and kind == "mean" and block is None:
        return encoder.norm(image_features(encoder, images, "mean", len(encoder.blocks)))
    tokens = features(encoder, normalize_pixels(images).movedim(-1, 1), block)
    if kind == "class":
        return tokens[:, 0]
    patches = tokens[:, max(encoder.num_prefix_tokens, 1) :]
    return patches.mean(1) if kind == "mean" else patches
