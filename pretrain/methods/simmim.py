"""SimMIM (Xie et al.): all patches enter the encoder, a token in place of the masked ones; one linear layer, L1.

Shapes: B images, N patches of an image, M of them masked, V visible, D width, P = p*p*3.
"""

import functools
import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.context import Learned
from pretrain.methods.masking import Grid, cell_masked
from pretrain.methods.partial import Partial, describe
from pretrain.methods.predictor import Predictor
from pretrain.methods.targets import normalize_pixels, patchify, pictures, pixel_target, predicted_pixels, take
from pretrain.models.vit import ViT
from pretrain.schema import Section

if TYPE_CHECKING:
    from pretrain.config import ModelConfig


def view(
    rng: np.random.Generator, *, grid: Grid, cell: int, ratio: float, partial: Partial | None
) -> dict[str, np.ndarray]:
    """`visible` (V,), `masked` (M,) and of those `kept` (K,): grid positions, ascending, int64."""
    index = describe(rng, cell_masked(rng, grid, cell, ratio)[None], partial, grid[1])
    return {name: row[0] for name, row in index.items()}


class SimMIM(nn.Module):
    """Encoder on everything, linear head, L1 on the pixels of the masked patches, which are not normalised."""

    addons = frozenset({"partial", "context"})

    class Config(Section):
        """SimMIM's own keys."""

        name: Literal["simmim"] = "simmim"
        cell: int = Field(32, ge=1, description="side in pixels of what is masked together")
        mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of the cells that is predicted")

        def count(self, grid: Grid, model: "ModelConfig") -> tuple[int, int]:
            """Patches of an image, and how many are masked: ceil(cells * ratio) cells."""
            side = self.cell // model.patch
            cells = math.prod(grid) // side**2
            return math.prod(grid), math.ceil(cells * self.mask_ratio) * side**2

        def check(self, grid: Grid, model: "ModelConfig") -> None:
            """Raises ValueError where cells, patches and image do not fit."""
            side = self.cell // model.patch
            if self.cell % model.patch or not side or grid[0] % side or grid[1] % side:
                height, width = grid[0] * model.patch, grid[1] * model.patch
                divisors = [n for n in range(1, min(grid) + 1) if not (grid[0] % n or grid[1] % n)]
                nearest = min((n * model.patch for n in divisors), key=lambda cell: abs(cell - self.cell))
                raise ValueError(
                    f"method.cell={self.cell} must be a multiple of model.patch={model.patch} that divides the image "
                    f"of {height}x{width} pixels: set method.cell={nearest}"
                )
            patches, masked = self.count(grid, model)
            if masked >= patches:
                raise ValueError(f"method.mask_ratio={self.mask_ratio} leaves no patch visible: lower it")

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        super().__init__()
        self.config, self.encoder, self.partial = config, encoder, partial
        self.sequence, self.unit = encoder.grid, config.cell // encoder.patch
        self.predictor = Predictor(encoder, encoder.grid, encoder.patch**2 * 3, 0, partial)

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        ratio = self.config.mask_ratio
        return functools.partial(view, grid=self.sequence, cell=self.unit, ratio=ratio, partial=self.partial)

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` as from `view()`, stacked over images."""
        return {"loss": self.learn(images, view).loss}

    def learn(self, images: Tensor, view: dict[str, Tensor], supervised: int | None = None) -> Learned:
        """The loss of the first `supervised` images, of all unless it is given, and all encoded visible tokens."""
        patches = patchify(images, self.encoder.patch)
        prediction, seen = self._predict(patches, view, supervised)
        target = pixel_target(take(patches[:supervised], view["masked"][:supervised]), norm_pix=False)
        return Learned((prediction.float() - target).abs().mean(), seen, view["visible"])

    def _predict(
        self, patches: Tensor, view: dict[str, Tensor], supervised: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, P) uint8 patches -> as `Predictor`."""
        place = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        pixels = normalize_pixels(take(patches, view["visible"]))
        return self.predictor(self.encoder, pixels, place, **view, supervised=supervised)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """`original`, `masked` and `reconstruction` of each image, (B, H, W, 3) uint8."""
        patches, masked = patchify(images, self.encoder.patch), view["masked"]
        prediction, _ = self._predict(patches, view)
        predicted = predicted_pixels(prediction, take(patches, masked), norm_pix=False)
        shown = pictures(patches, masked, {"reconstruction": predicted}, self.encoder.grid)
        return {"original": images, **shown}
