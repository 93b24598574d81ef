"""PR-MIM: reconstruct only part of the masked tokens, and fill in the others by one cheap convolution (an add-on).

Of the masked tokens, the *kept* ones go through the transformer; the *thrown* ones do not. Afterwards a depth-wise
convolution over the grid makes each thrown token out of its neighbours, so that all masked patches are supervised
(section 3.2). Which tokens are kept is drawn in the data workers (section 3.3).

Shapes: R rows (images or windows) of N patches, M of them masked, K kept, T = N - M + K in the transformer, D width.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.masking import Grid, positions
from pretrain.schema import Section


class Partial(Section):
    """The add-on's keys."""

    throw: float = Field(0.5, gt=0, lt=1, description="share of all patches that is thrown, rho_d")
    sampling: Literal["furthest", "random"] = "furthest"
    kernel: Literal[3, 5, 7, 9, 11] = Field(7, description="side of the convolution in patches")

    def num_kept(self, patches: int, masked: int) -> int:
        """M - floor(N * rho_d), K; raises ValueError where nothing would be left to decode."""
        kept = masked - int(patches * self.throw)
        if kept < 1:
            raise ValueError(
                f"partial.throw={self.throw} throws {int(patches * self.throw)} of {patches} patches, and {masked} are "
                f"masked: set it below {masked / patches:.2f}, or method.mask_ratio higher"
            )
        return kept


def furthest(rng: np.random.Generator, masked: np.ndarray, count: int, width: int) -> np.ndarray:
    """Algorithm 1: the first token at random, then always the one furthest (Euclidean) from those already kept.

    Args:
        rng: of the first token.
        masked: (M,) grid positions.
        count: how many to keep, K.
        width: columns of the grid.

    Returns:
        (K,) positions, ascending.
    """
    points = np.stack(np.divmod(masked, width), axis=1)
    chosen = [int(rng.integers(len(masked)))]
    # Squared distances to the nearest kept token: integers, so that ties are ties on every machine.
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(count - 1):
        chosen.append(int(nearest.argmax()))
        np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1), out=nearest)
    return np.sort(masked[chosen])


def describe(
    rng: np.random.Generator, masked: np.ndarray, partial: Partial | None, width: int
) -> dict[str, np.ndarray]:
    """The indices that a method works with.

    Args:
        rng: of the choice of kept ones, if any are thrown.
        masked: (R, N) bool, the same number in each row.
        partial: throws some of them.
        width: columns of the grid.

    Returns:
        `visible` (R, V), `masked` (R, M) and of those `kept` (R, K): positions, ascending, int64.
    """
    visible, hidden = positions(masked)
    kept = choose_kept(rng, hidden, partial, masked.shape[1], width) if partial else hidden
    return {"visible": visible, "masked": hidden, "kept": kept}


def choose_kept(rng: np.random.Generator, masked: np.ndarray, partial: Partial, patches: int, width: int) -> np.ndarray:
    """The kept ones of each row of masked positions: (R, M) -> (R, K), ascending."""
    count = partial.num_kept(patches, masked.shape[1])
    if partial.sampling == "furthest":
        return np.stack([furthest(rng, row, count, width) for row in masked])
    return np.sort(rng.permuted(masked, axis=1)[:, :count], axis=1)


class Fill(nn.Module):
    """The spatial aggregation: a depth-wise convolution makes the thrown tokens; all others stay as they are."""

    def __init__(self, dim: int, grid: Grid, kernel: int):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, tokens: Tensor, placed: Tensor, masked: Tensor) -> Tensor:
        """What stands at the masked places, (R, M, D).

        Args:
            tokens: (R, T, D) from the transformer.
            placed: (R, T) their places.
            masked: (R, M) the places to predict.
        """
        R, _, D = tokens.shape
        height, width = self.grid
        index = placed.unsqueeze(-1).expand_as(tokens)
        known = tokens.new_zeros(R, height * width, D).scatter(1, index, tokens)
        filled = self.conv(known.transpose(1, 2).reshape(R, D, height, width)).flatten(2).transpose(1, 2)
        present = torch.zeros_like(known[..., :1], dtype=torch.bool).scatter(1, placed.unsqueeze(-1), True)
        return torch.where(present, known, filled).gather(1, masked.unsqueeze(-1).expand(-1, -1, D))
