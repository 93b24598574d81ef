"""Random masks and windows: pure NumPy, drawn in the data workers from raw words (`data/draw.py`).

`masked` arrays are true at patches to predict. Grids are (rows, columns) of patches.
"""

import math

import numpy as np

from data.draw import choice, integer, permutation, permutations, uniform

Grid = tuple[int, int]


def random_masked(rng: np.random.Generator, rows: int, length: int, count: int) -> np.ndarray:
    """Masks `count` of `length` positions in each row, uniformly.

    Returns:
        (rows, length) bool.
    """
    order = permutations(rng, rows, length)
    masked = np.zeros((rows, length), dtype=bool)
    np.put_along_axis(masked, order[:, :count], True, axis=1)
    return masked


def count_masked(patches: int, ratio: float) -> int:
    """How many of N patches MAE's authors mask: N - floor(N * (1 - ratio))."""
    return patches - int(patches * (1 - ratio))


def block_masked(rng: np.random.Generator, grid: Grid, count: int) -> np.ndarray:
    """BEiT's blocks: rectangles of at least 16 patches and an aspect ratio of 0.3 to 1/0.3, until `count` are masked.

    The last block is thinned at random to hit `count` exactly, so that every image masks the same number.

    Returns:
        (N,) bool in raster order.
    """
    height, width = grid
    masked = np.zeros(grid, dtype=bool)
    while (missing := count - int(masked.sum())) > 0:
        area = uniform(rng, min(16, missing), missing) if missing > 1 else 1.0
        aspect = math.exp(uniform(rng, math.log(0.3), -math.log(0.3)))
        h = min(max(round(math.sqrt(area * aspect)), 1), height)
        w = min(max(round(math.sqrt(area / aspect)), 1), width)
        top, left = integer(rng, height - h + 1), integer(rng, width - w + 1)
        block = masked[top : top + h, left : left + w]
        new = np.argwhere(~block)
        if len(new) > missing:
            new = new[choice(rng, len(new), missing)]
        block[new[:, 0], new[:, 1]] = True
    return masked.reshape(-1)


def grid_masked(rng: np.random.Generator, grid: Grid, count: int) -> np.ndarray:
    """MAE's regular grid: of every 2 x 2 patches, the top left one is visible and three are predicted.

    Returns:
        (N,) bool in raster order.
    """
    masked = np.ones(grid, dtype=bool)
    masked[::2, ::2] = False
    assert masked.sum() == count, "a grid masks three quarters"
    return masked.reshape(-1)


def cell_masked(rng: np.random.Generator, grid: Grid, cell: int, ratio: float) -> np.ndarray:
    """SimMIM's cells of `cell` x `cell` patches: ceil(cells * ratio) of them masked, uniformly.

    Returns:
        (N,) bool in raster order.
    """
    rows, cols = grid[0] // cell, grid[1] // cell
    cells = random_masked(rng, 1, rows * cols, count_cell_masked(grid, cell, ratio) // cell**2).reshape(rows, cols)
    return cells.repeat(cell, axis=0).repeat(cell, axis=1).reshape(-1)


def count_cell_masked(grid: Grid, cell: int, ratio: float) -> int:
    """How many patches `cell_masked` masks."""
    return math.ceil(math.prod(grid) // cell**2 * ratio) * cell**2


def complementary_masked(rng: np.random.Generator, rows: int, length: int, count: int) -> np.ndarray:
    """Masks of one window that show different patches: `count` of `length` positions are masked in each of `rows`.

    The rows show consecutive slices of one permutation, which starts over when it is used up. So no patch is shown
    twice before every patch has been shown once.

    Returns:
        (rows, length) bool.
    """
    order, visible = permutation(rng, length), length - count
    shown = order[np.arange(rows * visible) % length].reshape(rows, visible)
    masked = np.ones((rows, length), dtype=bool)
    np.put_along_axis(masked, shown, False, axis=1)
    return masked


def random_windows(rng: np.random.Generator, count: int, size: int, grid: Grid) -> np.ndarray:
    """`count` distinct square windows of a grid, uniformly.

    Returns:
        (count, size*size) int64: the grid positions of each window's patches, in raster order.
    """
    height, width = grid
    corners = (height - size + 1, width - size + 1)  # possible rows and columns of a window's first patch
    top, left = np.unravel_index(choice(rng, corners[0] * corners[1], count), corners)
    inside = np.arange(size)[:, None] * width + np.arange(size)
    return (top * width + left)[:, None] + inside.reshape(1, -1)


def split_positions(masked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The visible and the masked positions of each row, ascending; every row masks the same number.

    Returns:
        visible (rows, V) and masked (rows, M), int64.
    """
    rows = len(masked)
    return (~masked).nonzero()[1].reshape(rows, -1), masked.nonzero()[1].reshape(rows, -1)


def count_places(size: int, grid: Grid) -> int:
    """In how many places of a grid a window of `size` x `size` patches fits."""
    return max(grid[0] - size + 1, 0) * max(grid[1] - size + 1, 0)


def check_windows(count: int, size: int, grid: Grid) -> None:
    """Raises ValueError if a grid cannot hold `count` distinct windows of `size` x `size` patches."""
    if size > min(grid):
        raise ValueError(
            f"method.window_size={size} is larger than the image's grid of {grid[0]}x{grid[1]} patches: "
            f"set method.window_size to at most {min(grid)}, or raise data.image_size"
        )
    num_corners = count_places(size, grid)
    if count > num_corners:
        raise ValueError(
            f"method.num_windows={count}, but a window of {size}x{size} patches fits in only "
            f"{num_corners} places on a grid of {grid[0]}x{grid[1]}: set method.num_windows to at most {num_corners}"
        )


def check_cells(mask_patch_size: int, patch_size: int, grid: Grid) -> None:
    """Raises ValueError unless squares of `mask_patch_size` pixels are whole patches and tile the image."""
    side = mask_patch_size // patch_size
    if mask_patch_size % patch_size or not side or grid[0] % side or grid[1] % side:
        height, width = grid[0] * patch_size, grid[1] * patch_size
        divisors = [n for n in range(1, min(grid) + 1) if not (grid[0] % n or grid[1] % n)]
        nearest = min((n * patch_size for n in divisors), key=lambda size: abs(size - mask_patch_size))
        raise ValueError(
            f"method.mask_patch_size={mask_patch_size} must be a multiple of model.patch_size={patch_size} that "
            f"divides the image of {height}x{width} pixels: set method.mask_patch_size={nearest}"
        )


def check_masked(ratio: float, masked: int, patches: int, owner: str) -> None:
    """Raises ValueError if a ratio masks none or all patches of a window or an image."""
    if not 0 < masked < patches:
        raise ValueError(
            f"method.mask_ratio={ratio} masks {masked} of {owner} {patches} patches: "
            f"at least one must be masked and one visible"
        )


def check_random_masks(mask_type: str, drawable: tuple[str, ...] = ("random",)) -> None:
    """Raises ValueError if LUT cannot draw two disjoint masks of this type."""
    if mask_type not in drawable:
        raise ValueError(
            f"lut draws random masks whose visible patches are disjoint: set method.mask_type=random, not {mask_type}"
        )
