"""Reference of LocalMIM in float64, as in `reference.py`: loops over images or windows, blocks, patches and cells.

It shares no code with `pretrain`. Transposed convolutions are those of the paper, computed cell by cell. As in the
authors' code, a coarse cell is weighted by the fraction of its patches that are masked, and all patches are decoded.
"""

import torch
from torch import Tensor

from helpers.reference import (
    Weights,
    aggregate,
    block,
    encoder_streams,
    gelu,
    layer_norm,
    linear,
    position_embedding,
)
from helpers.reference_hog import hog


def hidden_streams(
    image: Tensor, patches: list[tuple[int, int]], visible: list[int], blocks: list[int], weights: Weights, heads: int
) -> list[tuple[Tensor, dict[int, Tensor]]]:
    """Return the class token and the visible patches by index after each of `blocks`, each with its own norm.

    Args:
        patches: (row, column) of the sequence's patches in the image's grid.
        visible: indices of the visible patches in the sequence.
    """
    streams, found = encoder_streams(image, patches, visible, weights, heads), []
    for number in blocks:
        name = "encoder.norm" if number == blocks[-1] else f"predictor.norms.{len(found)}"
        normed = [layer_norm(x, weights, name) for x in streams[number]]
        found.append((normed[0], dict(zip(visible, normed[1:], strict=True))))
    return found


def decode(
    class_token: Tensor, encoded: dict[int, Tensor], kept: list[int], grid: tuple[int, int], weights: Weights,
    heads: int, name: str,
) -> dict[int, Tensor]:  # fmt: skip
    """Return a decoder's normalized output at every position of the grid."""
    tokens = {i: linear(x, weights, f"{name}.embed") for i, x in encoded.items()}
    tokens |= dict.fromkeys(kept, weights[f"{name}.mask_token"][0, 0])
    order = sorted(tokens)
    sequence = [linear(class_token, weights, f"{name}.embed")]
    sequence += [tokens[i] + position_embedding(*divmod(i, grid[1]), len(tokens[i])) for i in order]
    n = 0
    while f"{name}.blocks.{n}.norm1.weight" in weights:
        sequence = block(sequence, None, weights, f"{name}.blocks.{n}", heads)
        n += 1
    decoded = dict(zip(order, sequence[1:], strict=True))
    if len(decoded) < grid[0] * grid[1]:
        decoded = aggregate(decoded, grid[1], grid[0], weights, f"{name}.aggregation", heads)
    return {i: layer_norm(x, weights, f"{name}.norm") for i, x in decoded.items()}


def transposed_convolution(image: dict[tuple[int, int], Tensor], weights: Weights, name: str):
    """Kernel size and stride 2: every position becomes four."""
    kernel, result = weights[f"{name}.weight"], {}
    for (row, col), x in image.items():
        for i in range(2):
            for j in range(2):
                result[2 * row + i, 2 * col + j] = kernel[:, :, i, j].T @ x + weights[f"{name}.bias"]
    return result


def cells_of(decoded: dict[int, Tensor], grid: tuple[int, int], ratio: float, weights: Weights, name: str):
    """Return the predicted histograms by (row, column) of the cell, with `ratio` cells along a patch's side."""
    image = {divmod(i, grid[1]): x for i, x in decoded.items()}
    if ratio == 0.5:
        image = {
            (row, col): sum(image[2 * row + i, 2 * col + j] for i in range(2) for j in range(2)) / 4
            for row in range(grid[0] // 2)
            for col in range(grid[1] // 2)
        }
        return {place: linear(x, weights, f"{name}.pred") for place, x in image.items()}
    if ratio == 1:
        return {place: linear(x, weights, f"{name}.pred") for place, x in image.items()}
    image = transposed_convolution(image, weights, f"{name}.pred.1")
    if ratio == 2:
        return {place: linear(x, weights, f"{name}.pred.2") for place, x in image.items()}
    assert ratio == 4
    image = {place: gelu(layer_norm(x, weights, f"{name}.pred.2")) for place, x in image.items()}
    image = transposed_convolution(image, weights, f"{name}.pred.4")
    return {place: linear(x, weights, f"{name}.pred.5") for place, x in image.items()}


def local_mim_loss(
    images: Tensor, mask_indices: dict[str, Tensor], weights: Weights, heads: int, decoder_heads: int,
    blocks: list[int], sizes: list[int], bins: int,
) -> Tensor:  # fmt: skip
    """Sum over cell sizes of the weighted mean squared error over all cells of all images.

    Args:
        images: (B, H, W, 3) uint8.
        mask_indices: `visible`, `masked` and `kept` (B, ...), or for windows (B, W, ...) with `positions` (B, W, L).
    """
    patch = weights["encoder.patch_embed.proj.weight"].shape[-1]
    columns, rows = images.shape[2] // patch, images.shape[1] // patch
    whole = torch.arange(rows * columns).expand(len(images), 1, -1)
    windows = mask_indices.get("positions", whole)
    errors, shares = [[] for _ in sizes], [[] for _ in sizes]
    for b, image in enumerate(images):
        found = [hog(image, size, bins) for size in sizes]
        for w, window in enumerate(windows[b].tolist()):
            names = ("visible", "masked", "kept")
            visible, masked, kept = (mask_indices[name][b].reshape(len(windows[b]), -1)[w].tolist() for name in names)
            patches = [divmod(position, columns) for position in window]
            grid = (patches[-1][0] - patches[0][0] + 1, patches[-1][1] - patches[0][1] + 1)
            streams = hidden_streams(image, patches, visible, blocks, weights, heads)
            for s, (class_token, encoded) in enumerate(streams):
                name, ratio = f"predictor.decoders.{s}", patch / sizes[s]
                decoded = decode(class_token, encoded, kept, grid, weights, decoder_heads, name)
                for (row, col), predicted in cells_of(decoded, grid, ratio, weights, name).items():
                    top, left = int(patches[0][0] * ratio), int(patches[0][1] * ratio)
                    target = found[s][top + row, left + col]
                    inside = [
                        i for i in range(len(window))
                        if int((i // grid[1]) * min(ratio, 1)) == int(row / max(ratio, 1))
                        and int((i % grid[1]) * min(ratio, 1)) == int(col / max(ratio, 1))
                    ]  # fmt: skip
                    shares[s].append(sum(i in masked for i in inside) / len(inside))
                    errors[s].append(((predicted - target) ** 2).sum() / len(target) * shares[s][-1])
    return sum(sum(of_size) / sum(share) for of_size, share in zip(errors, shares, strict=True))
