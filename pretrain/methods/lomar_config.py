"""LoMaR's keys, and the checks that they fit together."""

import math
from typing import Literal

from pydantic import Field

from pretrain.methods.base import MethodConfig
from pretrain.methods.decoders import DecoderConfig
from pretrain.methods.masking import Grid, check_masked, check_random_masks, check_windows, count_places
from pretrain.methods.multiscale import check_blocks, check_cells
from pretrain.methods.predictor import check_mask_token_block
from pretrain.methods.targets import TargetConfig
from pretrain.models.vit import ARCHS
from pretrain.trainer.config import ModelConfig


class LoMaRConfig(DecoderConfig):
    """Windows and their masks, where mask tokens enter, and the decoder."""

    num_windows: int = Field(4, ge=1, description="windows per image, W: 4 at 224, 6 at 384, 9 at 448")
    window_size: int = Field(7, ge=2, description="side of a window in patches, K")
    window_sampling: Literal["distinct", "same", "complementary"] = Field(
        "distinct",
        description="distinct: W windows; same: one window under W independent masks; complementary: under masks that "
        "show different patches",
    )
    mask_type: Literal["random", "block"] = Field("random", description="block: BEiT's masks, in each window")
    mask_ratio: float = Field(0.8, gt=0, lt=1, description="share of a window's patches that is predicted")
    architecture: Literal["simple", "asymmetric", "multiscale"] = Field(
        "simple",
        description="simple: mask tokens in the encoder; asymmetric: in a decoder, as in MAE; multiscale: in a decoder "
        "after each of `blocks`, as in LocalMIM; the keys `decoder*` change only the last two",
    )
    blocks: tuple[int, ...] | None = Field(
        None, description="architecture=multiscale: blocks after which target.cell_sizes are predicted; 1 is the first"
    )
    decoder: Literal["transformer", "cross"] = Field("transformer", description="cross: CrossMAE's")
    mask_token_block: int = Field(
        0, ge=0, description="block before which mask tokens enter; earlier blocks see visible patches only"
    )

    @property
    def num_masked(self) -> int:
        """floor(K*K*ratio), M."""
        return int(self.window_size**2 * self.mask_ratio)

    def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
        return self.window_size**2, self.num_masked

    def on_grid(self, grid: Grid, final: Grid) -> MethodConfig:
        """Keeps the windows per patch, and so the cost; distinct windows are limited to the places in the grid."""
        windows = int(self.num_windows * math.prod(grid) / math.prod(final) + 0.5)
        if self.window_sampling == "distinct":
            windows = min(windows, count_places(self.window_size, grid))
        return self.model_copy(update={"num_windows": max(windows, 1)})

    def sequence_grid(self, grid: Grid) -> Grid:
        return self.window_size, self.window_size

    def check(self, grid: Grid, model: ModelConfig) -> None:
        if model.position == "bias":
            raise ValueError(
                "model.position=bias learns a number for each offset in the image, but the windows of method lomar "
                "would train only the short offsets: set model.position=relative"
            )
        check_windows(self.num_windows if self.window_sampling == "distinct" else 1, self.window_size, grid)
        if self.window_sampling == "complementary" and self.mask_type != "random":
            raise ValueError(
                f"method.window_sampling=complementary draws a window's masks together, but method.mask_type="
                f"{self.mask_type} draws each independently: set method.mask_type=random"
            )
        check_masked(self.mask_ratio, self.num_masked, self.window_size**2, "a window's")
        check_mask_token_block(self.mask_token_block, model)
        self.check_decoder(self.window_size**2, self.num_masked)
        self._check_architecture(model)

    def _check_architecture(self, model: ModelConfig) -> None:
        if self.architecture != "asymmetric" and self.decoder == "cross":
            raise ValueError(
                f"method.decoder=cross needs a single decoder after the encoder, which method.architecture="
                f"{self.architecture} does not have: set method.architecture=asymmetric"
            )
        if self.architecture == "simple" and self.predict_ratio is not None:
            raise ValueError(
                f"method.predict_ratio={self.predict_ratio} is for mask tokens in a decoder, but "
                f"method.architecture=simple has them in the encoder: set method.architecture=asymmetric"
            )
        if self.mask_token_block and self.architecture != "simple":
            raise ValueError(
                f"method.mask_token_block={self.mask_token_block} lets mask tokens enter the encoder, but "
                f"method.architecture={self.architecture} never does: set method.mask_token_block=0"
            )
        if self.blocks is None and self.architecture == "multiscale":
            raise ValueError(
                f"method.architecture=multiscale needs a decoder after each of method.blocks: set, for example, "
                f"method.blocks=[2, 4, {ARCHS[model.arch].depth}]"
            )
        if self.blocks is not None and self.architecture != "multiscale":
            raise ValueError(
                f"method.blocks={list(self.blocks)} is only used with method.architecture=multiscale, not "
                f"{self.architecture}: set that, or leave out method.blocks"
            )
        if self.blocks is not None:
            check_blocks(self.blocks, model)

    def check_target(self, target: TargetConfig, patch_size: int) -> None:
        if self.blocks is not None:
            check_cells(self.blocks, target, patch_size, whole_image=False)

    def check_lut(self) -> None:
        check_random_masks(self.mask_type)
