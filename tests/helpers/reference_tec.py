"""Reference of TEC, as in `reference.py`: loops over images, heads and patches in float64.

It shares no code with `pretrain`.
"""

import math

import torch
from torch import Tensor

from helpers.reference import (
    Weights,
    aggregate,
    block,
    cut_patch,
    embed,
    gelu,
    layer_norm,
    linear,
    position_embedding,
)
from helpers.reference_features import block_outputs, teacher_target


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    """Layer norm with PyTorch's epsilon, as in the adapter."""
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def encode(image: Tensor, visible: list[int], weights: Weights, heads: int, groups: list[list[int]]) -> list[Tensor]:
    """Encode and adapt the class token, after its MLP, and the visible patches; `groups` has 0-based blocks."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns = image.shape[1] // patch
    tokens = [mlp(weights["encoder.cls_token"][0, 0], weights, "encoder.class_adapter")]
    for i in visible:
        row, col = divmod(i, columns)
        token = embed(cut_patch(image, row, col, patch), weights)
        tokens.append(token + position_embedding(row, col, len(token)))
    outputs = []
    for n in range(sum(map(len, groups))):
        tokens = block(tokens, None, weights, f"encoder.blocks.{n}", heads)
        outputs.append(tokens)
    outputs[-1] = [layer_norm(x, weights, "encoder.norm") for x in tokens]
    adapted = []
    for of_all_blocks in zip(*outputs, strict=True):
        dim = len(of_all_blocks[0])
        joined = norm(torch.cat(of_all_blocks), weights, "adapter.norm")
        total = torch.zeros(dim, dtype=torch.float64)
        for g, members in enumerate(groups):
            part = torch.cat([joined[n * dim : (n + 1) * dim] for n in members])
            fused = linear(part, weights, f"adapter.fuse.{g}")
            total = total + fused + mlp(fused, weights, f"adapter.mlp.{g}")
        adapted.append(norm(total, weights, "adapter.out_norm"))
    return adapted


def decode(
    encoded: list[Tensor], visible: list[int], kept: list[int], grid: tuple[int, int], weights: Weights, heads: int,
    end: int,
) -> list[Tensor]:  # fmt: skip
    """Predict the class token and all patches in raster order; `end` is 0 for features and 1 for attention."""
    tokens = [linear(x, weights, f"decoder.entries.{end}.embed") for x in encoded]
    dim = len(tokens[0])

    def at(token: Tensor, i: int) -> Tensor:
        return token + position_embedding(*divmod(i, grid[1]), dim)

    tokens = [tokens[0], *(at(x, i) for x, i in zip(tokens[1:], visible, strict=True))]
    tokens += [at(weights[f"decoder.entries.{end}.mask_token"][0, 0], i) for i in kept]
    depth = len({name.split(".")[2] for name in weights if name.startswith("decoder.blocks.")})
    for n in range(depth):
        tokens = block(tokens, None, weights, f"decoder.blocks.{n}", heads)
    by_place = dict(zip([*visible, *kept], tokens[1:], strict=True))
    if len(by_place) < grid[0] * grid[1]:
        by_place = aggregate(by_place, grid[1], grid[0], weights, f"decoder.exits.{end}.aggregation", heads)
    ordered = [tokens[0], *(by_place[i] for i in range(grid[0] * grid[1]))]
    return [
        linear(layer_norm(x, weights, f"decoder.exits.{end}.norm"), weights, f"decoder.exits.{end}.pred")
        for x in ordered
    ]


def teacher_attention(image: Tensor, teacher: Weights, heads: int) -> list[list[list[Tensor]]]:
    """Return the last block's attention [head][query][key] before the softmax, class token first."""
    outputs = block_outputs(image, teacher, heads)
    name = f"encoder.blocks.{len(outputs) - 1}"
    normed = [layer_norm(x, teacher, f"{name}.norm1") for x in outputs[-2]]
    dim = len(normed[0])
    qkv = [linear(x, teacher, f"{name}.attn.qkv") for x in normed]
    size = dim // heads
    return [
        [
            [qkv[i][h * size : (h + 1) * size] @ qkv[j][dim + h * size : dim + (h + 1) * size] / math.sqrt(size)
             for j in range(len(normed))]
            for i in range(len(normed))
        ]
        for h in range(heads)
    ]  # fmt: skip


def attention_error(predicted: list[Tensor], attention: list, heads: int, queries: int, temperature: float) -> Tensor:
    """Mean cross-entropy over patches for one image, averaged over rows and heads."""
    count, dim = len(predicted) - 1, len(predicted[0]) // 2
    means = [sum(attention[h][0][1 + i] for h in range(heads)) / heads for i in range(count)]
    rows = [0, *(1 + i for i in sorted(range(count), key=lambda i: -float(means[i]))[:queries])]
    size, errors = dim // heads, []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        for row in rows:
            target = torch.exp(torch.stack(attention[h][row][1:]) / temperature)
            target = target / target.sum()
            logits = torch.stack(
                [predicted[row][:dim][own] @ predicted[1 + j][dim:][own] / math.sqrt(dim) for j in range(count)]
            )
            errors.append(-(target * (logits - torch.log(torch.exp(logits).sum()))).sum())
    return sum(errors) / len(errors)


def tec_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, teacher: Weights, heads: int,
    decoder_heads: int, groups: list[list[int]], blocks: int, queries: int, temperature: float, attention_weight: float,
) -> Tensor:  # fmt: skip
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    grid = images.shape[1] // patch, images.shape[2] // patch
    features, attentions = [], []
    indices = (mask_indices[name].tolist() for name in ("visible", "masked", "kept"))
    for image, visible, masked, kept in zip(images, *indices, strict=True):
        encoded = encode(image, visible, weights, heads, groups)
        predicted = decode(encoded, visible, kept, grid, weights, decoder_heads, 0)
        target = teacher_target(image, teacher, heads, blocks)
        features += [((predicted[1 + i] - target[i]) ** 2).sum() / len(target[i]) for i in masked]
        if attention_weight:
            qk = decode(encoded, visible, kept, grid, weights, decoder_heads, 1)
            attentions.append(
                attention_error(qk, teacher_attention(image, teacher, heads), heads, queries, temperature)
            )
    loss = sum(features) / len(features)
    return loss + attention_weight * sum(attentions) / len(attentions) if attention_weight else loss
