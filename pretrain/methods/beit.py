"""BEiT (Bao et al.): predicts the masked patches' codes of a frozen tokenizer, and LoMaR's section 4.2 with it.

`windows: 0` is BEiT: the image as one window, masked in blocks. `windows: 4` is LoMaR + BEiT: each image gives that
many windows, which never attend to each other. Nothing else differs: all patches of a window enter the encoder, a
token in place of the masked ones, and a linear layer classifies those over the vocabulary.

Shapes: B images, N patches of an image, G windows in all, L patches of a window, M of them masked, V codes.
"""

import functools
import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.masking import (
    Grid,
    block_masked,
    check_masked,
    check_windows,
    random_masked,
    random_windows,
)
from pretrain.methods.partial import Partial, describe
from pretrain.methods.predictor import Predictor
from pretrain.methods.reconstruction import Codes
from pretrain.methods.targets import cut_windows, normalize_pixels, pictures, take
from pretrain.methods.tokenizers import TokenizerConfig
from pretrain.models.vit import ViT
from pretrain.schema import Section

if TYPE_CHECKING:
    from pretrain.config import ModelConfig


def view(
    rng: np.random.Generator, *, grid: Grid, config: "BEiT.Config", partial: Partial | None
) -> dict[str, np.ndarray]:
    """What is random about one sample of BEiT; the image itself is its only window where `config.windows` is 0.

    Returns:
        `window` (W, L): the grid position of each patch of each window; `visible` (W, L-M), `masked` (W, M) and of
        those `kept` (W, K): positions within the window, ascending. All int64.
    """
    area = config.area(grid)
    patches, count = config.count(grid)
    window = random_windows(rng, config.windows, config.window, grid) if config.windows else np.arange(patches)[None]
    if config.mask == "block":
        hidden = np.stack([block_masked(rng, area, count) for _ in window])
    else:
        hidden = random_masked(rng, len(window), patches, count)
    return {"window": window, **describe(rng, hidden, partial, area[1])}


class BEiT(nn.Module):
    """Encoder on windows or on the image, with mask tokens; linear head; cross-entropy on the masked patches' codes."""

    addons = frozenset({"partial"})

    class Config(Section):
        """BEiT's own keys."""

        name: Literal["beit"] = "beit"
        windows: int = Field(0, ge=0, description="LoMaR's windows per image, W; 0 encodes the whole image: BEiT")
        window: int = Field(7, ge=2, description="side of a window in patches, K")
        mask: Literal["block", "random"] = Field("block", description="how the masked patches lie")
        mask_ratio: float = Field(0.4, gt=0, lt=1, description="share of a window's, or the image's, patches")
        tokenizer: TokenizerConfig = TokenizerConfig()

        def area(self, grid: Grid) -> Grid:
            """Rows and columns of patches that are encoded together."""
            return (self.window, self.window) if self.windows else grid

        def count(self, grid: Grid, model: "ModelConfig | None" = None) -> tuple[int, int]:
            """Patches of a window or of the image, L, and how many of them are masked: floor(L * ratio), M."""
            patches = math.prod(self.area(grid))
            return patches, int(patches * self.mask_ratio)

        def check(self, grid: Grid, model: "ModelConfig") -> None:
            """Raises ValueError where a grid of patches cannot hold these windows or masks."""
            if self.windows:
                check_windows(self.windows, self.window, grid)
            patches, masked = self.count(grid)
            check_masked(self.mask_ratio, masked, patches, "a window's" if self.windows else "the image's")

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        super().__init__()
        self.config, self.encoder, self.partial = config, encoder, partial
        self.target = Codes(config.tokenizer, encoder.grid, encoder.patch)  # no part of the module
        self.predictor = Predictor(encoder, config.area(encoder.grid), self.target.outputs, 0, partial)

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        return functools.partial(view, grid=self.encoder.grid, config=self.config, partial=self.partial)

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` as from `view()`, stacked over images."""
        patches, index = cut_windows(images, view, self.encoder.patch)
        prediction, _ = self._predict(patches, index)
        return {"loss": self.target.loss(prediction, self._codes(images, view))}

    def _predict(self, patches: Tensor, index: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(G, L, P) uint8 patches -> as `Predictor`; its outputs are logits (G, M, V)."""
        pixels = normalize_pixels(take(patches, index["visible"]))
        return self.predictor(self.encoder, pixels, index["window"], index["visible"], index["masked"], index["kept"])

    def _codes(self, images: Tensor, view: dict[str, Tensor]) -> Tensor:
        """What is predicted: the codes of the masked patches, (G, M, 1)."""
        place = view["window"].gather(2, view["masked"])
        return take(self.target.truth(images), place.flatten(1)).view(-1, place.shape[-1], 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first window of each image.

        Returns:
            `original` (B, H, W, 3), and of the window `masked`, `codes` (the tokenizer's, where patches are masked) and
            `predicted codes`; uint8.
        """
        first = {name: index[:, :1] for name, index in view.items()}
        patches, index = cut_windows(images, first, self.encoder.patch)
        shown = self.target.shown(self._predict(patches, index)[0], self._codes(images, first))
        area = self.config.area(self.encoder.grid)
        return {"original": images, **pictures(patches, index["masked"], shown, area)}
