"""LocalMIM (Wang et al., section 3): predicts histograms of oriented gradients (HOG) behind several encoder blocks.

The encoder sees only visible patches. Fine cells are predicted behind shallow blocks, coarse cells behind deep ones.

A coarse cell of 2 x 2 patches is weighted by the share of them that is masked. Here this follows from averaging, over
the masked patches, the error of each one's cell, so a patch's target is a single vector, as for any other target.

Shapes: B images, N patches of an image, M of them masked, V visible, D width.
"""

import functools
import math
from typing import Literal

from pydantic import Field

from pretrain.methods.base import MaskSampler, MethodConfig
from pretrain.methods.masking import Grid, check_masked, count_masked
from pretrain.methods.multiscale import MultiscalePredictor, check_blocks, check_cells
from pretrain.methods.pr_mim import PRMIMConfig, sample_random_mask
from pretrain.methods.predictor import PredictorMethod
from pretrain.methods.targets import HOGConfig, PatchTarget, TargetConfig
from pretrain.models.decoder import check_heads
from pretrain.models.vit import Arch, ViT
from pretrain.trainer.config import ModelConfig


class LocalMIM(PredictorMethod):
    """MAE's masks and encoder, with a small decoder behind each of several blocks."""

    add_ons = frozenset({"pr_mim", "lut"})
    targets = frozenset({"hog"})
    default_target = HOGConfig(cell_sizes=(4, 8, 16, 32))

    class Config(MethodConfig):
        """LocalMIM's own keys; the cell sizes, one for each of `blocks`, are set in `target`."""

        name: Literal["local_mim"] = "local_mim"
        mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is predicted")
        blocks: tuple[int, ...] = Field(
            (2, 4, 10, 12),
            description="blocks after which target.cell_sizes are predicted, one size each; 1 is the first",
        )
        decoder_embed_dim: int = Field(256, ge=8, multiple_of=8, description="width of each decoder")
        decoder_depth: int = Field(1, ge=1, description="blocks of each decoder")
        decoder_num_heads: int = Field(8, ge=1, description="heads of the decoders' attention")

        def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
            return math.prod(grid), count_masked(math.prod(grid), self.mask_ratio)

        def check(self, grid: Grid, model: ModelConfig) -> None:
            patches, masked = self.count_patches(grid, model.patch_size)
            check_masked(self.mask_ratio, masked, patches, "the image's")
            check_blocks(self.blocks, model)
            check_heads(self.decoder_embed_dim, self.decoder_num_heads)

        def check_target(self, target: TargetConfig, patch_size: int) -> None:
            check_cells(self.blocks, target, patch_size, whole_image=True)

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.config, self.encoder, self.target, self.pr_mim = config, encoder, target, pr_mim
        self.mask_grid = encoder.grid
        arch = Arch(config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads)
        self.predictor = MultiscalePredictor(encoder, encoder.grid, target, config.blocks, arch, pr_mim)

    def mask_sampler(self) -> MaskSampler:
        grid = self.encoder.grid
        _, count = self.config.count_patches(grid, self.encoder.patch_size)
        return functools.partial(sample_random_mask, grid=grid, count=count, pr_mim=self.pr_mim)
