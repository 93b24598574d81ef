"""Features of whole images."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.patches import normalize_pixels
from pretrain.models.vit import ViT

Kind = Literal["mean", "class", "class_mean", "prefix", "patches"]


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raises ValueError unless these are ascending numbers of an encoder's blocks."""
    for block in blocks:
        if not 1 <= block <= depth:
            raise ValueError(f"block {block}: the encoder has blocks 1 to {depth}")
    if list(blocks) != sorted(set(blocks)):
        given, better = (",".join(map(str, numbers)) for numbers in (blocks, sorted(set(blocks))))
        raise ValueError(f"blocks {given}: give each of them once, in ascending order: {better}")


def features(encoder: ViT, images: Tensor, blocks: Sequence[int] = ()) -> Tensor:
    """All tokens of whole images.

    Args:
        encoder: with any kind of position; LoMaR's relative position encodes images of any other size as well.
        images: (B, C, H, W) standardized pixels.
        blocks: whose outputs to return, side by side and before the encoder's last norm; 1 is the first block. If
            empty, the output of the encoder.

    Returns:
        (B, P+N, D), the P prefix tokens first, starting with the class token; without one, the mean of the others is
        put in front. D values for each block.

    Raises:
        ValueError: images of a size that does not fit the encoder's positions or patches, or no such block.
    """
    check_blocks(blocks, len(encoder.blocks))
    rows, cols = encoder.grid
    if images.shape[-2:] != encoder.image_size:
        rows, cols = _grid_of_other_size(encoder, *images.shape[-2:])
    embed = encoder.patch_embed.proj
    tokens = F.conv2d(images, embed.weight, embed.bias, stride=encoder.patch_size).flatten(2).transpose(1, 2)
    position = encoder.grid_position((rows, cols), images.device)
    tokens = torch.cat(encoder(tokens, position, hidden=blocks), dim=-1) if blocks else encoder(tokens, position)
    return tokens if encoder.cls_token is not None else torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


def _grid_of_other_size(encoder: ViT, height: int, width: int) -> tuple[int, int]:
    patch_size, own = encoder.patch_size, "x".join(map(str, encoder.image_size))
    if height % patch_size or width % patch_size or not (height and width):
        raise ValueError(
            f"images of {height}x{width} pixels cannot be cut into patches of {patch_size}: give images of {own}"
        )
    if not encoder.relative:
        raise ValueError(
            f"images of {height}x{width} pixels, but the encoder's positions are for {own}: give images of that size, "
            f"or load the encoder with image_size=({height}, {width}), which resizes them"
        )
    return height // patch_size, width // patch_size


def image_features(
    encoder: ViT, images: Tensor, kind: Kind = "mean", blocks: Sequence[int] = (), norm_after_pool: bool = False
) -> Tensor:
    """One kind of `pooled_features`, which `downstream.embed` writes."""
    return pooled_features(encoder, images, (kind,), blocks, norm_after_pool)[0]


def pooled_features(
    encoder: ViT, images: Tensor, kinds: Sequence[Kind], blocks: Sequence[int] = (), norm_after_pool: bool = False
) -> list[Tensor]:
    """Several kinds of features of the same images, which are encoded once.

    Args:
        encoder, blocks: as for `features`.
        images: (B, H, W, C) pixels of `encoder.pixels`, in their type or as float32.
        kinds: the `mean` of the patch tokens, the `class` token, both side by side (`class_mean`), the mean of all
            tokens in front of the patches (`prefix`), or all `patches`.
        norm_after_pool: whether the encoder's last norm is a classifier's, applied after pooling, not to every token.

    Returns:
        (B, D) for each kind, (B, 2D) for `class_mean`, (B, N, D) for patches in raster order.
    """
    last = norm_after_pool and not blocks
    standardized = normalize_pixels(images, encoder.pixels).movedim(-1, 1)
    tokens = features(encoder, standardized, (len(encoder.blocks),) if last else blocks)
    pooled = [_pool(tokens, kind, max(encoder.num_prefix_tokens, 1)) for kind in kinds]
    normed = [encoder.norm(part) for part in pooled] if last else pooled
    return [part.flatten(1) if kind == "class_mean" else part for kind, part in zip(kinds, normed, strict=True)]


def _pool(tokens: Tensor, kind: Kind, prefix: int) -> Tensor:
    """`pooled_features` of (B, prefix+N, D) tokens; (B, 2, D) for `class_mean`."""
    if kind == "class_mean":
        return torch.stack([_pool(tokens, "class", prefix), _pool(tokens, "mean", prefix)], dim=1)
    if kind == "class":
        return tokens[:, 0]
    if kind == "prefix":
        return tokens[:, :prefix].mean(1)
    return tokens[:, prefix:].mean(1) if kind == "mean" else tokens[:, prefix:]
