"""Predicts the masked patches of a sequence, a window or an image, from its visible ones.

`Predictor`, for LoMaR, SimMIM and BEiT: mask tokens in the encoder, and a linear head on their outputs. It combines
three settings: which mask tokens enter the encoder (all, or PR-MIM's kept ones), before which block they enter (0, or
later), and how the tokens that never entered are computed (PR-MIM's spatial aggregation).

`AsymmetricPredictor`, LoMaR's ablation: only visible patches in the encoder, mask tokens in a decoder, as in MAE and
CrossMAE.

`PredictorMethod` is shared by methods on whole images, which differ in masks, predictor and default target.

Shapes: G sequences (windows or images) of L patches, V of them visible, M masked, K kept, D width.
"""

import math

import torch
from torch import Tensor, nn

from pretrain.methods.base import LossAndTokens, LUTMethod, MaskIndices
from pretrain.methods.decoders import DecoderConfig, build_decoder, encode, encoded_patches
from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig, build_aggregation
from pretrain.models.attention import Position
from pretrain.models.patches import gather_tokens, patchify
from pretrain.models.relative_position import pair_buckets, pair_offsets
from pretrain.models.vit import ARCHS, ViT, init_weights
from pretrain.models.window_attention import window_tokens
from pretrain.trainer.config import ModelConfig


def check_mask_token_block(block: int, model: ModelConfig) -> None:
    """Raises ValueError if mask tokens would enter after the last block."""
    depth = ARCHS[model.arch].depth
    if block >= depth:
        raise ValueError(
            f"method.mask_token_block={block}, but {model.arch} has {depth} blocks: set it to at most {depth - 1}"
        )


class MaskTokens(nn.Module):
    """A learned token in place of each masked patch."""

    def __init__(self, dim: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.token, std=0.02)

    def forward(self, indices: Tensor) -> Tensor:
        """(B, K) grid positions of the masked patches -> (B, K, D) tokens, all of them equal."""
        return self.token.expand(*indices.shape, -1)


class Predictor(nn.Module):
    """Predicts the masked patches of a sequence from its visible ones, through an encoder that it does not own.

    Args:
        encoder: determines width, patch size and kind of position.
        grid: rows and columns of a sequence: a window's, or the image's.
        num_outputs: values predicted for each masked patch.
        mask_token_block: the block of the encoder before which mask tokens enter.
        pr_mim: the add-on's settings.
    """

    buckets: Tensor

    def __init__(self, encoder: ViT, grid: Grid, num_outputs: int, mask_token_block: int, pr_mim: PRMIMConfig | None):
        super().__init__()
        dim = encoder.arch.dim
        self.mask_token_block, self.length = mask_token_block, grid[0] * grid[1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.aggregation = build_aggregation(pr_mim, encoder.arch, grid)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if pr_mim else nn.Identity()
        self.head = nn.Linear(dim, num_outputs)
        self.register_buffer("buckets", encoder.grid_position(grid), persistent=False)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        encoder: ViT,
        patches: Tensor,
        visible: Tensor,
        masked: Tensor,
        kept: Tensor,
        positions: Tensor | None = None,
        num_predicted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Only visible patches are embedded and only masked ones go through the head: nothing else is computed.

        Args:
            encoder: the one given at construction.
            patches: (G, V, P) uint8, the visible ones.
            visible, masked, kept: (G, V), (G, M) and (G, K) positions within the sequence.
            positions: (G, L) grid position in the image of each patch of a sequence; by default a sequence is an image.
            num_predicted: how many sequences to predict, S, the first ones; by default all.

        Returns:
            Predictions of the masked patches (S, M, num_outputs), and the encoded visible tokens (G, V, D).
        """
        all_indices = torch.arange(self.length, device=visible.device).expand(len(visible), -1)
        positions = all_indices if positions is None else positions
        visible_tokens = encoder.patch_embed(patches)
        if self.mask_token_block:
            position = token_position(encoder, self.buckets, positions, visible)
            visible_tokens = encoder(visible_tokens, position, stop=self.mask_token_block)
        raster_order = visible.shape[1] + kept.shape[1] == self.length
        if raster_order:  # the relative positions are then the same for all sequences
            entered = all_indices
            tokens = self._insert_visible(encoder, visible_tokens, positions, visible, entered)
        else:
            entered = torch.cat([visible, kept], dim=1)
            mask_tokens = self._mask_tokens(encoder, positions, kept).to(visible_tokens.dtype)
            tokens = torch.cat([visible_tokens, mask_tokens], dim=1)
        in_place = encoder.absolute and self.mask_token_block > 0
        order = None if raster_order else entered
        encoder_position = None if in_place else token_position(encoder, self.buckets, positions, order)
        encoded = encoder(tokens, encoder_position, start=self.mask_token_block)[:, encoder.num_prefix_tokens :]
        first, masked = encoded[:num_predicted], masked[:num_predicted]
        if self.aggregation is None:
            masked_tokens = gather_tokens(first, masked)
        else:
            masked_tokens = self.aggregation(first, entered[:num_predicted], masked)
        encoded_visible = gather_tokens(encoded, visible) if raster_order else encoded[:, : visible.shape[1]]
        return self.head(self.norm(masked_tokens)), encoded_visible

    def _insert_visible(
        self, encoder: ViT, visible_tokens: Tensor, positions: Tensor, visible: Tensor, indices: Tensor
    ) -> Tensor:
        """Visible tokens among mask tokens at all other positions, in raster order, after any prefix tokens."""
        prefix = encoder.num_prefix_tokens if self.mask_token_block else 0
        prefix_tokens, patch_tokens = visible_tokens[:, :prefix], visible_tokens[:, prefix:]
        tokens = self._mask_tokens(encoder, positions, indices).to(patch_tokens.dtype)
        inserted = tokens.scatter(1, visible.unsqueeze(-1).expand_as(patch_tokens), patch_tokens)
        return torch.cat([prefix_tokens, inserted], dim=1)

    def _mask_tokens(self, encoder: ViT, positions: Tensor, indices: Tensor) -> Tensor:
        """Mask tokens; late ones get their absolute positions here, since the encoder does not add them then."""
        tokens, late = self.mask_token.expand(*indices.shape, -1), self.mask_token_block
        if not (encoder.absolute and late):
            return tokens
        return encoder(tokens, positions.gather(1, indices), start=late, stop=late)


class AsymmetricPredictor(nn.Module):
    """Predicts the masked patches by a decoder with mask tokens; the encoder sees only the visible patches.

    Called like `Predictor`. The decoder's fixed positions are those within the sequence.

    Args:
        encoder: determines width and kind of position.
        grid: rows and columns of a sequence: a window's, or the image's.
        num_outputs: values predicted for each masked patch.
        config: the decoder's keys.
        pr_mim: the add-on's settings.
    """

    buckets: Tensor

    def __init__(self, encoder: ViT, grid: Grid, num_outputs: int, config: DecoderConfig, pr_mim: PRMIMConfig | None):
        super().__init__()
        self.config, self.decoder = config, build_decoder(config, encoder, grid, num_outputs, pr_mim)
        self.register_buffer("buckets", encoder.grid_position(grid), persistent=False)

    def forward(
        self,
        encoder: ViT,
        patches: Tensor,
        visible: Tensor,
        masked: Tensor,
        kept: Tensor,
        positions: Tensor,
        num_predicted: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        position = token_position(encoder, self.buckets, positions, visible)
        encoded = encode(encoder, encoder.patch_embed(patches), position, self.config)
        first = slice(num_predicted)
        prediction = self.decoder(encoded[..., first, :, :], visible[first], masked[first], kept[first])
        return prediction, encoded_patches(encoder, encoded, visible.shape[1])


class PredictorMethod(LUTMethod):
    """A method on whole images that leaves all work to its predictor; subclasses set the attributes in `__init__`."""

    predictor: nn.Module

    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        patches = patchify(images, self.encoder.patch_size)
        prediction, visible_tokens = self._predict(patches, mask_indices, num_predicted)
        truth = self.target.ground_truth(images[:num_predicted], patches[:num_predicted])
        truth = gather_tokens(truth, mask_indices["masked"][:num_predicted])
        return LossAndTokens(self.target.losses(prediction, truth), visible_tokens, mask_indices["visible"])

    def _predict(
        self, patches: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, P) uint8 patches -> the results of `Predictor`."""
        visible = gather_tokens(patches, mask_indices["visible"])
        return self.predictor(self.encoder, visible, **mask_indices, num_predicted=num_predicted)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_indices: MaskIndices) -> dict[str, Tensor]:
        """`original`, `masked` and the target's renderings of each image, (B, H, W, 3) uint8."""
        prediction, _ = self._predict(patchify(images, self.encoder.patch_size), mask_indices)
        return self.draw_whole_images(images, mask_indices["masked"], prediction)


def token_position(encoder: ViT, buckets: Tensor, positions: Tensor | None, indices: Tensor | None) -> Position:
    """The encoder's `position` argument for its prefix tokens and some patches of each sequence.

    Args:
        encoder: determines the kind of position.
        buckets: `grid_position` of the sequence's grid.
        positions: (G, L) grid position in the image of each patch of a sequence; None where sequences are images.
        indices: (G, T) the patches; None for all of them in raster order.
    """
    prefix = encoder.num_prefix_tokens
    if encoder.absolute:
        places = buckets if positions is None else positions
        if indices is None:
            return places
        return indices if positions is None else positions.gather(1, indices)
    if encoder.window_kernel:
        return window_tokens(math.isqrt(len(buckets) - prefix), indices, buckets.device, prefix)
    if indices is None:
        return buckets
    return (pair_offsets if encoder.bias else pair_buckets)(buckets, indices, prefix)
