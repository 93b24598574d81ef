"""LoMaR: local masked reconstruction (Chen et al., section 3.2).

Per image, W random windows of K x K patches; inside each, a share of the patches is masked and predicted from the
visible ones. Windows never attend to each other: they are a batch dimension. Every image draws its own W distinct
windows (the authors' code draws windows once a batch, and pairs them so that an image gets one window W times).

Shapes: B images, G windows in all (B*W), L = K*K patches of a window, D width, P = p*p*3.
"""

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.masking import Grid, positions, random_masked, random_windows
from pretrain.methods.partial import Partial, choose_kept
from pretrain.methods.predictor import Predictor, check_join
from pretrain.methods.targets import (
    normalize_pixels,
    patchify,
    pictures,
    pixel_target,
    predicted_pixels,
    take,
    unpatchify,
)
from pretrain.models.vit import ViT
from pretrain.schema import Section

if TYPE_CHECKING:
    from pretrain.config import ModelConfig


def view(
    rng: np.random.Generator, *, grid: Grid, config: "LoMaR.Config", partial: Partial | None
) -> dict[str, np.ndarray]:
    """What is random about one sample of LoMaR.

    Returns:
        `window` (W, L): the grid position of each patch of each window; `visible` (W, L-M), `masked` (W, M) and of
        those `kept` (W, K): positions within the window, ascending. All int64.
    """
    side, patches = config.window, config.window**2
    window = random_windows(rng, config.windows, side, grid)
    visible, masked = positions(random_masked(rng, config.windows, patches, config.num_masked))
    kept = choose_kept(rng, masked, partial, patches, side) if partial else masked
    return {"window": window, "visible": visible, "masked": masked, "kept": kept}


class LoMaR(nn.Module):
    """Encoder on windows with mask tokens, one linear head, MSE on the masked patches."""

    class Config(Section):
        """LoMaR's own keys."""

        name: Literal["lomar"] = "lomar"
        windows: int = Field(4, ge=1, description="windows per image, W: 4 at 224, 6 at 384, 9 at 448")
        window: int = Field(7, ge=2, description="side of a window in patches, K")
        mask_ratio: float = Field(0.8, gt=0, lt=1, description="share of a window's patches that is predicted")
        norm_pix: bool = Field(True, description="predict each patch normalised by its own mean and variance")
        join: int = Field(0, ge=0, description="block at which mask tokens enter; before it, visible patches are alone")

        @property
        def num_masked(self) -> int:
            """floor(K*K*ratio), M."""
            return int(self.window**2 * self.mask_ratio)

        def count(self, grid: Grid, model: "ModelConfig") -> tuple[int, int]:
            """Patches of a window, and how many of them are masked."""
            return self.window**2, self.num_masked

        def check(self, grid: Grid, model: "ModelConfig") -> None:
            """Raises ValueError where a grid of patches cannot hold these windows."""
            if self.window > min(grid):
                raise ValueError(
                    f"method.window={self.window} is larger than the image's grid of {grid[0]}x{grid[1]} patches: "
                    f"set method.window to at most {min(grid)}, or data.size larger"
                )
            places = (grid[0] - self.window + 1) * (grid[1] - self.window + 1)
            if self.windows > places:
                raise ValueError(
                    f"method.windows={self.windows}, but a window of {self.window}x{self.window} patches fits in only "
                    f"{places} places on a grid of {grid[0]}x{grid[1]}: set method.windows to at most {places}"
                )
            if not 0 < self.num_masked < self.window**2:
                raise ValueError(
                    f"method.mask_ratio={self.mask_ratio} masks {self.num_masked} of a window's {self.window**2} "
                    f"patches: at least one must be masked and one visible"
                )
            check_join(self.join, model)

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        super().__init__()
        self.config, self.encoder, self.partial = config, encoder, partial
        self.predictor = Predictor(encoder, (config.window, config.window), config.join, partial)

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        return functools.partial(view, grid=self.encoder.grid, config=self.config, partial=self.partial)

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` as from `view()`, stacked over images."""
        patches, index = self._windows(images, view)
        prediction = self._predict(patches, index)
        target = pixel_target(take(patches, index["masked"]), self.config.norm_pix)
        return {"loss": (prediction.float() - target).square().mean()}

    def _windows(self, images: Tensor, view: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cuts the windows out of the images: patches (G, L, P), and the view's indices as (G, ...)."""
        patches = take(patchify(images, self.encoder.patch), view["window"].flatten(1))
        index = {name: array.flatten(0, 1) for name, array in view.items()}
        return patches.view(*index["window"].shape, -1), index

    def _predict(self, patches: Tensor, index: dict[str, Tensor]) -> Tensor:
        """(G, L, P) uint8 patches -> the masked ones' prediction (G, M, P)."""
        pixels = normalize_pixels(take(patches, index["visible"]))
        return self.predictor(self.encoder, pixels, index["window"], index["visible"], index["masked"], index["kept"])

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The paper's Fig. 7 for the first window of each image.

        Returns:
            `original` (B, H, W, 3), and of the window `window`, `masked` and `reconstruction` (B, K*p, K*p, 3); uint8.
        """
        first = {name: index[:, :1] for name, index in view.items()}
        patches, index = self._windows(images, first)
        masked = index["masked"]
        predicted = predicted_pixels(self._predict(patches, index), take(patches, masked), self.config.norm_pix)
        grid = (self.config.window, self.config.window)
        return {
            "original": images,
            "window": unpatchify(patches, grid),
            **pictures(patches, masked, predicted, grid),
        }
