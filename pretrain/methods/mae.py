"""MAE: masked autoencoders (He et al.). The encoder sees the visible patches alone; a decoder fills in the others.

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
from pretrain.methods.masking import Grid, block_masked, check_masked, grid_masked, random_masked
from pretrain.methods.partial import Fill, Partial, describe
from pretrain.methods.targets import normalize_pixels, patchify, pictures, pixel_target, predicted_pixels, take
from pretrain.models.decoder import AverageDecoder, ConvDecoder, Decoder, check_heads
from pretrain.models.vit import Arch, ViT
from pretrain.schema import Section

if TYPE_CHECKING:
    from pretrain.config import ModelConfig


def view(
    rng: np.random.Generator, *, grid: Grid, mask: str, count: int, partial: Partial | None
) -> dict[str, np.ndarray]:
    """`visible` (V,), `masked` (M,) and of those `kept` (K,): grid positions, ascending, int64."""
    if mask == "random":
        masked = random_masked(rng, 1, grid[0] * grid[1], count)
    else:
        masked = {"block": block_masked, "grid": grid_masked}[mask](rng, grid, count)[None]
    return {name: row[0] for name, row in describe(rng, masked, partial, grid[1]).items()}


class MAE(nn.Module):
    """Encoder on the visible patches, transformer decoder, MSE on the masked patches."""

    addons = frozenset({"partial", "context"})

    class Config(Section):
        """MAE's own keys; the ablations of its talk are values of these."""

        name: Literal["mae"] = "mae"
        mask: Literal["random", "block", "grid"] = Field("random", description="how the masked patches lie")
        mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is predicted")
        norm_pix: bool = Field(True, description="predict each patch normalised by its own mean and variance")
        decoder: Literal["transformer", "average", "conv"] = Field(
            "transformer", description="LC-MAE's Table 2; decoder_dim, _depth and _heads are the transformer's"
        )
        decoder_dim: int = Field(512, ge=4, multiple_of=4)
        decoder_depth: int = Field(8, ge=1)
        decoder_heads: int = Field(16, ge=1)

        def count(self, grid: Grid, model: "ModelConfig | None" = None) -> tuple[int, int]:
            """Patches of an image, N, and how many are masked: N - floor(N * (1 - ratio)), as the authors count."""
            patches = math.prod(grid)
            return patches, patches - int(patches * (1 - self.mask_ratio))

        def check(self, grid: Grid, model: "ModelConfig") -> None:
            """Raises ValueError where masks, decoder or position do not fit."""
            if model.position != "sincos":
                raise ValueError(f"method {self.name} adds fixed positions to its tokens: set model.position=sincos")
            patches, masked = self.count(grid)
            check_masked(self.mask_ratio, masked, patches, "the image's")
            if self.mask == "grid" and (grid[0] % 2 or grid[1] % 2 or self.mask_ratio != 0.75):
                raise ValueError(
                    f"method.mask=grid masks three of every 2x2 patches: it needs method.mask_ratio=0.75 and an even "
                    f"grid, not {self.mask_ratio} on {grid[0]}x{grid[1]}"
                )
            check_heads(self.decoder_dim, self.decoder_heads)

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        super().__init__()
        self.config, self.encoder, self.partial = config, encoder, partial
        self.sequence, self.unit = encoder.grid, 1
        dim, outputs = encoder.arch.dim, encoder.patch**2 * 3
        if config.decoder == "transformer":
            arch = Arch(config.decoder_dim, config.decoder_depth, config.decoder_heads)
            fill = Fill(arch.dim, encoder.grid, partial.kernel) if partial else None
            self.decoder: nn.Module = Decoder(dim, arch, encoder.grid, outputs, fill)
        else:
            local = {"average": AverageDecoder, "conv": ConvDecoder}[config.decoder]
            self.decoder = local(dim, encoder.grid, outputs)

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        grid = self.encoder.grid
        _, count = self.config.count(grid)
        return functools.partial(view, grid=grid, mask=self.config.mask, count=count, partial=self.partial)

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` as from `view()`, stacked over images."""
        return {"loss": self.learn(images, view).loss}

    def learn(self, images: Tensor, view: dict[str, Tensor], supervised: int | None = None) -> Learned:
        """The loss of the first `supervised` images, of all unless it is given, and all encoded visible tokens."""
        patches = patchify(images, self.encoder.patch)
        encoded = self._encode(patches, view["visible"])
        prediction = self.decoder(encoded[:supervised], **{name: index[:supervised] for name, index in view.items()})
        target = pixel_target(take(patches[:supervised], view["masked"][:supervised]), self.config.norm_pix)
        return Learned((prediction.float() - target).square().mean(), encoded[:, 1:], view["visible"])

    def _encode(self, patches: Tensor, visible: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> the class token and the visible ones, encoded, (B, 1+V, D)."""
        tokens = self.encoder.patch_embed(normalize_pixels(take(patches, visible)))
        return self.encoder(tokens + self.encoder.pos_embed[0, 1 + visible])

    def _predict(self, patches: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> the masked ones' prediction (B, M, P)."""
        return self.decoder(self._encode(patches, visible), visible, masked, kept)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """`original`, `masked` and `reconstruction` of each image, (B, H, W, 3) uint8."""
        patches, masked = patchify(images, self.encoder.patch), view["masked"]
        prediction = self._predict(patches, **view)
        predicted = predicted_pixels(prediction, take(patches, masked), self.config.norm_pix)
        return {"original": images, **pictures(patches, masked, predicted, self.encoder.grid)}
