"""What MAE and LoMaR share for a decoder that is separate from the encoder: its keys, and its input.

Shapes: G sequences (images or windows), T encoded tokens of each including the prefix tokens, V visible patches,
D the encoder's width, S its residual streams.
"""

import math

import torch
from pydantic import Field
from torch import Tensor

from pretrain.methods.base import MaskIndices, MethodConfig
from pretrain.methods.masking import Grid
from pretrain.methods.pr_mim import PRMIMConfig, build_aggregation
from pretrain.models.attention import Position
from pretrain.models.cross_decoder import CrossDecoder, fix_last_norm
from pretrain.models.decoder import Decoder, check_heads
from pretrain.models.vit import Arch, ViT


class DecoderConfig(MethodConfig):
    """The keys of a transformer decoder with self-attention or cross-attention."""

    decoder: str
    decoder_embed_dim: int = Field(512, ge=4, multiple_of=4, description="width of the decoder")
    decoder_depth: int = Field(8, ge=1, description="blocks of the decoder")
    decoder_num_heads: int = Field(16, ge=1, description="heads of the decoder's attention")
    inter_block_attention: bool = Field(
        False, description="decoder=cross: each block attends to a learned sum over the encoder's blocks"
    )
    predict_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of all patches that is predicted, drawn at random from the masked; unset: all of these",
    )

    def num_predicted(self, patches: int) -> int | None:
        """How many masked patches are predicted, floor(N * ratio); None: all of them."""
        return None if self.predict_ratio is None else int(patches * self.predict_ratio)

    def check_decoder(self, patches: int, masked: int) -> None:
        """Raises ValueError if the keys do not fit each other, or do not fit N patches with M of them masked."""
        check_heads(self.decoder_embed_dim, self.decoder_num_heads)
        if self.inter_block_attention and self.decoder != "cross":
            raise ValueError(
                f"method.inter_block_attention=true needs cross-attention, which method.decoder={self.decoder} does "
                f"not have: set method.decoder=cross"
            )
        predicted = self.num_predicted(patches)
        if predicted is not None and not 0 < predicted <= masked:
            half = math.ceil(100 * max(masked // 2, 1) / patches) / 100
            raise ValueError(
                f"method.predict_ratio={self.predict_ratio} predicts {predicted} of {patches} patches, but {masked} "
                f"{'is' if masked == 1 else 'are'} masked: set it to {half}, or leave it out to predict all of them"
            )

    def check_pr_mim(self) -> None:
        if self.predict_ratio is not None:
            raise ValueError(
                f"pr_mim predicts all masked patches, including thrown ones, but method.predict_ratio="
                f"{self.predict_ratio} predicts only some: leave one of them out"
            )


def build_decoder(
    config: DecoderConfig,
    encoder: ViT,
    grid: Grid,
    num_outputs: int,
    pr_mim: PRMIMConfig | None,
    mask_tokens: bool = True,
) -> Decoder | CrossDecoder:
    """Builds the decoder of a configuration; for inter-block attention, also makes the encoder's last norm constant.

    Args:
        config: its keys.
        encoder: its tokens are decoded.
        grid: rows and columns of a sequence.
        num_outputs: values predicted for each patch.
        pr_mim: the add-on's settings.
        mask_tokens: whether the decoder adds mask tokens; not if they went through the encoder.
    """
    dim, arch = encoder.arch.dim, Arch(config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads)
    aggregation = build_aggregation(pr_mim, arch, grid)
    if config.decoder != "cross":
        return Decoder(dim, arch, grid, num_outputs, aggregation, mask_tokens, encoder.num_prefix_tokens)
    if not config.inter_block_attention:
        return CrossDecoder(dim, arch, grid, num_outputs, aggregation)
    fix_last_norm(encoder)
    return CrossDecoder(dim, arch, grid, num_outputs, aggregation, num_streams=encoder.arch.depth + 1)


def encode(encoder: ViT, tokens: Tensor, position: Position, config: DecoderConfig) -> Tensor:
    """The decoder's input: (G, T, D), or with inter-block attention all residual streams, (S, G, T, D)."""
    if not config.inter_block_attention:
        return encoder(tokens, position)
    return torch.stack(encoder(tokens, position, hidden=range(encoder.arch.depth + 1)))


def encoded_patches(encoder: ViT, encoded: Tensor, count: int) -> Tensor:
    """The first `count` patches of the result of `encode`, after the encoder's last norm: (G, count, D)."""
    if encoded.ndim == 4:
        encoded = encoder.norm(encoded[-1])
    return encoded[:, encoder.num_prefix_tokens :][:, :count]


def predict_all(config: DecoderConfig, mask_indices: MaskIndices, patches: int) -> MaskIndices:
    """Indices for display: they predict all patches that are not visible, whatever `predict_ratio` says."""
    if config.predict_ratio is None:
        return mask_indices
    visible = mask_indices["visible"]
    masked = torch.ones(*visible.shape[:-1], patches, dtype=torch.bool, device=visible.device)
    positions = masked.scatter(-1, visible, False).nonzero()[:, -1].view(*visible.shape[:-1], -1)
    return mask_indices | {"masked": positions, "kept": positions}
