"""MAE: masked autoencoders (He et al.). The encoder sees the visible patches alone; a decoder fills in the others.

The ablations of its paper are keys: decoder (a, b), `encoder_masks` (c), `target` (d), `mask` and `mask_ratio` (f).

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
from pretrain.methods.partial import Partial, build_fill, describe
from pretrain.methods.pca import PCAConfig
from pretrain.methods.predictor import MaskTokens
from pretrain.methods.reconstruction import build_target, check_target
from pretrain.methods.targets import normalize_pixels, patchify, pictures, take
from pretrain.methods.tokenizers import TokenizerConfig
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
    """Encoder on the visible patches, transformer decoder, loss on the masked patches."""

    addons = frozenset({"partial", "context"})

    class Config(Section):
        """MAE's own keys."""

        name: Literal["mae"] = "mae"
        mask: Literal["random", "block", "grid"] = Field("random", description="how the masked patches lie")
        mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is predicted")
        target: Literal["pixel", "norm_pix", "pca", "token"] = Field(
            "norm_pix", description="what is predicted: pixels, normalised by patch or not, PCA coefficients, or codes"
        )
        pca: PCAConfig | None = Field(None, description="target=pca: the components")
        tokenizer: TokenizerConfig | None = Field(None, description="target=token: whose codes")
        encoder_masks: bool = Field(False, description="mask tokens enter the encoder, not the decoder")
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
            if self.encoder_masks and self.decoder != "transformer":
                raise ValueError(
                    f"method.encoder_masks=true decodes encoded mask tokens, and method.decoder={self.decoder} puts "
                    f"its own at the masked patches: set method.decoder=transformer"
                )
            check_target(self.target, self.pca, self.tokenizer, model.patch)

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        super().__init__()
        self.config, self.encoder, self.partial = config, encoder, partial
        self.sequence, self.unit = encoder.grid, 1
        self.target = build_target(config.target, config.pca, config.tokenizer, encoder.grid, encoder.patch)
        dim, outputs = encoder.arch.dim, self.target.outputs
        self.mask_tokens = MaskTokens(dim) if config.encoder_masks else None
        if config.decoder == "transformer":
            arch = Arch(config.decoder_dim, config.decoder_depth, config.decoder_heads)
            fill, masks = build_fill(partial, arch, encoder.grid), not config.encoder_masks
            self.decoder: nn.Module = Decoder(dim, arch, encoder.grid, outputs, fill, masks)
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
        encoded = self._encode(patchify(images, self.encoder.patch), **view)
        first = {name: index[:supervised] for name, index in view.items()}
        prediction = self._decode(encoded[:supervised], **first)
        truth = take(self.target.truth(images[:supervised]), first["masked"])
        seen = encoded[:, 1 : 1 + view["visible"].shape[1]]
        return Learned(self.target.loss(prediction, truth), seen, view["visible"])

    def _encode(self, patches: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> encoded class token and visible patches, (B, 1+V, D); behind them mask tokens."""
        position = self.encoder.pos_embed[0, 1:]
        tokens = self.encoder.patch_embed(normalize_pixels(take(patches, visible))) + position[visible]
        if self.mask_tokens is not None:
            tokens = torch.cat([tokens, self.mask_tokens(position[kept])], dim=1)
        return self.encoder(tokens)

    def _decode(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """What `_encode` made of them -> the masked patches' prediction (B, M, outputs)."""
        if self.mask_tokens is None:
            return self.decoder(encoded, visible, masked, kept)
        return self.decoder(encoded, torch.cat([visible, kept], dim=1), masked)

    def _predict(self, patches: Tensor, **view: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> the masked ones' prediction (B, M, outputs)."""
        return self._decode(self._encode(patches, **view), **view)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """`original`, `masked` and what the target shows of each image, (B, H, W, 3) uint8."""
        patches, masked = patchify(images, self.encoder.patch), view["masked"]
        prediction = self._predict(patches, **view)
        shown = self.target.shown(prediction, take(self.target.truth(images), masked))
        return {"original": images, **pictures(patches, masked, shown, self.encoder.grid)}
