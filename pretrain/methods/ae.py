"""AE(k), the auto-encoder of LC-MAE's Table 3: MAE without masks; each token predicts its surroundings.

Every patch is encoded, and every token predicts the k x k pixels around its patch's center: with k = 16 the patch
itself, with a larger k its surroundings as well.

Shapes: B images, N patches of p x p pixels, K = k*k*3 values of a block.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pretrain.methods.base import MaskIndices, MaskSampler, Method, MethodConfig
from pretrain.methods.mae_config import check_absolute
from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import PatchTarget
from pretrain.models.decoder import Decoder, check_heads
from pretrain.models.patches import patchify, show_patches, unpatchify, values_per_patch
from pretrain.models.vit import Arch, ViT
from pretrain.trainer.config import ModelConfig


def sample_masks(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """No arrays: nothing is masked."""
    return {}


def centered_blocks(images: Tensor, patch_size: int, block_size: int) -> Tensor:
    """The `block_size` x `block_size` pixels around every patch's center; beyond the border the image is mirrored.

    Args:
        images: (B, H, W, C).

    Returns:
        (B, N, K) in the dtype of the images; values in the order of `patchify`.
    """
    margin = (block_size - patch_size) // 2
    channels = images.permute(0, 3, 1, 2).float()
    padded = F.pad(channels, (margin,) * 4, mode="reflect").to(images.dtype)
    blocks = padded.unfold(2, block_size, patch_size).unfold(3, block_size, patch_size)  # (B, C, rows, cols, k, k)
    return blocks.permute(0, 2, 3, 4, 5, 1).reshape(len(images), -1, values_per_patch(block_size, images.shape[-1]))


class AutoEncoder(Method):
    """Encoder on all patches, transformer decoder without mask tokens, loss on the block around every patch."""

    targets = frozenset({"pixels"})  # of a block; no add-on applies, since nothing is masked

    class Config(MethodConfig):
        """The auto-encoder's own keys; `block_size` is Table 3's k: 16, 48, 80 or 112 at `model.patch_size=16`."""

        name: Literal["ae"] = "ae"
        block_size: int = Field(112, ge=1, description="side in pixels of the block that each token predicts")
        decoder_embed_dim: int = Field(512, ge=4, multiple_of=4, description="width of the decoder")
        decoder_depth: int = Field(8, ge=1, description="blocks of the decoder")
        decoder_num_heads: int = Field(16, ge=1, description="heads of the decoder's attention")

        def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
            return grid[0] * grid[1], 0

        def check(self, grid: Grid, model: ModelConfig) -> None:
            check_absolute(model.position, self.name)
            margin, odd = divmod(self.block_size - model.patch_size, 2)
            if margin < 0 or odd:
                raise ValueError(
                    f"method.block_size={self.block_size} must equal model.patch_size={model.patch_size} or exceed it "
                    f"by an even number of pixels (the same margin on each side)"
                )
            if margin >= min(grid) * model.patch_size:
                raise ValueError(
                    f"method.block_size={self.block_size} reaches {margin} pixels beyond the border, too far to mirror "
                    f"an image of {grid[0] * model.patch_size}x{grid[1] * model.patch_size}: lower it"
                )
            check_heads(self.decoder_embed_dim, self.decoder_num_heads)

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        assert pr_mim is None, "refused by the configuration: nothing is masked"
        super().__init__(config, encoder, target)
        self.config, self.encoder, self.target = config, encoder, target
        arch = Arch(config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads)
        num_outputs = values_per_patch(config.block_size, encoder.pixels.channels)
        self.decoder = Decoder(
            encoder.arch.dim,
            arch,
            encoder.grid,
            num_outputs,
            mask_tokens=False,
            num_prefix_tokens=encoder.num_prefix_tokens,
        )

    def mask_sampler(self) -> MaskSampler:
        return sample_masks

    def forward(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        truth = centered_blocks(images, self.encoder.patch_size, self.config.block_size)
        return {"loss": self.target.loss(self._predict(images), truth)}

    def _predict(self, images: Tensor) -> Tensor:
        """(B, H, W, C) -> the prediction of the blocks, (B, N, K)."""
        patches = patchify(images, self.encoder.patch_size)
        positions = torch.arange(patches.shape[1], device=images.device).expand(len(images), -1)
        return self.decoder(self.encoder(self.encoder.patch_embed(patches), positions), positions)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """`original` and `reconstruction`, assembled from the center patch of each block: (B, H, W, 3) uint8."""
        patch_size, block_size = self.encoder.patch_size, self.config.block_size
        margin = (block_size - patch_size) // 2
        center = slice(margin, margin + patch_size)
        truth = centered_blocks(images, patch_size, block_size)
        rendered = self.target.render(self._predict(images), truth)
        return {"original": show_patches(images, self.encoder.pixels)} | {
            name: unpatchify(
                blocks.unflatten(2, (block_size, block_size, -1))[:, :, center, center].flatten(2), self.encoder.grid
            )
            for name, blocks in rendered.items()
        }
