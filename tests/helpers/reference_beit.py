"""BEiT and its random-projection tokenizer spelled out in float64 loops, beside `reference.py` for the encoder.

It shares no code with `pretrain`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from helpers.reference import Weights, cut_patch, encode_sequence, predict, target_of


def random_projection_codes(image: Tensor, patch: int, seed: int, codes: int, dim: int) -> list[int]:
    """For each patch of an image (H, W, 3) uint8, the code of unit length nearest to its projection of unit length."""
    generator = np.random.RandomState(seed)
    book = torch.from_numpy(generator.standard_normal((codes, dim)))
    projection = torch.from_numpy(generator.standard_normal((patch * patch * 3, dim)))
    chosen = []
    for row in range(image.shape[0] // patch):
        for col in range(image.shape[1] // patch):
            pixels = target_of(cut_patch(image, row, col, patch), norm_pix=True)
            projected = sum(pixels[i] * projection[i] for i in range(len(pixels)))
            projected = projected / math.sqrt(float((projected**2).sum()))
            distances = []
            for code in book:
                unit = code / math.sqrt(float((code**2).sum()))
                distances.append(float(((projected - unit) ** 2).sum()))
            chosen.append(distances.index(min(distances)))
    return chosen


def beit_loss(
    images: Tensor, mask_indices: dict[str, Tensor], codes: list[list[int]], weights: Weights, heads: int, patch: int,
    area: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Mean of -log softmax(logits)[code] over all masked patches of all windows of all images.

    Args:
        images: (B, H, W, 3) uint8.
        view: `window` (B, W, L) grid positions, `masked` (B, W, M) and `kept` (B, W, K) positions within the window.
        codes: of each patch of each image.
        weights: the state dict of `BEiT`, in float64.
        heads: of the encoder.
        patch: its side in pixels.
        area: rows and columns of a window.
    """
    columns = images.shape[2] // patch
    losses = []
    for b, image in enumerate(images):
        for w, window in enumerate(mask_indices["window"][b].tolist()):
            masked, kept = mask_indices["masked"][b, w].tolist(), mask_indices["kept"][b, w].tolist()
            places = [divmod(place, columns) for place in window]
            _, encoded = encode_sequence(image, places, masked, kept, 0, weights, heads)
            logits = predict(encoded, area[1], area[0], weights, heads)
            for i in masked:
                losses.append(torch.log(torch.exp(logits[i]).sum()) - logits[i][codes[b][window[i]]])
    return sum(losses) / len(losses)
