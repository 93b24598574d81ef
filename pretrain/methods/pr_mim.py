"""PR-MIM, an add-on: decode only part of the masked tokens, and compute the others by one cheap convolution.

Of the masked tokens, the *kept* ones go through the transformer; the *thrown* ones do not. Afterwards a depth-wise
convolution over the grid computes each thrown token from its neighborhood, so that all masked patches are supervised
(section 3.2; `models/aggregation.py`). The kept tokens are drawn in the data workers (section 3.3).

Shapes: R images or windows of N patches, M of them masked, K kept.
"""

import functools
import itertools
from typing import Literal

import numpy as np
from pydantic import Field

from data.draw import integers, permutations
from pretrain.methods.masking import Grid, random_masked, split_positions
from pretrain.models.aggregation import AggregationKind, SpatialAggregation
from pretrain.models.vit import Arch
from pretrain.trainer.schema import Section


class PRMIMConfig(Section):
    """The add-on's keys."""

    throw_ratio: float = Field(0.5, gt=0, lt=1, description="share of all patches that is thrown, rho_d")
    sampling: Literal["furthest", "random"] = Field(
        "furthest", description="which masked patches are kept: those far apart, or random ones"
    )
    aggregation: AggregationKind = Field(
        "conv", description="how thrown tokens are computed; in the paper, training with average fails to converge"
    )
    kernel_size: Literal[3, 5, 7, 9, 11] = Field(
        7, description="side in patches of the aggregated neighborhood; not used by transformer"
    )

    def num_kept(self, patches: int, masked: int) -> int:
        """M - floor(N * rho_d), K; raises ValueError if nothing would be left to decode."""
        thrown = int(patches * self.throw_ratio)
        if masked - thrown < 1:
            raise ValueError(
                f"pr_mim.throw_ratio={self.throw_ratio} throws {thrown} of {patches} patches, but only {masked} "
                f"{'is' if masked == 1 else 'are'} masked: set it below {masked / patches:.2f}, or raise "
                f"method.mask_ratio"
            )
        return masked - thrown


@functools.lru_cache
def squared_distances(height: int, width: int) -> np.ndarray:
    """(N, N) between the positions of a grid, as integers, so that ties are equal on every machine; read-only."""
    rows, cols = np.divmod(np.arange(height * width), width)
    distances = np.subtract.outer(rows, rows) ** 2 + np.subtract.outer(cols, cols) ** 2
    # The narrowest signed type: a window's table is 2 KB, a row of it one vector register or two.
    distances = distances.astype(np.min_scalar_type(-int(distances.max()) - 1))
    distances.flags.writeable = False
    return distances


def furthest_point_sampling(rng: np.random.Generator, masked: np.ndarray, count: int, grid: Grid) -> np.ndarray:
    """Algorithm 1: the first token at random, then always the one furthest (Euclidean) from all kept so far.

    All rows are computed at once: the cost is in NumPy's calls, not in their arithmetic.

    Args:
        rng: draws the first token of each row.
        masked: (R, M) positions in the grid; of equally far ones, the first in the grid is taken.
        count: how many to keep in each row, K.
        grid: its rows and columns.

    Returns:
        (R, K) positions, ascending, int64.
    """
    distances, rows = squared_distances(*grid), np.arange(len(masked))
    kept = np.empty((count, len(masked)), dtype=np.int64)
    kept[0] = masked[rows, integers(rng, masked.shape[1], len(masked))]
    # Every grid position's distance to the nearest kept token; visible ones are below all others and stay so.
    nearest = np.full((len(masked), len(distances)), -1, dtype=distances.dtype)
    nearest[rows[:, None], masked] = np.iinfo(distances.dtype).max
    to_last = np.empty_like(nearest)
    for last, following in itertools.pairwise(kept):
        distances.take(last, axis=0, out=to_last, mode="clip")  # the other modes go through a buffer
        np.minimum(nearest, to_last, out=nearest)
        nearest.argmax(axis=1, out=following)
    return np.sort(kept.T, axis=1)


def build_mask_indices(
    rng: np.random.Generator,
    masked: np.ndarray,
    pr_mim: PRMIMConfig | None,
    width: int,
    num_predicted: int | None = None,
) -> dict[str, np.ndarray]:
    """The index arrays of a method.

    Args:
        rng: draws the predicted and the kept positions, if these are not all.
        masked: (R, N) bool, the same number in each row; or a single row (N,), whose arrays have no R either.
        pr_mim: settings; None keeps all masked positions.
        width: columns of the grid.
        num_predicted: how many masked positions of each row are predicted, chosen at random; None for all. The others
            are in none of the arrays.

    Returns:
        `visible` (R, V), `masked` (R, M) and its subset `kept` (R, K): positions, ascending, int64.
    """
    if masked.ndim == 1:
        indices = build_mask_indices(rng, masked[None], pr_mim, width, num_predicted)
        return {name: array[0] for name, array in indices.items()}
    visible, masked_positions = split_positions(masked)
    if num_predicted is not None:
        masked_positions = random_part(rng, masked_positions, num_predicted)
    kept = choose_kept(rng, masked_positions, pr_mim, masked.shape[1], width) if pr_mim else masked_positions
    return {"visible": visible, "masked": masked_positions, "kept": kept}


def sample_random_mask(
    rng: np.random.Generator, *, grid: Grid, count: int, pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """A mask sampler: masks `count` patches of an image uniformly. Arrays as from `build_mask_indices`, without R."""
    return build_mask_indices(rng, random_masked(rng, 1, grid[0] * grid[1], count)[0], pr_mim, grid[1])


def choose_kept(
    rng: np.random.Generator, masked: np.ndarray, pr_mim: PRMIMConfig, patches: int, width: int
) -> np.ndarray:
    """Chooses which masked positions of each row are kept: (R, M) -> (R, K), ascending."""
    count = pr_mim.num_kept(patches, masked.shape[1])
    if pr_mim.sampling == "furthest":
        return furthest_point_sampling(rng, masked, count, (patches // width, width))
    return random_part(rng, masked, count)


def random_part(rng: np.random.Generator, positions: np.ndarray, count: int) -> np.ndarray:
    """`count` random positions of each row: (R, M) -> (R, count), ascending."""
    chosen = permutations(rng, *positions.shape)[:, :count]
    return np.sort(np.take_along_axis(positions, chosen, axis=1), axis=1)


def build_aggregation(pr_mim: PRMIMConfig | None, arch: Arch, grid: Grid) -> SpatialAggregation | None:
    """The module that computes the thrown tokens of a transformer `arch` on a grid, if any are thrown."""
    return SpatialAggregation(pr_mim.aggregation, arch, grid, pr_mim.kernel_size) if pr_mim else None
