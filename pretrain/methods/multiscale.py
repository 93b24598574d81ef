"""LocalMIM's predictor: small decoders behind several blocks of the encoder, each for its own cell size.

The encoder sees only the visible patches of an image or of a window. Shallow blocks predict fine cells, deep ones
coarse cells: each block's output goes through a norm and a decoder of its own. The targets are the histograms of
`targets/hog.py`. A masked patch has one vector for all sizes; a cell of 2 x 2 patches is in the vectors of all four.

Shapes: G sequences of L patches on a grid, V of them visible, M masked, K kept, D width, n directions of a histogram.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig, build_aggregation
from pretrain.methods.predictor import token_position
from pretrain.methods.targets import HOGConfig, PatchTarget, TargetConfig
from pretrain.methods.targets.hog import CellScale, HOGTarget, nearest_size
from pretrain.models.decoder import Decoder
from pretrain.models.patches import gather_tokens
from pretrain.models.vit import ARCHS, Arch, ViT, at_least_fp32, init_weights
from pretrain.trainer.config import ModelConfig


def check_blocks(blocks: Sequence[int], model: ModelConfig) -> None:
    """Raises ValueError unless these are ascending block numbers that end with the encoder's last block."""
    depth, last = ARCHS[model.arch].depth, max(blocks, default=0)
    if list(blocks) != sorted({*blocks}) or not blocks or blocks[0] < 1 or last != depth:
        # Moves the blocks like LocalMIM from ViT-B to L: the deeper half keeps its distance from the last block.
        moved = {max(block, 1) if 2 * block <= last else depth - last + block for block in blocks}
        like_these = [*sorted(block for block in moved if 0 < block < depth), depth]
        raise ValueError(
            f"method.blocks={list(blocks)} must ascend from at least 1 to {depth}, the last block of {model.arch}: "
            f"set, for example, method.blocks={like_these}"
        )


def check_cells(blocks: Sequence[int], target: TargetConfig, patch_size: int, whole_image: bool) -> None:
    """Raises ValueError unless a target has one cell size for each block, and all these sizes can be predicted."""
    halves = [patch_size >> power for power in range(3, -1, -1) if patch_size % (1 << power) == 0]
    fits = halves + [2 * patch_size] * whole_image
    if not isinstance(target, HOGConfig):
        raise ValueError(
            f"only histograms are predicted after several blocks, not target.name={target.name}: set target.name=hog "
            f"target.cell_sizes={fits[-len(blocks) :]}"
        )
    sizes = list(target.cell_sizes)
    if len(sizes) != len(blocks):
        raise ValueError(
            f"method.blocks={list(blocks)} and target.cell_sizes={sizes} differ in number: give one size for each block"
        )
    if not {*sizes} <= {*fits}:
        where = f"patches of {patch_size} pixels{'' if whole_image else ' in windows'}"
        # As in the papers: from fine to coarse, each twice the previous one.
        better = fits[-len(blocks) :] if len(blocks) <= len(fits) else [nearest_size(size, fits) for size in sizes]
        raise ValueError(
            f"target.cell_sizes={sizes} must each be one of {', '.join(map(str, fits))} for {where}: set "
            f"target.cell_sizes={better}"
        )


class MultiscalePredictor(nn.Module):
    """Predicts the histograms of the masked patches; called like `Predictor`.

    Args:
        encoder: determines width, patch size and kind of position.
        grid: rows and columns of a sequence: a window's, or the image's.
        target: determines the cell sizes.
        blocks: the block behind which each size is predicted; the last one is the encoder's last.
        arch: of each decoder.
        pr_mim: the add-on's settings; the decoders throw the same patches, and each computes its own tokens for them.
    """

    buckets: Tensor

    def __init__(
        self,
        encoder: ViT,
        grid: Grid,
        target: PatchTarget,
        blocks: Sequence[int],
        arch: Arch,
        pr_mim: PRMIMConfig | None,
    ):
        super().__init__()
        assert isinstance(target, HOGTarget), "`check_cells` refuses others"
        dim, values = encoder.arch.dim, target.channels * target.config.bins
        self.blocks = tuple(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in self.blocks[:-1])  # the last is the encoder's
        self.decoders = nn.ModuleList(
            CellDecoder(encoder, arch, grid, scale, values, build_aggregation(pr_mim, arch, grid))
            for scale in target.scales
        )
        self.register_buffer("buckets", encoder.grid_position(grid), persistent=False)

    def forward(
        self,
        encoder: ViT,
        patches: Tensor,
        visible: Tensor,
        masked: Tensor,
        kept: Tensor,
        positions: Tensor | None = None,
        num_predicted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        position = token_position(encoder, self.buckets, positions, visible)
        streams = encoder(encoder.patch_embed(patches), position, hidden=self.blocks)
        encoded, first = encoder.norm(streams[-1]), slice(num_predicted)
        inputs = [norm(stream[first]) for norm, stream in zip(self.norms, streams, strict=False)] + [encoded[first]]
        indices = visible[first], masked[first], kept[first]
        predictions = [decoder(x, *indices) for decoder, x in zip(self.decoders, inputs, strict=True)]
        return torch.cat(predictions, dim=-1), encoded[:, encoder.num_prefix_tokens :]


class CellDecoder(Decoder):
    """A decoder for the cells of one size, with `values` values each."""

    def __init__(
        self, encoder: ViT, arch: Arch, grid: Grid, scale: CellScale, values: int, aggregation: nn.Module | None
    ):
        prefix = encoder.num_prefix_tokens
        super().__init__(encoder.arch.dim, arch, grid, scale.num_outputs, aggregation, num_prefix_tokens=prefix)
        self.grid, self.coarse = grid, scale.coarse
        if scale.per_side > 1:
            self.pred = upsampling_head(arch.dim, scale.per_side, values)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        """Like `Decoder`, (G, M, num_outputs); a coarse cell is the mean over its 2 x 2 patches, visible ones too."""
        if not self.coarse:
            return super().forward(encoded, visible, masked, kept)
        if self.aggregation is None:
            order = torch.cat([visible, kept], dim=1).argsort(dim=1)  # to raster order
            of_patches = gather_tokens(super().forward(encoded, visible, None, kept), order)
        else:
            everywhere = torch.arange(self.grid[0] * self.grid[1], device=masked.device).expand(len(masked), -1)
            of_patches = super().forward(encoded, visible, everywhere, kept)
        cells = of_patches.unflatten(1, (-1, 2, self.grid[1] // 2, 2)).mean((2, 4), keepdim=True)
        # Expand to all patches, then gather the masked ones: gathering a cell twice would sum gradients in any order.
        return gather_tokens(cells.expand(-1, -1, 2, -1, 2, -1).flatten(1, 4), masked)


def upsampling_head(dim: int, per_side: int, values: int) -> nn.Sequential:
    """(..., D) tokens -> histograms of their per_side x per_side cells, in raster order: (..., per_side^2 * values)."""
    layers: list[nn.Module] = [nn.Unflatten(-1, (1, 1, dim))]
    while per_side > 1:
        layers += [Upsample(dim, dim // 2)]
        dim, per_side = dim // 2, per_side // 2
        if per_side > 1:
            layers += [nn.LayerNorm(dim, eps=1e-6), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(dim, values).apply(init_weights), nn.Flatten(-3))


class Upsample(nn.ConvTranspose2d):
    """A transposed convolution of kernel and stride 2, channels last: a matrix product on only the given patches."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim, kernel_size=2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(..., rows, columns, D) cells of each patch -> (..., 2 rows, 2 columns, out_dim), in fp32 for the norm.

        Under autocast, a CPU's norms would otherwise sum gradients in bf16; a GPU's do not.
        """
        assert self.bias is not None
        cells = F.linear(x, self.weight.permute(2, 3, 1, 0).flatten(0, 2), self.bias.repeat(4))
        return at_least_fp32(cells.unflatten(-1, (2, 2, -1)).transpose(-4, -3).flatten(-5, -4).flatten(-3, -2))
