"""AE(k), the auto-encoder of LC-MAE's Table 3: MAE without masks, whose tokens predict what surrounds them.

Every patch is encoded, and every token predicts the k x k pixels around its own centre: k = 16 copies the input, a
larger k widens the receptive field.

Shapes: B images, N patches of p x p pixels, K = k*k*3 values of a block.
"""

import functools
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.masking import Grid
from pretrain.methods.partial import Partial
from pretrain.methods.targets import normalize_pixels, patchify, pixel_target, predicted_pixels, unpatchify
from pretrain.models.decoder import Decoder, check_heads
from pretrain.models.vit import Arch, ViT
from pretrain.schema import Section

if TYPE_CHECKING:
    from pretrain.config import ModelConfig


def view(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Nothing is masked, so nothing is drawn."""
    return {}


def centred_blocks(images: Tensor, patch: int, block: int) -> Tensor:
    """The `block` x `block` pixels around the centre of every patch; beyond the border the image is mirrored.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B, N, K) in the dtype of the images, laid out as `patchify` does a patch.
    """
    margin = (block - patch) // 2
    channels = images.permute(0, 3, 1, 2).float()
    around = F.pad(channels, (margin,) * 4, mode="reflect").to(images.dtype)
    blocks = around.unfold(2, block, patch).unfold(3, block, patch)  # (B, 3, rows, columns, k, k)
    return blocks.permute(0, 2, 3, 4, 5, 1).reshape(len(images), -1, block * block * 3)


class AutoEncoder(nn.Module):
    """Encoder on all patches, transformer decoder without mask tokens, MSE on the block around every patch."""

    addons: frozenset[str] = frozenset()  # nothing is masked

    class Config(Section):
        """The auto-encoder's own keys; Table 3's k is `block`, 16, 48, 80 or 112 at `model.patch=16`."""

        name: Literal["ae"] = "ae"
        block: int = Field(112, ge=1, description="side in pixels of what a token predicts")
        norm_pix: bool = Field(True, description="predict each block normalised by its own mean and variance")
        decoder_dim: int = Field(512, ge=4, multiple_of=4)
        decoder_depth: int = Field(8, ge=1)
        decoder_heads: int = Field(16, ge=1)

        def check(self, grid: Grid, model: "ModelConfig") -> None:
            """Raises ValueError where block, decoder or position do not fit."""
            if model.position != "sincos":
                raise ValueError("method ae adds fixed positions to its tokens: set model.position=sincos")
            margin, odd = divmod(self.block - model.patch, 2)
            if margin < 0 or odd:
                raise ValueError(
                    f"method.block={self.block} must be model.patch={model.patch} plus an even number of pixels, "
                    f"as many on each side"
                )
            if margin >= min(grid) * model.patch:
                raise ValueError(
                    f"method.block={self.block} reaches {margin} pixels beyond a border, more than an image of "
                    f"{grid[0] * model.patch}x{grid[1] * model.patch} has to mirror: lower it"
                )
            check_heads(self.decoder_dim, self.decoder_heads)

    def __init__(self, config: Config, encoder: ViT, partial: Partial | None = None):
        assert partial is None, "the configuration refuses it: nothing is masked"
        super().__init__()
        self.config, self.encoder = config, encoder
        arch = Arch(config.decoder_dim, config.decoder_depth, config.decoder_heads)
        self.decoder = Decoder(encoder.arch.dim, arch, encoder.grid, config.block**2 * 3, masks=False)

    def view(self) -> functools.partial[dict[str, np.ndarray]]:
        """The function that the data workers call with a sample's generator."""
        return functools.partial(view)

    def forward(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of a batch: images (B, H, W, 3) uint8, `view` empty."""
        target = pixel_target(centred_blocks(images, self.encoder.patch, self.config.block), self.config.norm_pix)
        return {"loss": (self._predict(images).float() - target).square().mean()}

    def _predict(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> the blocks' prediction (B, N, K)."""
        patches = patchify(images, self.encoder.patch)
        tokens = self.encoder.patch_embed(normalize_pixels(patches)) + self.encoder.pos_embed[:, 1:]
        everywhere = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)
        return self.decoder(self.encoder(tokens), everywhere)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, view: dict[str, Tensor]) -> dict[str, Tensor]:
        """`original` and `reconstruction`, put together from the centre patch of each block: (B, H, W, 3) uint8."""
        patch, block = self.encoder.patch, self.config.block
        margin = (block - patch) // 2
        blocks = predicted_pixels(self._predict(images), centred_blocks(images, patch, block), self.config.norm_pix)
        centres = blocks.unflatten(2, (block, block, 3))[:, :, margin : margin + patch, margin : margin + patch]
        return {"original": images, "reconstruction": unpatchify(centres.flatten(2), self.encoder.grid)}
