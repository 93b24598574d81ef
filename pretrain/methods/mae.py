"""MAE: masked autoencoders (He et al.). The encoder sees only the visible patches; a decoder predicts the others.

The ablations of its Table 1 are keys: decoder (a, b), `encoder_mask_tokens` (c), the `target` (d), `mask_type` and
`mask_ratio` (f).

Shapes: B images, N patches of an image, M of them masked, V visible, D width, P = p*p*3.
"""

import functools
import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.base import LossAndTokens, LUTMethod, MaskIndices, MaskSampler, MethodConfig
from pretrain.methods.masking import Grid, block_masked, check_masked, check_random_masks, grid_masked, random_masked
from pretrain.methods.pr_mim import PRMIMConfig, build_aggregation, build_mask_indices
from pretrain.methods.predictor import MaskTokens
from pretrain.methods.targets import PatchTarget
from pretrain.models.decoder import AverageDecoder, ConvDecoder, Decoder, check_heads
from pretrain.models.patches import gather_tokens, patchify, render_predictions
from pretrain.models.vit import Arch, ViT
from pretrain.trainer.config import ModelConfig


def sample_masks(
    rng: np.random.Generator,
    *,
    grid: Grid,
    mask_type: str,
    count: int,
    pr_mim: PRMIMConfig | None,
    num_masks: int = 1,
) -> dict[str, np.ndarray]:
    """`visible` (V,), `masked` (M,) and of those `kept` (K,): grid positions, ascending, int64.

    Of several masks, drawn one after the other: (num_masks, V) and so on.
    """
    if num_masks > 1:
        one = functools.partial(sample_masks, rng, grid=grid, mask_type=mask_type, count=count, pr_mim=pr_mim)
        masks = [one() for _ in range(num_masks)]
        return {name: np.stack([mask[name] for mask in masks]) for name in masks[0]}
    if mask_type == "random":
        masked = random_masked(rng, 1, grid[0] * grid[1], count)
    else:
        masked = {"block": block_masked, "grid": grid_masked}[mask_type](rng, grid, count)[None]
    return {name: array[0] for name, array in build_mask_indices(rng, masked, pr_mim, grid[1]).items()}


def check_absolute(position: str, method: str) -> None:
    """Raises ValueError if the encoder's positions are not added to its tokens."""
    if position not in ("sincos", "learned"):
        raise ValueError(
            f"method {method} adds positions to its tokens, and model.position={position} does not: set "
            f"model.position=sincos, or learned"
        )


class MAEConfig(MethodConfig):
    """The keys that MAE and LC-MAE share."""

    mask_type: Literal["random", "block", "grid"] = Field("random", description="shape of the masked region")
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is predicted")
    num_masks: int = Field(1, ge=1, description="masks of an image, under each of which it is encoded and predicted")
    encoder_mask_tokens: bool = Field(False, description="mask tokens enter the encoder, not the decoder")
    decoder: Literal["transformer", "average", "conv"] = Field(
        "transformer", description="LC-MAE's Table 2; the next three keys are the transformer's"
    )
    decoder_embed_dim: int = Field(512, ge=4, multiple_of=4, description="width of the decoder")
    decoder_depth: int = Field(8, ge=1, description="blocks of the decoder")
    decoder_num_heads: int = Field(16, ge=1, description="heads of the decoder's attention")

    def count_patches(self, grid: Grid, patch_size: int) -> tuple[int, int]:
        """Patches of an image, N, and how many are masked: N - floor(N * (1 - ratio)), as the authors count."""
        patches = math.prod(grid)
        return patches, patches - int(patches * (1 - self.mask_ratio))

    def check(self, grid: Grid, model: ModelConfig) -> None:
        check_absolute(model.position, self.name)
        patches, masked = self.count_patches(grid, model.patch_size)
        check_masked(self.mask_ratio, masked, patches, "the image's")
        if self.mask_type == "grid" and (grid[0] % 2 or grid[1] % 2 or self.mask_ratio != 0.75):
            raise ValueError(
                f"method.mask_type=grid masks three of every 2x2 patches: it needs method.mask_ratio=0.75 and an even "
                f"grid, not {self.mask_ratio} on {grid[0]}x{grid[1]}"
            )
        check_heads(self.decoder_embed_dim, self.decoder_num_heads)
        if self.encoder_mask_tokens and self.decoder != "transformer":
            raise ValueError(
                f"method.encoder_mask_tokens=true decodes encoded mask tokens, and method.decoder={self.decoder} puts "
                f"its own at the masked patches: set method.decoder=transformer"
            )

    def check_pr_mim(self) -> None:
        if self.decoder != "transformer":
            raise ValueError(
                f"pr_mim throws tokens of a transformer; method.decoder={self.decoder} has none: leave it out"
            )

    def check_lut(self) -> None:
        check_random_masks(self.mask_type)
        if self.num_masks > 1:
            raise ValueError(f"lut has one mask for each view: set method.num_masks=1, not {self.num_masks}")


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
        dim, num_outputs = encoder.arch.dim, target.num_outputs
        self.mask_tokens = MaskTokens(dim) if config.encoder_mask_tokens else None
        if config.decoder == "transformer":
            arch = Arch(config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads)
            aggregation = build_aggregation(pr_mim, arch, encoder.grid)
            self.decoder: nn.Module = Decoder(
                dim,
                arch,
                encoder.grid,
                num_outputs,
                aggregation,
                mask_tokens=not config.encoder_mask_tokens,
                num_prefix_tokens=encoder.num_prefix_tokens,
            )
        elif config.decoder == "average":
            self.decoder = AverageDecoder(dim, encoder.grid, num_outputs)
        else:
            self.decoder = ConvDecoder(dim, encoder.grid, num_outputs)

    def mask_sampler(self) -> MaskSampler:
        grid = self.encoder.grid
        _, count = self.config.count_patches(grid, self.encoder.patch_size)
        config = self.config
        return functools.partial(
            sample_masks,
            grid=grid,
            mask_type=config.mask_type,
            count=count,
            pr_mim=self.pr_mim,
            num_masks=config.num_masks,
        )

    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        patches = patchify(images, self.encoder.patch_size)
        truth = self.target.ground_truth(images[:num_predicted], patches[:num_predicted])
        if self.config.num_masks > 1:  # adjacent, those of an image
            patches, truth = (x.repeat_interleave(self.config.num_masks, dim=0) for x in (patches, truth))
            mask_indices = {name: array.flatten(0, 1) for name, array in mask_indices.items()}
        encoded = self._encode(patches, **mask_indices)
        first = {name: array[: len(truth)] for name, array in mask_indices.items()}
        prediction = self._decode(encoded[: len(truth)], **first)
        loss = self.target.loss(prediction, gather_tokens(truth, first["masked"]))
        visible, prefix = mask_indices["visible"], self.encoder.num_prefix_tokens
        return LossAndTokens(loss, encoded[:, prefix : prefix + visible.shape[1]], visible)

    def _encode(self, patches: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """(B, N, P) uint8 patches -> encoded prefix tokens and visible patches, (B, P+V, D), then any mask tokens."""
        tokens = self.encoder.patch_embed(gather_tokens(patches, visible))
        if self.mask_tokens is None:
            return self._run_encoder(tokens, visible)
        tokens = torch.cat([tokens, self.mask_tokens(kept)], dim=1)
        return self._run_encoder(tokens, torch.cat([visible, kept], dim=1))

    def _run_encoder(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T, D) tokens at grid positions (B, T) -> encoded, prefix tokens first."""
        return self.encoder(tokens, positions)

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
        patches, masked = patchify(images, self.encoder.patch_size), mask_indices["masked"]
        prediction = self._predict(patches, **mask_indices)
        predicted = self.target.render(prediction, gather_tokens(self.target.ground_truth(images, patches), masked))
        return {"original": images, **render_predictions(patches, masked, predicted, self.encoder.grid)}
