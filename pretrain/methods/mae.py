"""MAE: masked autoencoders (He et al.). The encoder sees only the visible patches; a decoder predicts the others.

The ablations of its Table 1 are keys: decoder (a, b), `encoder_mask_tokens` (c), the `target` (d), `mask_type` and
`mask_ratio` (f). So is CrossMAE: `decoder=cross`, `inter_block_attention` and `predict_ratio`.

Shapes: B images, N patches of an image, M of them masked, V visible, D width, P = p*p*3.
"""

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pretrain.methods.base import LossAndTokens, LUTMethod, MaskIndices, MaskSampler
from pretrain.methods.decoders import build_decoder, encode, encoded_patches, predict_all
from pretrain.methods.mae_config import MAEConfig
from pretrain.methods.masking import Grid, block_masked, cell_masked, grid_masked, random_masked
from pretrain.methods.pr_mim import PRMIMConfig, build_mask_indices
from pretrain.methods.predictor import MaskTokens
from pretrain.methods.targets import PatchTarget
from pretrain.models.decoder import AverageDecoder, ConvDecoder
from pretrain.models.patches import gather_tokens, patchify
from pretrain.models.vit import ViT


def sample_masks(
    rng: np.random.Generator, *, grid: Grid, config: MAEConfig, patch_size: int, pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """`visible` (V,), `masked` (M,) and its subset `kept` (K,): grid positions, ascending, int64.

    Several masks are drawn one after the other and stacked: (num_masks, V) and so on.
    """
    one = functools.partial(sample_mask, rng, grid, config, patch_size, pr_mim)
    if config.num_masks == 1:
        return one()
    masks = [one() for _ in range(config.num_masks)]
    return {name: np.stack([mask[name] for mask in masks]) for name in masks[0]}


def sample_mask(
    rng: np.random.Generator, grid: Grid, config: MAEConfig, patch_size: int, pr_mim: PRMIMConfig | None
) -> dict[str, np.ndarray]:
    """One mask's indices."""
    patches, count = config.count_patches(grid, patch_size)
    if config.mask_type == "random":
        masked = random_masked(rng, 1, patches, count)[0]
    elif config.mask_type == "cell":
        masked = cell_masked(rng, grid, config.mask_patch_size // patch_size, config.mask_ratio)
    else:
        masked = {"block": block_masked, "grid": grid_masked}[config.mask_type](rng, grid, count)
    return build_mask_indices(rng, masked, pr_mim, grid[1], config.num_predicted(patches))


class MAE(LUTMethod):
    """Encoder on the visible patches, transformer decoder, loss on the masked patches."""

    add_ons = frozenset({"pr_mim", "lut"})

    class Config(MAEConfig):
        """MAE's own keys."""

        name: Literal["mae"] = "mae"

    def __init__(self, config: MAEConfig, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.config, self.encoder, self.target, self.pr_mim = config, encoder, target, pr_mim
        self.mask_grid = encoder.grid
        self.mask_cell = config.mask_patch_size // encoder.patch_size if config.mask_type == "cell" else 1
        dim, num_outputs = encoder.arch.dim, target.num_outputs
        self.mask_tokens = MaskTokens(dim) if config.encoder_mask_tokens else None
        if config.decoder == "average":
            self.decoder: nn.Module = AverageDecoder(dim, encoder.grid, num_outputs)
        elif config.decoder == "conv":
            self.decoder = ConvDecoder(dim, encoder.grid, num_outputs)
        else:
            self.decoder = build_decoder(
                config, encoder, encoder.grid, num_outputs, pr_mim, mask_tokens=not config.encoder_mask_tokens
            )

    def mask_sampler(self) -> MaskSampler:
        grid, patch_size = self.encoder.grid, self.encoder.patch_size
        return functools.partial(sample_masks, grid=grid, config=self.config, patch_size=patch_size, pr_mim=self.pr_mim)

    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        patches = patchify(images, self.encoder.patch_size)
        truth = self.target.ground_truth(images[:num_predicted], patches[:num_predicted])
        if self.config.num_masks > 1:
            mask_indices, patches, truth = self._by_mask(mask_indices, patches, truth)
        encoded = self._encode(patches, **mask_indices)
        first = {name: array[: len(truth)] for name, array in mask_indices.items()}
        prediction = self._decode(encoded[..., : len(truth), :, :], **first)
        losses = self.target.losses(prediction, gather_tokens(truth, first["masked"]))
        visible = mask_indices["visible"]
        return LossAndTokens(losses, encoded_patches(self.encoder, encoded, visible.shape[1]), visible)

    def _by_mask(self, mask_indices: MaskIndices, *of_images: Tensor) -> Any:
        """Arrays (B, W, ...) of W masks -> (B*W, ...), an image's masks adjacent; repeats (B, ...) tensors W times."""
        indices = {name: array.flatten(0, 1) for name, array in mask_indices.items()}
        return indices, *(x.repeat_interleave(self.config.num_masks, dim=0) for x in of_images)

    def _encode(self, patches: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> encoded prefix tokens, visible patches and mask tokens, as from `encode`."""
        tokens = self.encoder.patch_embed(gather_tokens(patches, visible))
        if self.mask_tokens is None:
            return self._run_encoder(tokens, visible)
        tokens = torch.cat([tokens, self.mask_tokens(kept)], dim=1)
        return self._run_encoder(tokens, torch.cat([visible, kept], dim=1))

    def _run_encoder(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T, D) tokens at grid positions (B, T) -> the decoder's input."""
        return encode(self.encoder, tokens, positions, self.config)

    def _decode(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """Result of `_encode` -> prediction of the masked patches (B, M, num_outputs)."""
        if self.mask_tokens is None:
            return self.decoder(encoded, visible, masked, kept)
        return self.decoder(encoded, torch.cat([visible, kept], dim=1), masked)

    def _predict(self, patches: Tensor, **mask_indices: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> prediction of the masked ones (B, M, num_outputs)."""
        return self._decode(self._encode(patches, **mask_indices), **mask_indices)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """`original`, `masked` and the target's renderings of each image under its first mask, (B, H, W, 3) uint8."""
        if self.config.num_masks > 1:
            mask_indices = {name: array[:, 0] for name, array in mask_indices.items()}
        patches = patchify(images, self.encoder.patch_size)
        mask_indices = predict_all(self.config, mask_indices, patches.shape[1])
        return self.draw_whole_images(images, mask_indices["masked"], self._predict(patches, **mask_indices))
