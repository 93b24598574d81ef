"""SimMIM (Xie et al.): all patches enter the encoder, mask tokens replacing the masked ones; a linear head; L1.

Shapes: B images, N patches of an image, M of them masked, V visible, D width, P = p*p*3.
"""

import functools
import math
from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.methods.base import MaskSampler, MethodConfig
from pretrain.methods.masking import Grid, cell_masked, check_cells, count_cell_masked
from pretrain.methods.pr_mim import PRMIMConfig, build_mask_indices
from pretrain.methods.predictor import Predictor, PredictorMethod
from pretrain.methods.targets import PatchTarget, PixelsConfig
from pretrain.models.vit import ViT
from pretrain.trainer.config import ModelConfig


def sample_masks(
    rng: np.random.Generator, *, grid: Grid, cell: int, ratio: float, pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """`visible` (V,), `masked` (M,) and its subset `kept` (K,): grid positions, ascending, int64."""
    return build_mask_indices(rng, cell_masked(rng, grid, cell, ratio), pr_mim, grid[1])


class SimMIM(PredictorMethod):
    """Encoder on everything, linear head, by default L1 on the masked patches' pixels without normalization."""

    add_ons = frozenset({"pr_mim", "lut"})
    default_target = PixelsConfig(norm_pix=False, loss="l1")

    class Config(MethodConfig):
        """SimMIM's own keys."""

        name: Literal["simmim"] = "simmim"
        mask_patch_size: int = Field(32, ge=1, description="side in pixels of the squares that are masked")
        mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of the squares that is predicted")

        def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
            """Patches of an image, and those in ceil(squares * ratio) squares."""
            return math.prod(grid), count_cell_masked(grid, self.mask_patch_size // patch_size, self.mask_ratio)

        def check(self, grid: Grid, model: ModelConfig) -> None:
            check_cells(self.mask_patch_size, model.patch_size, grid)
            patches, masked = self.count_patches(grid, model.patch_size)
            if masked >= patches:
                raise ValueError(f"method.mask_ratio={self.mask_ratio} leaves no patch visible: lower it")

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.config, self.encoder, self.target, self.pr_mim = config, encoder, target, pr_mim
        self.mask_grid, self.mask_cell = encoder.grid, config.mask_patch_size // encoder.patch_size
        self.predictor = Predictor(encoder, encoder.grid, target.num_outputs, 0, pr_mim)

    def mask_sampler(self) -> MaskSampler:
        ratio = self.config.mask_ratio
        return functools.partial(
            sample_masks, grid=self.mask_grid, cell=self.mask_cell, ratio=ratio, pr_mim=self.pr_mim
        )
