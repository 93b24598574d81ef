"""Reference of BEiT and its random-projection tokenizer in float64 loops, with the encoder of `reference.py`.

It shares no code with `pretrain`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from helpers.reference import Weights, cut_patch, encode_sequence, predict, target_of


def random_projection_codes(image: Tensor, patch: int, seed: int, vocab_size: int, code_dim: int) -> list[int]:
    """Return the code nearest to the projection of each patch of an image (H, W, 3) uint8, both with unit length."""
    generator = np.random.RandomState(seed)
    codebook = torch.from_numpy(generator.standard_normal((vocab_size, code_dim)))
    projection = torch.from_numpy(generator.standard_normal((patch * patch * 3, code_dim)))
    chosen = []
    for row in range(image.shape[0] // patch):
        for col in range(image.shape[1] // patch):
            pixels = target_of(cut_patch(image, row, col, patch), norm_pix=True)
            projected = sum(pixels[i] * projection[i] for i in range(len(pixels)))
            projected = projected / math.sqrt(float((projected**2).sum()))
            distances = []
            for code in codebook:
                normalized = code / math.sqrt(float((code**2).sum()))
                distances.append(float(((projected - normalized) ** 2).sum()))
            chosen.append(distances.index(min(distances)))
    return chosen


def beit_loss(
    images: Tensor, mask_indices: dict[str, Tensor], codes: list[list[int]], weights: Weights, heads: int, patch: int
) -> Tensor:  # fmt: skip
    """Mean of -log softmax(logits)[code] over all masked patches of all windows of all images.

    Args:
        images: (B, H, W, 3) uint8.
        mask_indices: `positions` (B, W, L) in the grid, `masked` (B, W, M) and `kept` (B, W, K) in the window; for
            whole images, `masked` (B, M) and `kept` (B, K).
        codes: code of each patch of each image.
        weights: the state dict of `BEiT` or `LoMaR`, in float64.
        heads: number of heads of the encoder.
        patch: side of a patch in pixels.
    """
    rows, columns = images.shape[1] // patch, images.shape[2] // patch
    whole = torch.arange(rows * columns).expand(len(images), 1, -1)
    windows = mask_indices.get("positions", whole)
    grid = (math.isqrt(windows.shape[-1]),) * 2 if "positions" in mask_indices else (rows, columns)
    all_masked, all_kept = (
        mask_indices[name].view(len(images), -1, mask_indices[name].shape[-1]) for name in ("masked", "kept")
    )
    losses = []
    for b, image in enumerate(images):
        for w, window in enumerate(windows[b].tolist()):
            masked, kept = all_masked[b, w].tolist(), all_kept[b, w].tolist()
            patches = [divmod(position, columns) for position in window]
            _, encoded = encode_sequence(image, patches, masked, kept, 0, weights, heads)
            logits = predict(encoded, grid[1], grid[0], weights, heads)
            for i in masked:
                losses.append(torch.log(torch.exp(logits[i]).sum()) - logits[i][codes[b][window[i]]])
    return sum(losses) / len(losses)
