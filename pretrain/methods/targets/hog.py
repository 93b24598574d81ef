"""Histograms of oriented gradients (HOG), MaskFeat's and LocalMIM's target: the strength of edges by direction.

A cell has a histogram for each color channel, over unsigned directions, divided by its L2 norm. So neither brightness
nor contrast is predicted, and a cell without edges has the zero vector. Several cell sizes are all predicted and their
errors summed, as in LocalMIM.

Channels are red, green and blue, or whatever images have. Gradients are differences of integer pixels, which fp32 holds
exactly: bins do not depend on the device. Image statistics, which the authors' code applies first, cancel out: a
channel's direction and normalized histogram do not depend on its scale.

Shapes: B images of R x S cells, C channels, N patches, M of them predicted, n bins.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from data.pixel_format import RGB
from pretrain.methods.masking import Grid
from pretrain.methods.targets.base import PatchTarget, TargetConfig
from pretrain.models.patches import unpatchify
from pretrain.trainer.config import ModelConfig

# Limits the memory for n maps of each channel: 27 x 224 x 224 in fp32 are 5.4 MB an image. A few images stay in a CPU's
# caches, which halves the time; a GPU takes 32.
_IMAGES_AT_ONCE = {"cpu": 4}


class HOGConfig(TargetConfig):
    """The keys of `target.name=hog`."""

    name: Literal["hog"] = "hog"
    cell_sizes: tuple[int, ...] = Field(
        (8,), min_length=1, description="sides of the cells in pixels; each divides the patch size or is twice it"
    )
    bins: int = Field(9, ge=1, description="directions of a histogram; each color channel has its own")
    gaussian_window: int = Field(
        0, ge=0, description="side in pixels of Gaussian weights, repeated over the image; MaskFeat: 16; 0: none"
    )

    def check(self, grid: Grid, model: ModelConfig) -> None:
        patch_size = model.patch_size
        for size in self.cell_sizes:
            if size < 1 or (patch_size % size and size != 2 * patch_size):
                fits = [cell for cell in range(1, patch_size + 1) if patch_size % cell == 0] + [2 * patch_size]
                nearest = [nearest_size(cell, fits) for cell in self.cell_sizes]
                raise ValueError(
                    f"target.cell_sizes has {size}, which neither divides model.patch_size={patch_size} nor is twice "
                    f"it: set target.cell_sizes={nearest}"
                )
            if size > patch_size and (grid[0] % 2 or grid[1] % 2):
                raise ValueError(
                    f"target.cell_sizes has {size}, cells of 2x2 patches, but the grid of {grid[0]}x{grid[1]} patches "
                    f"has an odd side: leave {size} out, or set data.image_size to a multiple of {size}"
                )


def nearest_size(size: int, fits: Sequence[int]) -> int:
    """The element of `fits` whose ratio to `size` is nearest to one."""
    return min(fits, key=lambda fit: max(fit / max(size, 1), size / fit))


class CellScale(NamedTuple):
    """How cells of one size lie in patches.

    Attributes:
        size: side of a cell in pixels.
        per_side: cells along the side of a patch; also 1 if a cell is 2 x 2 patches.
        coarse: whether a cell is 2 x 2 patches, each of which has the whole cell's histogram.
        num_outputs: values of this size for each patch.
    """

    size: int
    per_side: int
    coarse: bool
    num_outputs: int


class HOGTarget(PatchTarget):
    """The histograms of a patch's cells: by cell size, then in raster order, by color, by direction."""

    caption = (
        "The edges in each cell (HOG) are drawn as lines in their directions, for each color: pixels are not predicted."
    )

    def __init__(self, config: HOGConfig, grid: Grid, patch_size: int, channels: int = RGB.channels):
        self.config, self.grid, self.patch_size, self.channels = config, grid, patch_size, channels
        self.scales = [_cell_scale(size, patch_size, channels * config.bins) for size in config.cell_sizes]
        self.num_outputs = sum(scale.num_outputs for scale in self.scales)

    @torch.no_grad()
    def ground_truth(self, images: Tensor, patches: Tensor) -> Tensor:
        """(B, N, num_outputs) fp32"""
        with torch.autocast(images.device.type, enabled=False):
            parts = images.split(_IMAGES_AT_ONCE.get(images.device.type, 32))
            return torch.cat([self._histograms(part) for part in parts])

    def _histograms(self, images: Tensor) -> Tensor:
        finest = math.gcd(*self.config.cell_sizes)  # pooled to all others: the norm comes after
        cells = histograms(images, finest, self.config.bins, self.config.gaussian_window)
        by_size = []
        for scale in self.scales:
            pooled = cells.unflatten(2, (-1, scale.size // finest)).unflatten(1, (-1, scale.size // finest))
            normalized = F.normalize(pooled.mean((2, 4)), dim=-1, eps=1e-12)  # (B, R, S, C, n)
            if scale.coarse:
                normalized = normalized.repeat_interleave(2, 1).repeat_interleave(2, 2)
            of_patches = normalized.unflatten(2, (-1, scale.per_side)).unflatten(1, (-1, scale.per_side))
            by_size.append(of_patches.transpose(2, 3).flatten(3).flatten(1, 2))
        return torch.cat(by_size, dim=-1)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """The mean squared error, summed over the cell sizes.

        A coarse cell's error counts for each of its masked patches, so cells have the weight that LocalMIM gives them:
        the share of their patches that is masked.
        """
        return self._losses_by_size(prediction, truth).sum()

    def losses(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """As for any target; with several cell sizes, each one's error is logged, for example as `loss_cell_8`."""
        by_size = self._losses_by_size(prediction, truth)
        sizes = self.config.cell_sizes
        names = [
            f"loss_cell_{size}{f'_{sizes[:number].count(size) + 1}' if sizes.count(size) > 1 else ''}"
            for number, size in enumerate(sizes)
        ]
        terms = zip(names, by_size.detach().unbind(), strict=True) if len(sizes) > 1 else ()
        return {"loss": by_size.sum(), **dict(terms)}

    def _losses_by_size(self, prediction: Tensor, truth: Tensor) -> Tensor:
        error = (prediction.float() - truth).square()
        sizes = [scale.num_outputs for scale in self.scales]
        return torch.stack([part.mean() for part in error.split(sizes, dim=-1)])

    def render(self, prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """A line for every direction in each cell of the first size, in its color, with its strength as brightness."""
        return {"edges": self._draw(truth), "predicted edges": self._draw(prediction.float())}

    def _draw(self, histogram: Tensor) -> Tensor:
        """(B, M, num_outputs) -> (B, M, p*p*3) uint8: of the first three channels, or the first in gray."""
        scale, side = self.scales[0], self.patch_size // self.scales[0].per_side
        cells = histogram[..., : scale.num_outputs].unflatten(-1, (scale.per_side**2, self.channels, -1))
        shown = cells[..., : 3 if self.channels > 2 else 1, :].expand(*cells.shape[:-2], 3, -1).clamp(0, 1)
        lines = _lines(side, self.config.bins).to(histogram)
        drawn = torch.einsum("bmkcn,nyx->bmkyxc", shown, lines).clamp(max=1).mul(255).round().byte()
        pixels = unpatchify(drawn.flatten(3).flatten(0, 1), (scale.per_side, scale.per_side))
        return pixels.reshape(*histogram.shape[:2], -1)


def histograms(images: Tensor, cell: int, bins: int, gaussian_window: int = 0) -> Tensor:
    """The mean magnitude of a cell's gradients in each direction, not normalized; hard bins.

    Args:
        images: (B, H, W, C).
        cell: side in pixels, which divides H and W.
        bins: number of directions, over half a turn.
        gaussian_window: side of the square over which magnitudes have Gaussian weights, repeated over the image.

    Returns:
        (B, H/cell, W/cell, C, bins) fp32.
    """
    padded = F.pad(images.permute(0, 3, 1, 2).contiguous().float(), (1, 1, 1, 1), mode="reflect")
    along_x, along_y = padded[..., :-2] - padded[..., 2:], padded[..., :-2, :] - padded[..., 2:, :]
    gx = along_x[..., :-2, :] + 2 * along_x[..., 1:-1, :] + along_x[..., 2:, :]  # Sobel's filters
    gy = along_y[..., :-2] + 2 * along_y[..., 1:-1] + along_y[..., 2:]
    magnitude = (gx.square() + gy.square()).sqrt()
    if gaussian_window:
        magnitude = magnitude * _gaussian(gaussian_window, *magnitude.shape[-2:]).to(magnitude)
    turn = torch.atan2(gx, gy) / math.pi * bins
    direction = (turn + 1e-5).floor().long() % bins  # 45 degrees may be an edge of bins, whatever fp32 rounds it to
    channels = images.shape[-1]
    maps = magnitude.new_zeros(len(images), channels, bins, *magnitude.shape[-2:])
    maps.scatter_(2, direction.unsqueeze(2), magnitude.unsqueeze(2))
    pooled = F.avg_pool2d(maps.flatten(1, 2), cell).unflatten(1, (channels, bins))
    return pooled.permute(0, 3, 4, 1, 2)


def _cell_scale(size: int, patch_size: int, values: int) -> CellScale:
    per_side = max(patch_size // size, 1)
    return CellScale(size, per_side, size > patch_size, per_side**2 * values)


def _gaussian(window: int, height: int, width: int) -> Tensor:
    """(H, W) weights of standard deviation window / 2 around the center of each square, as in MaskFeat's code."""
    offsets = torch.arange(max(height, width)) % window - (window - 1) / 2
    weights = torch.exp(-0.5 * (offsets / (window / 2)) ** 2)
    return weights[:height, None] * weights[:width]


def _lines(side: int, bins: int) -> Tensor:
    """(bins, side, side): for each direction, a line one pixel wide through the center of a cell, along the edge.

    Directions are those of atan2(gx, gy), and an edge is perpendicular to its gradient.
    """
    angles = (torch.arange(bins)[:, None, None] + 0.5) / bins * math.pi
    offsets = torch.arange(side) - (side - 1) / 2
    distance = (offsets * angles.sin() + offsets[:, None] * angles.cos()).abs()
    return (1 - distance).clamp(min=0)
