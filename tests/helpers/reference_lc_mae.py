"""Reference of LC-MAE, as in `reference.py`, from the paper's equations 1, 5 and 6 and its Tables 2 and 3.

It loops over images, views, patches and pairs in float64, and shares no code with `pretrain`.
"""

import math

import torch
from torch import Tensor

from helpers.reference import (
    PIXEL_MEAN,
    PIXEL_STD,
    Weights,
    cut_patch,
    gelu,
    layer_norm,
    linear,
    position_embedding,
    target_of,
    transformer_decoder,
)
from helpers.reference_mae import encode


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / torch.sqrt((a * a).sum()) / torch.sqrt((b * b).sum())


def filled_grid(encoded: dict[int, Tensor], grid: tuple[int, int], weights: Weights) -> list[Tensor]:
    tokens = [encoded.get(i, weights["decoder.restore.mask_token"][0, 0]) for i in range(grid[0] * grid[1])]
    return [token + position_embedding(*divmod(i, grid[1]), len(token)) for i, token in enumerate(tokens)]


def average_decoder(encoded: dict[int, Tensor], grid: tuple[int, int], weights: Weights) -> list[Tensor]:
    """Table 2: Gaussian weights over the 5 x 5 neighbors inside the grid, then an MLP."""
    tokens, predictions = filled_grid(encoded, grid, weights), []
    for row in range(grid[0]):
        for col in range(grid[1]):
            total, mean = 0.0, torch.zeros_like(tokens[0])
            for r in range(max(row - 2, 0), min(row + 3, grid[0])):
                for c in range(max(col - 2, 0), min(col + 3, grid[1])):
                    weight = math.exp(-((r - row) ** 2 + (c - col) ** 2) / 2)
                    total += weight
                    mean = mean + weight * tokens[r * grid[1] + c]
            x = layer_norm(mean / total, weights, "decoder.norm")
            predictions.append(linear(gelu(linear(x, weights, "decoder.mlp.fc1")), weights, "decoder.mlp.fc2"))
    return predictions


def conv_decoder(encoded: dict[int, Tensor], grid: tuple[int, int], weights: Weights) -> list[Tensor]:
    """Table 2: one 5 x 5 convolution with zeros outside the grid."""
    tokens, predictions = filled_grid(encoded, grid, weights), []
    kernel = weights["decoder.conv.weight"]
    for row in range(grid[0]):
        for col in range(grid[1]):
            y = weights["decoder.conv.bias"]
            for r in range(max(row - 2, 0), min(row + 3, grid[0])):
                for c in range(max(col - 2, 0), min(col + 3, grid[1])):
                    y = y + kernel[:, :, r - row + 2, c - col + 2] @ tokens[r * grid[1] + c]
            predictions.append(y)
    return predictions


def predict(
    image: Tensor, visible: list[int], kept: list[int], weights: Weights, heads: int, decoder_heads: int, decoder: str
):
    """h(x, m) of eq. 1 at every patch of the image."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    grid = image.shape[0] // patch, image.shape[1] // patch
    prefix, encoded = encode(image, visible, weights, heads, kept if "mask_tokens.token" in weights else None)
    if decoder == "transformer":
        return transformer_decoder(prefix, encoded, kept, grid, weights, decoder_heads)
    return {"average": average_decoder, "conv": conv_decoder}[decoder](encoded, grid, weights)


def cross_view(v1: dict[int, Tensor], v2: dict[int, Tensor]) -> Tensor:
    """Eq. 5 for one image, with vectors by patch position; zero if the views share no patch."""
    distances = [1 - cosine(v1[i], v2[i]) for i in v1 if i in v2]
    return sum(distances) / len(distances) if distances else torch.zeros((), dtype=torch.float64)


def in_view(v: dict[int, Tensor], x: dict[int, Tensor]) -> Tensor:
    """Eq. 6 for one view."""
    differences = [(cosine(v[i], v[j]) - cosine(x[i], x[j])).abs() for i in v for j in v if i != j]
    return sum(differences) / len(differences)


def lc_mae_loss(
    images: Tensor,
    mask_indices: dict[str, Tensor],
    weights: Weights,
    heads: int,
    decoder_heads: int,
    decoder: str,
    factors: tuple[float, float, float],
    norm_pix: bool,
) -> Tensor:
    """The weighted sum of the reconstruction, cross-view and in-view losses.

    Args:
        images: (B, H, W, 3) uint8.
        mask_indices: `visible` (B, 2, V), `masked` (B, 2, M) and `kept` (B, 2, K) grid positions.
        weights: the state dict of `LCMAE`, in float64.
        factors: weights of the three losses; the projector exists if one of the last two is not zero.
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns = images.shape[2] // patch
    total = torch.zeros((), dtype=torch.float64)
    for b, image in enumerate(images):
        vectors = []
        for m in range(2):
            visible, masked, kept = (mask_indices[name][b, m].tolist() for name in ("visible", "masked", "kept"))
            h = predict(image, visible, kept, weights, heads, decoder_heads, decoder)
            x = {i: cut_patch(image, *divmod(i, columns), patch) for i in masked}
            errors = [((h[i] - target_of(x[i], norm_pix)) ** 2).sum() / len(h[i]) for i in masked]
            total = total + factors[0] * sum(errors) / len(errors) / 2
            if factors[1] or factors[2]:
                vectors.append({i: linear(h[i], weights, "proj") for i in masked})
                total = total + factors[2] * in_view(vectors[-1], x) / 2
        if factors[1]:
            total = total + factors[1] * cross_view(*vectors)
    return total / len(images)


def mirrored(i: int, length: int) -> int:
    """Reflect a position outside 0..length-1 at the first or last pixel."""
    return -i if i < 0 else 2 * (length - 1) - i if i >= length else i


def block_around(image: Tensor, row: int, col: int, patch: int, size: int) -> Tensor:
    """Return the size x size pixels around the center of a patch: rows, then columns, then RGB."""
    height, width, _ = image.shape
    top, left = row * patch - (size - patch) // 2, col * patch - (size - patch) // 2
    return torch.stack(
        [image[mirrored(r, height), mirrored(c, width), channel]
         for r in range(top, top + size) for c in range(left, left + size) for channel in range(3)]
    )  # fmt: skip


def ae_loss(images: Tensor, weights: Weights, heads: int, decoder_heads: int, size: int, norm_pix: bool) -> Tensor:
    """Figure 7: every token predicts the block around its patch; mean squared error."""
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    grid = images.shape[1] // patch, images.shape[2] // patch
    errors = []
    for image in images:
        prefix, encoded = encode(image, list(range(grid[0] * grid[1])), weights, heads)
        for i, prediction in transformer_decoder(prefix, encoded, [], grid, weights, decoder_heads).items():
            pixels = block_around(image, *divmod(i, grid[1]), patch, size).double().view(-1, 3) / 255
            mean, std = (torch.tensor(values, dtype=torch.float64) for values in (PIXEL_MEAN, PIXEL_STD))
            target = target_of(((pixels - mean) / std).flatten(), norm_pix)
            errors.append(((prediction - target) ** 2).sum() / len(target))
    return sum(errors) / len(errors)
