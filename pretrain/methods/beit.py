"""BEiT (Bao et al.): predicts the codes that a frozen tokenizer gives to the masked patches.

All patches of the image enter the encoder, with mask tokens in place of the masked ones. A linear layer classifies the
outputs of the mask tokens over the vocabulary. LoMaR + BEiT (LoMaR, section 4.2) is `lomar` with codes as its target.

Shapes: B images, N patches of an image, M of them masked, V codes.
"""

import functools
import math
from typing import Literal

import numpy as np
from pydantic import Field

from pretrain.methods.base import MaskSampler, MethodConfig
from pretrain.methods.masking import Grid, block_masked, check_masked
from pretrain.methods.pr_mim import PRMIMConfig, build_mask_indices, sample_random_mask
from pretrain.methods.predictor import Predictor, PredictorMethod
from pretrain.methods.targets import PatchTarget, TokensConfig
from pretrain.models.vit import ViT
from pretrain.trainer.config import ModelConfig


def sample_masks(
    rng: np.random.Generator, *, grid: Grid, config: "BEiT.Config", pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """`visible` (N-M,), `masked` (M,) and its subset `kept` (K,): grid positions, ascending, int64."""
    _, count = config.count_patches(grid, 1)
    if config.mask_type == "random":
        return sample_random_mask(rng, grid=grid, count=count, pr_mim=pr_mim)
    return build_mask_indices(rng, block_masked(rng, grid, count), pr_mim, grid[1])


class BEiT(PredictorMethod):
    """Encoder on the image with mask tokens; linear head; by default cross-entropy on the masked patches' codes."""

    add_ons = frozenset({"pr_mim"})
    default_target = TokensConfig()

    class Config(MethodConfig):
        """BEiT's own keys; the tokenizer is part of `target`."""

        name: Literal["beit"] = "beit"
        mask_type: Literal["block", "random"] = Field("block", description="shape of the masked region")
        mask_ratio: float = Field(0.4, gt=0, lt=1, description="share of the image's patches that is predicted")

        def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
            """Patches of the image, N, and how many of them are masked: floor(N * ratio), M."""
            patches = math.prod(grid)
            return patches, int(patches * self.mask_ratio)

        def check(self, grid: Grid, model: ModelConfig) -> None:
            patches, masked = self.count_patches(grid, model.patch_size)
            check_masked(self.mask_ratio, masked, patches, "the image's")

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.config, self.encoder, self.target, self.pr_mim = config, encoder, target, pr_mim
        self.predictor = Predictor(encoder, encoder.grid, target.num_outputs, 0, pr_mim)

    def mask_sampler(self) -> MaskSampler:
        return functools.partial(sample_masks, grid=self.encoder.grid, config=self.config, pr_mim=self.pr_mim)
