"""The keys that MAE, MFF and LC-MAE share, and the checks that they fit together."""

import math
from typing import Literal

from pydantic import Field

from pretrain.methods.decoders import DecoderConfig
from pretrain.methods.masking import (
    Grid,
    check_cells,
    check_masked,
    check_random_masks,
    count_cell_masked,
    count_masked,
)
from pretrain.trainer.config import ModelConfig


def check_absolute(position: str, method: str) -> None:
    """Raises ValueError if the encoder's positions are not added to its tokens."""
    if position not in ("sincos", "learned"):
        raise ValueError(
            f"method {method} needs absolute positions, which model.position={position} does not provide: set "
            f"model.position=sincos or learned"
        )


class MAEConfig(DecoderConfig):
    """The masks of an image, and the decoder."""

    mask_type: Literal["random", "block", "grid", "cell"] = Field(
        "random", description="shape of the masked region; cell: squares of `mask_patch_size` pixels"
    )
    mask_patch_size: int = Field(32, ge=1, description="mask_type=cell: side in pixels of the squares that are masked")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is predicted")
    num_masks: int = Field(1, ge=1, description="masks per image, which is encoded and predicted under each")
    encoder_mask_tokens: bool = Field(False, description="mask tokens enter the encoder, not the decoder")
    decoder: Literal["transformer", "cross", "average", "conv"] = Field(
        "transformer",
        description="cross: CrossMAE's; average, conv: those of LC-MAE's Table 2, which ignore the keys `decoder_*`",
    )

    def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
        """Patches of an image, and how many are masked; of cells, ceil(cells * ratio), as in SimMIM."""
        patches = math.prod(grid)
        if self.mask_type == "cell":
            return patches, count_cell_masked(grid, self.mask_patch_size // patch_size, self.mask_ratio)
        return patches, count_masked(patches, self.mask_ratio)

    def check(self, grid: Grid, model: ModelConfig) -> None:
        check_absolute(model.position, self.name)
        if self.mask_type == "cell":
            check_cells(self.mask_patch_size, model.patch_size, grid)
        patches, masked = self.count_patches(grid, model.patch_size)
        check_masked(self.mask_ratio, masked, patches, "the image's")
        if self.mask_type == "grid" and (grid[0] % 2 or grid[1] % 2 or self.mask_ratio != 0.75):
            raise ValueError(
                f"method.mask_type=grid masks three patches of every 2x2: it needs method.mask_ratio=0.75 and an even "
                f"grid, not {self.mask_ratio} on {grid[0]}x{grid[1]}"
            )
        self.check_decoder(patches, masked)
        if self.encoder_mask_tokens and self.decoder != "transformer":
            raise ValueError(
                f"method.encoder_mask_tokens=true decodes encoded mask tokens, but method.decoder={self.decoder} uses "
                f"its own mask tokens: set method.decoder=transformer"
            )

    def check_pr_mim(self) -> None:
        super().check_pr_mim()
        if self.decoder not in ("transformer", "cross"):
            raise ValueError(
                f"pr_mim throws tokens of a transformer, which method.decoder={self.decoder} is not: leave pr_mim out"
            )

    def check_lut(self) -> None:
        check_random_masks(self.mask_type, ("random", "cell"))
        if self.num_masks > 1:
            raise ValueError(f"lut uses one mask for each view: set method.num_masks=1, not {self.num_masks}")
