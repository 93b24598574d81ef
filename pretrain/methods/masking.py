"""Which patches are predicted: pure NumPy, drawn in the data workers.

`masked == True` means predicted, everywhere.
"""

import numpy as np


def random_masked(rng: np.random.Generator, rows: int, length: int, count: int) -> np.ndarray:
    """`count` of `length` positions masked in each row, uniformly.

    Returns:
        (rows, length) bool.
    """
    order = rng.random((rows, length)).argsort(axis=1)
    masked = np.zeros((rows, length), dtype=bool)
    np.put_along_axis(masked, order[:, :count], True, axis=1)
    return masked


def random_windows(rng: np.random.Generator, count: int, size: int, grid: tuple[int, int]) -> np.ndarray:
    """`count` distinct square windows of a grid, uniformly.

    Returns:
        (count, size*size) int64: the grid positions of each window's patches, both in raster order.
    """
    height, width = grid
    places = (height - size + 1, width - size + 1)
    top, left = np.unravel_index(rng.choice(places[0] * places[1], count, replace=False), places)
    inside = np.arange(size)[:, None] * width + np.arange(size)
    return (top * width + left)[:, None] + inside.reshape(1, -1)


def positions(masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The visible and the masked positions of each row, ascending; every row masks the same number.

    Returns:
        visible (rows, V) and masked (rows, M), int64.
    """
    rows = len(masked)
    return (~masked).nonzero()[1].reshape(rows, -1), masked.nonzero()[1].reshape(rows, -1)
