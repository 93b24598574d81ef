"""Reference of CrossMAE's decoder, as in `reference.py`: loops over queries, heads and encoded tokens in float64.

It shares no code with `pretrain`.
"""

import math

import torch
from torch import Tensor

from helpers.reference import (
    Weights,
    aggregate,
    cut_patch,
    depth_of,
    encoder_streams,
    gelu,
    layer_norm,
    linear,
    position_embedding,
    target_of,
)


def contexts_of(streams: list[list[Tensor]], weights: Weights, name: str) -> list[list[Tensor]]:
    """Return the tokens that each block of the decoder attends to."""
    depth = depth_of(weights, name)
    if f"{name}.inter_block.weight" not in weights:
        return [[layer_norm(token, weights, "encoder.norm") for token in streams[-1]]] * depth
    contexts = []
    for j in range(depth):
        sums = []
        for t in range(len(streams[0])):
            total = 0.0
            for i, stream in enumerate(streams):
                total = total + weights[f"{name}.inter_block.weight"][j, i] * stream[t]
            sums.append(layer_norm(total, weights, f"{name}.inter_block.norms.{j}"))
        contexts.append(sums)
    return contexts


def cross_attention(x: Tensor, context: list[Tensor], weights: Weights, name: str, heads: int) -> Tensor:
    """One query against every encoded token; keys are the first half of `kv`'s outputs."""
    dim = len(x)
    head_dim = dim // heads
    q = linear(x, weights, f"{name}.q")
    keys_and_values = [linear(token, weights, f"{name}.kv") for token in context]
    joined = []
    for head in range(heads):
        own = slice(head * head_dim, (head + 1) * head_dim)
        exponents = [torch.exp(q[own] @ kv[:dim][own] / math.sqrt(head_dim)) for kv in keys_and_values]
        joined.append(sum(e / sum(exponents) * kv[dim:][own] for e, kv in zip(exponents, keys_and_values, strict=True)))
    return linear(torch.cat(joined), weights, f"{name}.proj")


def cross_predict(
    image: Tensor, patches: list[tuple[int, int]], visible: list[int], kept: list[int], grid: tuple[int, int],
    weights: Weights, heads: int, decoder_heads: int, name: str,
) -> dict[int, Tensor]:  # fmt: skip
    """Return the predictions of an image's or a window's kept patches, or of all patches that PR-MIM computes.

    Args:
        image: (H, W, 3) uint8.
        patches: (row, column) of the sequence's patches in the image.
        visible, kept: indices of the patches that are encoded, and of those that are queries.
        grid: rows and columns of the sequence.
        weights: in float64.
        heads, decoder_heads: numbers of heads of the encoder and the decoder.
        name: prefix of the decoder's weights.
    """
    contexts = contexts_of(encoder_streams(image, patches, visible, weights, heads), weights, name)
    decoded = {}
    for i in kept:
        mask_token = weights[f"{name}.mask_token"][0, 0]
        x = mask_token + position_embedding(*divmod(i, grid[1]), len(mask_token))
        for j, context in enumerate(contexts):
            at = f"{name}.blocks.{j}"
            attended = layer_norm(x, weights, f"{at}.norm1")
            x = x + cross_attention(attended, context, weights, f"{at}.cross_attn", decoder_heads)
            hidden = gelu(linear(layer_norm(x, weights, f"{at}.norm2"), weights, f"{at}.mlp.fc1"))
            x = x + linear(hidden, weights, f"{at}.mlp.fc2")
        decoded[i] = x
    if f"{name}.embed.weight" in weights:
        narrow = [linear(token, weights, f"{name}.embed") for token in contexts[-1][-len(visible) :]]
        decoded |= dict(zip(visible, narrow, strict=True))
        decoded = aggregate(decoded, grid[1], grid[0], weights, f"{name}.aggregation", decoder_heads)
    return {i: linear(layer_norm(x, weights, f"{name}.norm"), weights, f"{name}.pred") for i, x in decoded.items()}


def lomar_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, decoder_heads: int
) -> Tensor:
    """Like `reference.lomar_loss` with normalized pixels, but with this decoder."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    side, columns = math.isqrt(mask_indices["positions"].shape[-1]), images.shape[2] // patch
    errors = []
    for b, image in enumerate(images):
        for w, window in enumerate(mask_indices["positions"][b].tolist()):
            visible, masked, kept = (mask_indices[name][b, w].tolist() for name in ("visible", "masked", "kept"))
            patches = [divmod(position, columns) for position in window]
            predicted = cross_predict(
                image, patches, visible, kept, (side, side), weights, heads, decoder_heads, "predictor.decoder"
            )
            for i in masked:
                target = target_of(cut_patch(image, *patches[i], patch), True)
                errors.append(((predicted[i] - target) ** 2).sum() / len(target))
    return sum(errors) / len(errors)
