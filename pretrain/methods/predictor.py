"""From the visible patches of a sequence, a window or an image, to a prediction of its masked ones.

`Predictor`, of LoMaR, SimMIM and BEiT: mask tokens in the encoder, and a linear head on what becomes of them. Three
settings meet here: which masked tokens enter the encoder (all, or PR-MIM's kept ones), at which block they join the
visible ones (0, or later), and what makes the tokens that never entered (PR-MIM's fill).

`AsymmetricPredictor`, LoMaR's ablation: visible patches alone in the encoder, mask tokens in a decoder, as in MAE.

Shapes: G sequences (windows or images) of L patches, V of them visible, M masked, K kept, D width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.methods.masking import Grid
from pretrain.methods.partial import Partial, build_fill
from pretrain.methods.targets import take
from pretrain.models.attention import grid_buckets, pair_buckets
from pretrain.models.decoder import Decoder
from pretrain.models.vit import ARCHS, Arch, ViT, init_weights

if TYPE_CHECKING:
    from pretrain.config import ModelConfig


def check_join(join: int, model: "ModelConfig") -> None:
    """Raises ValueError where mask tokens would join behind the last block."""
    depth = ARCHS[model.arch].depth
    if join >= depth:
        raise ValueError(f"method.join={join}, but {model.arch} has {depth} blocks: set it to at most {depth - 1}")


class MaskTokens(nn.Module):
    """A learned token in place of each masked patch."""

    def __init__(self, dim: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        nn.init.normal_(self.token, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """(B, K, D) positions of the masked patches -> as many tokens."""
        return self.token + positions


class Predictor(nn.Module):
    """Predicts the masked patches of a sequence from its visible ones, through an encoder that it does not own.

    Args:
        encoder: whose width, patch and kind of position it fits.
        grid: rows and columns of a sequence: a window's, or the image's.
        outputs: values predicted for each masked patch.
        join: the block of the encoder at which mask tokens join.
        partial: PR-MIM's settings.
    """

    buckets: Tensor

    def __init__(self, encoder: ViT, grid: Grid, outputs: int, join: int, partial: Partial | None):
        super().__init__()
        dim = encoder.arch.dim
        self.join, self.length = join, grid[0] * grid[1]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.fill = build_fill(partial, encoder.arch, grid)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if partial else nn.Identity()
        self.head = nn.Linear(dim, outputs)
        self.register_buffer("buckets", grid_buckets(*grid), persistent=False)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(
        self,
        encoder: ViT,
        pixels: Tensor,
        place: Tensor,
        visible: Tensor,
        masked: Tensor,
        kept: Tensor,
        supervised: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Only visible patches are embedded and only masked ones go through the head: the rest is never looked at.

        Args:
            encoder: the one it was made for.
            pixels: (G, V, P) the visible patches, standardised.
            place: (G, L) the image's grid position of each patch of a sequence.
            visible, masked, kept: (G, V), (G, M) and (G, K) positions within the sequence.
            supervised: only so many of the first sequences are predicted, S; all of them unless it is given.

        Returns:
            The masked patches' (S, M, outputs), and the encoded visible tokens (G, V, D).
        """
        seen = encoder.patch_embed(pixels) + absolute(encoder, place, visible)
        if self.join:
            seen = encoder(seen, relative(encoder, self.buckets, visible), stop=self.join)
        raster = visible.shape[1] + kept.shape[1] == self.length
        if raster:  # then the buckets are the same for all
            entered = torch.arange(self.length, device=place.device).expand_as(place)
            tokens = self._fill_in(encoder, seen, place, visible, entered)
            buckets = self.buckets if encoder.relative else None
        else:
            entered = torch.cat([visible, kept], dim=1)
            tokens = torch.cat([seen, self._mask_tokens(encoder, place, kept).to(seen.dtype)], dim=1)
            buckets = relative(encoder, self.buckets, entered)
        encoded = encoder(tokens, buckets, start=self.join)[:, 1:]
        first, masked = encoded[:supervised], masked[:supervised]
        hidden = self.fill(first, entered[:supervised], masked) if self.fill else take(first, masked)
        return self.head(self.norm(hidden)), take(encoded, visible) if raster else encoded[:, : visible.shape[1]]

    def _fill_in(self, encoder: ViT, seen: Tensor, place: Tensor, visible: Tensor, everywhere: Tensor) -> Tensor:
        """Visible tokens (behind a class token, if late) among mask tokens everywhere else, in raster order."""
        first, seen = (seen[:, :1], seen[:, 1:]) if self.join else (seen[:, :0], seen)
        tokens = self._mask_tokens(encoder, place, everywhere).to(seen.dtype)
        return torch.cat([first, tokens.scatter(1, visible.unsqueeze(-1).expand_as(seen), seen)], dim=1)

    def _mask_tokens(self, encoder: ViT, place: Tensor, index: Tensor) -> Tensor:
        return self.mask_token.expand(*index.shape, -1) + absolute(encoder, place, index)


class AsymmetricPredictor(nn.Module):
    """Predicts the masked patches by a decoder that has the mask tokens; the encoder has the visible patches alone.

    Called as `Predictor`. The decoder's fixed positions are those within the sequence.

    Args:
        encoder: whose width and kind of position it fits.
        grid: rows and columns of a sequence: a window's, or the image's.
        outputs: values predicted for each masked patch.
        arch: the decoder's.
        partial: PR-MIM's settings.
    """

    buckets: Tensor

    def __init__(self, encoder: ViT, grid: Grid, outputs: int, arch: Arch, partial: Partial | None):
        super().__init__()
        self.decoder = Decoder(encoder.arch.dim, arch, grid, outputs, build_fill(partial, arch, grid))
        self.register_buffer("buckets", grid_buckets(*grid), persistent=False)

    def forward(
        self,
        encoder: ViT,
        pixels: Tensor,
        place: Tensor,
        visible: Tensor,
        masked: Tensor,
        kept: Tensor,
        supervised: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        seen = encoder.patch_embed(pixels) + absolute(encoder, place, visible)
        encoded = encoder(seen, relative(encoder, self.buckets, visible))
        prediction = self.decoder(encoded[:supervised], visible[:supervised], masked[:supervised], kept[:supervised])
        return prediction, encoded[:, 1:]


def absolute(encoder: ViT, place: Tensor, index: Tensor) -> Tensor | float:
    """The encoder's fixed positions, (G, T, D), of the patches at `index` (G, T) of sequences at `place` (G, L)."""
    return 0.0 if encoder.relative else encoder.pos_embed[0, 1 + place.gather(1, index)]


def relative(encoder: ViT, buckets: Tensor, index: Tensor) -> Tensor | None:
    """The relative positions, if the encoder has any, of a class token and the patches at `index` (G, T)."""
    return pair_buckets(buckets, index) if encoder.relative else None
