"""LoMaR: local masked reconstruction (Chen et al., section 3.2).

Per image, W random windows of K x K patches; inside each, a share of the patches is masked and predicted from the
visible ones. Windows never attend to each other: they are a batch dimension. Every image draws its own W distinct
windows (the authors' code draws windows once a batch, and pairs them so that an image gets one window W times).

Fig. 5's other architecture is MAE's, for windows: a decoder has the mask tokens, not the encoder.

Shapes: B images, G windows in all (B*W), L = K*K patches of a window, D width, P = p*p*3.
"""

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.context import Learned
from pretrain.methods.masking import Grid, check_masked, check_windows, random_masked, random_windows
from pretrain.methods.partial import Partial, describe
from pretrain.methods.predictor import AsymmetricPredictor, Predictor, check_join
from pretrain.methods.targets import (
    cut_windows,
    normalize_pixels,
    pictures,
    pixel_target,
    predicted_pixels,
    take,
    unpatchify,
)
from pretrain.models.decoder import check_heads
from pretrain.models.vit import Arch, ViT
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
    window = random_windows(rng, config.windows, config.window, grid)
    masked = random_masked(rng, config.windows, config.window**2, config.num_masked)
    return {"window": window, **describe(rng, masked, partial, config.window)}


class LoMaR(nn.Module):
    """Encoder on windows with mask tokens and a linear head, or with a decoder; MSE on the masked patches."""

    addons = frozenset({"partial", "context"})

    class Config(Section):
        """LoMaR's own keys."""

        name: Literal["lomar"] = "lomar"
        windows: int = Field(4, ge=1, description="windows per image, W: 4 at 224, 6 at 384, 9 at 448")
        window: int = Field(7, ge=2, description="side of a window in patches, K")
        mask_ratio: float = Field(0.8, gt=0, lt=1, description="share of a window's patches that is predicted")
        norm_pix: bool = Field(True, description="predict each patch normalised by its own mean and variance")
        architecture: Literal["simple", "asymmetric"] = Field(
            "simple", description="mask tokens in the encoder, or, as in MAE, in a decoder: decoder_dim, _depth, _heads"
        )
        decoder_dim: int = Field(512, ge=4, multiple_of=4)
        decoder_depth: int = Field(8, ge=1)
        decoder_heads: int = Field(16, ge=1)
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
            check_windows(self.windows, self.window, grid)
            check_masked(self.mask_ratio, self.num_masked, self.window**2, "a window's")
            check_join(self.join, model)
            check_heads(self.decoder_dim, self.decoder_heads)
            if self.join and self.architecture == "asymmetric":
                raise ValueError(
                    f"method.join={self.join} lets mask tokens enter the encoder, and method.architecture=asymmetric "
                    f"never does: set method.join=0"
                )

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        super().__init__()
        self.config, self.encoder, self.partial = config, encoder, partial
        self.sequence, self.unit = (config.window, config.window), 1
        outputs = encoder.patch**2 * 3
        if config.architecture == "simple":
            self.predictor: nn.Module = Predictor(encoder, self.sequence, outputs, config.join, partial)
        else:
            arch = Arch(config.decoder_dim, config.decoder_depth, config.decoder_heads)
            self.predictor = AsymmetricPredictor(encoder, self.sequence, outputs, arch, partial)

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        return functools.partial(view, grid=self.encoder.grid, config=self.config, partial=self.partial)

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` as from `view()`, stacked over images."""
        return {"loss": self.learn(images, view).loss}

    def learn(self, images: Tensor, view: dict[str, Tensor], supervised: int | None = None) -> Learned:
        """The loss of the first `supervised` images, of all unless it is given, and all encoded visible tokens."""
        patches, index = cut_windows(images, view, self.encoder.patch)
        windows = None if supervised is None else supervised * self.config.windows
        prediction, seen = self._predict(patches, index, windows)
        target = pixel_target(take(patches[:windows], index["masked"][:windows]), self.config.norm_pix)
        place = index["window"].gather(1, index["visible"])
        B = len(images)
        loss = (prediction.float() - target).square().mean()
        return Learned(loss, seen.reshape(B, -1, seen.shape[-1]), place.view(B, -1))

    def _predict(
        self, patches: Tensor, index: dict[str, Tensor], supervised: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(G, L, P) uint8 patches -> as `Predictor`."""
        pixels = normalize_pixels(take(patches, index["visible"]))
        return self.predictor(
            self.encoder, pixels, index["window"], index["visible"], index["masked"], index["kept"], supervised
        )

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The paper's Fig. 7 for the first window of each image.

        Returns:
            `original` (B, H, W, 3), and of the window `window`, `masked` and `reconstruction` (B, K*p, K*p, 3); uint8.
        """
        first = {name: index[:, :1] for name, index in view.items()}
        patches, index = cut_windows(images, first, self.encoder.patch)
        masked = index["masked"]
        prediction, _ = self._predict(patches, index)
        predicted = predicted_pixels(prediction, take(patches, masked), self.config.norm_pix)
        return {
            "original": images,
            "window": unpatchify(patches, self.sequence),
            **pictures(patches, masked, {"reconstruction": predicted}, self.sequence),
        }
