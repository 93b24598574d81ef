"""LoMaR: local masked reconstruction (Chen et al., section 3.2).

Per image, W random windows of K x K patches; inside each, a share of the patches is masked and predicted from the
visible ones. Windows never attend to each other: they are a batch dimension. Every image draws its own W distinct
windows (the authors' code draws windows once a batch, and pairs them so that an image gets one window W times).

Shapes: B images, G windows in all (B*W), L = K*K patches of a window, D width, P = p*p*3.
"""

from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.masking import positions, random_masked, random_windows
from pretrain.methods.targets import (
    normalize_patches,
    normalize_pixels,
    patch_statistics,
    patchify,
    take,
    to_pixels,
    unpatchify,
)
from pretrain.models.attention import grid_buckets
from pretrain.models.vit import ViT, init_weights
from pretrain.schema import Section


def view(
    rng: np.random.Generator, *, grid: tuple[int, int], windows: int, size: int, masked: int
) -> dict[str, np.ndarray]:
    """What is random about one sample of LoMaR.

    Returns:
        `window` (W, L): the grid position of each patch of each window; `visible` (W, L-M) and `masked` (W, M):
        positions within the window, ascending. All int64.
    """
    window = random_windows(rng, windows, size, grid)
    visible, hidden = positions(random_masked(rng, windows, size * size, masked))
    return {"window": window, "visible": visible, "masked": hidden}


class LoMaR(nn.Module):
    """Encoder on windows with mask tokens, one linear head, MSE on the masked patches."""

    class Config(Section):
        """LoMaR's own keys."""

        name: Literal["lomar"] = "lomar"
        windows: int = Field(4, ge=1, description="windows per image, W: 4 at 224, 6 at 384, 9 at 448")
        window: int = Field(7, ge=2, description="side of a window in patches, K")
        mask_ratio: float = Field(0.8, gt=0, lt=1, description="share of a window's patches that is predicted")
        norm_pix: bool = Field(True, description="predict each patch normalised by its own mean and variance")

        @property
        def num_masked(self) -> int:
            """floor(K*K*ratio), M."""
            return int(self.window**2 * self.mask_ratio)

        def check(self, grid: tuple[int, int]) -> None:
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

    def __init__(self, config: Config, encoder: ViT):
        super().__init__()
        self.config, self.encoder = config, encoder
        dim = encoder.arch.dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.head = nn.Linear(dim, encoder.patch**2 * 3)
        self.register_buffer("buckets", grid_buckets(config.window, config.window), persistent=False)
        init_weights(self.head)
        nn.init.normal_(self.mask_token, std=0.02)

    def view(self) -> partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        config = self.config
        return partial(
            view, grid=self.encoder.grid, windows=config.windows, size=config.window, masked=config.num_masked
        )

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` as from `view()`, stacked over images."""
        patches, place, visible, masked = self._windows(images, view)
        prediction = self._predict(normalize_pixels(take(patches, visible)), place, visible, masked)
        target = normalize_pixels(take(patches, masked))
        if self.config.norm_pix:
            target = normalize_patches(target)
        return {"loss": (prediction.float() - target).square().mean()}

    def _windows(self, images: Tensor, view: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cuts the windows out of the images: patches (G, L, P), and the view's indices as (G, ...)."""
        patches = take(patchify(images, self.encoder.patch), view["window"].flatten(1))
        place, visible, masked = (view[name].flatten(0, 1) for name in ("window", "visible", "masked"))
        return patches.view(*place.shape, -1), place, visible, masked

    def _predict(self, pixels: Tensor, place: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Visible pixels (G, L-M, P) -> the masked patches' prediction (G, M, P).

        Only visible patches are embedded and only masked ones go through the head: the rest is never looked at.
        """
        seen = self.encoder.patch_embed(pixels)
        tokens = self.mask_token.to(seen.dtype).expand(*place.shape, -1)
        tokens = tokens.scatter(1, visible.unsqueeze(-1).expand_as(seen), seen)
        if not self.encoder.relative:
            tokens = tokens + self.encoder.pos_embed[0, 1 + place]
        encoded = self.encoder(tokens, self.buckets if self.encoder.relative else None)
        return self.head(take(encoded[:, 1:], masked))

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The paper's Fig. 7 for the first window of each image.

        Returns:
            `original` (B, H, W, 3), and of the window `window`, `masked` and `reconstruction` (B, K*p, K*p, 3); uint8.
        """
        first = {name: index[:, :1] for name, index in view.items()}
        patches, place, visible, masked = self._windows(images, first)
        prediction = self._predict(normalize_pixels(take(patches, visible)), place, visible, masked).float()
        if self.config.norm_pix:
            mean, std = patch_statistics(normalize_pixels(take(patches, masked)))
            prediction = prediction * std + mean
        where = masked.unsqueeze(-1).expand_as(prediction)
        grid = (self.config.window, self.config.window)
        return {
            "original": images,
            "window": unpatchify(patches, grid),
            "masked": unpatchify(patches.scatter(1, where, 128), grid),
            "reconstruction": unpatchify(patches.scatter(1, where, to_pixels(prediction)), grid),
        }
