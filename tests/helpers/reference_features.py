"""Reference of a teacher's features as targets, as in `reference.py`: loops over blocks, channels and patches.

It shares no code with `pretrain`.
"""

import math

import torch
from torch import Tensor

from helpers.reference import Weights, block, cut_patch, embed, position_embedding, relative_buckets

Grid = list[Tensor]  # a vector for each patch, in raster order


def block_outputs(image: Tensor, weights: Weights, heads: int) -> list[list[Tensor]]:
    """Return the class token and all patches of an image after each block of a teacher named `encoder`."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    places = [(row, col) for row in range(image.shape[0] // patch) for col in range(image.shape[1] // patch)]
    relative = "encoder.blocks.0.attn.rpe_k.lookup_table_weight" in weights
    tokens = [weights["encoder.cls_token"][0, 0]]
    for row, col in places:
        token = embed(cut_patch(image, row, col, patch), weights)
        tokens.append(token if relative else token + position_embedding(row, col, len(token)))
    outputs = []
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.blocks."))
    for n in range(depth):
        tokens = block(tokens, relative_buckets(places) if relative else None, weights, f"encoder.blocks.{n}", heads)
        outputs.append(tokens)
    return outputs


def standardized(vectors: Grid) -> Grid:
    """Normalize each channel by its mean and unbiased variance over the patches."""
    channels = []
    for values in zip(*vectors, strict=True):
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        channels.append([(value - mean) / math.sqrt(variance + 1e-6) for value in values])
    return [torch.stack(vector) for vector in zip(*channels, strict=True)]


def average(grids: list[Grid]) -> Grid:
    return [sum(vectors) / len(vectors) for vectors in zip(*grids, strict=True)]


def teacher_target(image: Tensor, weights: Weights, heads: int, blocks: int) -> Grid:
    """TEC's target: the mean of the last blocks, then standardized."""
    return standardized(average([tokens[1:] for tokens in block_outputs(image, weights, heads)[-blocks:]]))


def ema_target(image: Tensor, weights: Weights, heads: int, blocks: int) -> Grid:
    """data2vec 2.0's target: the mean of the standardized last blocks, then a layer norm without parameters."""
    target = []
    for vector in average([standardized(tokens[1:]) for tokens in block_outputs(image, weights, heads)[-blocks:]]):
        centered = vector - sum(vector) / len(vector)
        target.append(centered / math.sqrt(sum(centered**2) / len(vector) + 1e-5))
    return target
