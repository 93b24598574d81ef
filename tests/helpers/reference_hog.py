"""Reference of histograms of oriented gradients: pixel by pixel in float64, for normalized images as in the papers."""

import math

import torch
from torch import Tensor

from helpers.reference import PIXEL_MEAN, PIXEL_STD

SOBEL = ((1, 0, -1), (2, 0, -2), (1, 0, -1))


def _inside(i: int, length: int) -> int:
    """Reflect an index at the border without repeating the outermost pixel."""
    return -i if i < 0 else 2 * (length - 1) - i if i >= length else i


def gradients(image: Tensor, channel: int, standardized: bool = True) -> list[list[tuple[float, float]]]:
    """Return (gx, gy) of every pixel of one channel of an (H, W, 3) uint8 image."""
    height, width = image.shape[:2]
    mean, std = (PIXEL_MEAN[channel], PIXEL_STD[channel]) if standardized else (0.0, 1.0)
    pixel = [[(int(image[y, x, channel]) / 255 - mean) / std for x in range(width)] for y in range(height)]
    result = []
    for y in range(height):
        row = []
        for x in range(width):
            near = [[pixel[_inside(y + i - 1, height)][_inside(x + j - 1, width)] for j in range(3)] for i in range(3)]
            gx = sum(SOBEL[i][j] * near[i][j] for i in range(3) for j in range(3))
            gy = sum(SOBEL[j][i] * near[i][j] for i in range(3) for j in range(3))
            row.append((gx, gy))
        result.append(row)
    return result


def hog(image: Tensor, cell: int, bins: int, window: int = 0) -> dict[tuple[int, int], Tensor]:
    """Return the normalized histograms (3 * bins,) of each cell by (row, column)."""
    height, width = image.shape[:2]
    cells = {(row, col): [] for row in range(height // cell) for col in range(width // cell)}
    for channel in range(3):
        slopes = gradients(image, channel)
        for row, col in cells:
            histogram = [0.0] * bins
            for y in range(row * cell, (row + 1) * cell):
                for x in range(col * cell, (col + 1) * cell):
                    gx, gy = slopes[y][x]
                    if math.hypot(gx, gy) < 1e-9:
                        continue  # flat: the direction would only be rounding error
                    weight = 1.0
                    if window:
                        down, right = (i % window - (window - 1) / 2 for i in (y, x))
                        weight = math.exp(-(down**2 + right**2) / (2 * (window / 2) ** 2))
                    turn = math.atan2(gx, gy) / math.pi * bins
                    histogram[math.floor(turn + 1e-9) % bins] += weight * math.hypot(gx, gy)
            norm = math.sqrt(sum(value**2 for value in histogram))
            cells[row, col] += [value / norm if norm > 0 else 0.0 for value in histogram]
    return {place: torch.tensor(values, dtype=torch.float64) for place, values in cells.items()}


def hog_of_patch(image: Tensor, position: int, patch: int, cell: int, bins: int, window: int = 0) -> Tensor:
    """Return all cells of one patch in raster order, or the cell that contains it if cells are larger than patches."""
    row, col = divmod(position, image.shape[1] // patch)
    found = hog(image, cell, bins, window)
    if cell > patch:
        return found[row * patch // cell, col * patch // cell]
    side = patch // cell
    return torch.cat([found[row * side + i, col * side + j] for i in range(side) for j in range(side)])
