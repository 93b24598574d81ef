"""PR-MIM's spatial aggregation: computes the thrown tokens from those that went through the transformer (Table 12).

Thrown tokens start at zero. Each module gets the whole grid; its output is used at the thrown positions only.

Shapes: R sequences (images or windows) of N patches on a grid, T of them with a token, M to predict, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.models.vit import Arch, Block, sincos_positions

Grid = tuple[int, int]
AggregationKind = Literal["conv", "average", "transformer", "convnext"]


class SpatialAggregation(nn.Module):
    """Computes the thrown tokens; all others stay unchanged.

    Args:
        kind: how to compute them.
        arch: width and heads of the transformer from which the tokens come.
        grid: rows and columns.
        kernel_size: side of the neighborhood in patches; not used by `transformer`.
    """

    def __init__(self, kind: AggregationKind, arch: Arch, grid: Grid, kernel_size: int):
        super().__init__()
        self.num_patches = grid[0] * grid[1]
        if kind == "transformer":
            self.aggregate: nn.Module = TransformerAggregation(arch, grid)
        elif kind == "average":
            self.aggregate = AverageAggregation(grid, kernel_size)
        else:
            self.aggregate = {"conv": ConvAggregation, "convnext": ConvNeXtAggregation}[kind](
                arch.dim, grid, kernel_size
            )

    def forward(self, tokens: Tensor, positions: Tensor, masked: Tensor) -> Tensor:
        """The tokens at the masked positions, (R, M, D).

        Args:
            tokens: (R, T, D) from the transformer.
            positions: (R, T) their positions.
            masked: (R, M) the positions to predict.
        """
        R, _, D = tokens.shape
        scattered = tokens.new_zeros(R, self.num_patches, D).scatter(
            1, positions.unsqueeze(-1).expand_as(tokens), tokens
        )
        present = torch.zeros_like(scattered[..., :1], dtype=torch.bool).scatter(1, positions.unsqueeze(-1), True)
        filled = torch.where(present, scattered, self.aggregate(scattered, present))
        return filled.gather(1, masked.unsqueeze(-1).expand(-1, -1, D))


class ConvAggregation(nn.Module):
    """The paper's choice: one depth-wise convolution.

    The arguments, here and in the classes below, are the tokens on the grid, (R, N, D) with zeros for the thrown ones,
    and a mask of the positions with a token, (R, N, 1).
    """

    def __init__(self, dim: int, grid: Grid, kernel_size: int):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        return as_tokens(self.conv(as_image(tokens, self.grid)))


class AverageAggregation(nn.Module):
    """The mean of the tokens in the neighborhood; zero if there are none."""

    def __init__(self, grid: Grid, kernel_size: int):
        super().__init__()
        self.grid, self.kernel_size = grid, kernel_size

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        total, share = self._pool(tokens), self._pool(present.to(tokens.dtype))  # both divided by the kernel's area
        return total / share.clamp(min=self.kernel_size**-2)

    def _pool(self, tokens: Tensor) -> Tensor:
        return as_tokens(F.avg_pool2d(as_image(tokens, self.grid), self.kernel_size, 1, self.kernel_size // 2))


class TransformerAggregation(nn.Module):
    """One block over the whole grid. Fixed positions are added: without them all thrown tokens would be equal."""

    pos_embed: Tensor

    def __init__(self, arch: Arch, grid: Grid):
        super().__init__()
        self.grid = grid
        self.block = Block(arch, relative=False)
        self.register_buffer("pos_embed", sincos_positions(arch.dim, *grid), persistent=False)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        return self.block(tokens + self.pos_embed, None)


class ConvNeXtAggregation(ConvAggregation):
    """A ConvNeXt block, MLP(norm(depth-wise convolution(x))); a residual would only add the thrown tokens' zeros."""

    def __init__(self, dim: int, grid: Grid, kernel_size: int):
        super().__init__(dim, grid, kernel_size)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        return self.mlp(self.norm(super().forward(tokens, present)))


def as_image(tokens: Tensor, grid: Grid) -> Tensor:
    """(R, N, D) in raster order -> (R, D, height, width)."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)


def as_tokens(image: Tensor) -> Tensor:
    """The inverse of `as_image`."""
    return image.flatten(2).transpose(1, 2)
