"""MAE's decoder, a narrow transformer over encoded visible tokens and mask tokens, and two local decoders.

Shapes: B images, N patches of an image, V of them visible, M masked, D the encoder's width.
"""

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.models.vit import Arch, Block, init_weights, sincos_positions


def check_heads(dim: int, heads: int) -> None:
    """Raises ValueError if a decoder's width is not divisible by its number of heads."""
    if dim % heads:
        raise ValueError(
            f"method.decoder_embed_dim={dim} is not divisible by method.decoder_num_heads={heads}: change one of them"
        )


class DecoderInput(nn.Module):
    """From the encoder's width to a decoder's, with mask tokens and fixed sin-cos positions; not initialized yet.

    Args:
        encoder_dim, dim: both widths.
        grid: rows and columns of the image's patches.
        mask_tokens, num_prefix_tokens: as for `Decoder`.
    """

    pos_embed: Tensor

    def __init__(self, encoder_dim: int, dim: int, grid: tuple[int, int], mask_tokens: bool, num_prefix_tokens: int):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)) if mask_tokens else None
        self.register_buffer("pos_embed", F.pad(sincos_positions(dim, *grid), (0, 0, 1, 0)), persistent=False)

    def initialize(self) -> None:
        """Initializes all weights of the module; a subclass calls this when it is complete."""
        self.apply(init_weights)
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=0.02)

    def enter(self, encoded: Tensor, visible: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, P+V, D) tokens -> (B, P+V+K, E) with mask tokens, if there are any, and (B, V+K) grid positions."""
        x = self.embed(encoded).float()
        x = x + self.pos_embed[F.pad(1 + visible, (self.num_prefix_tokens, 0))]
        if self.mask_token is None or kept is None:
            return x, visible
        x = torch.cat([x, self.mask_token + self.pos_embed[1 + kept]], dim=1)
        return x, torch.cat([visible, kept], dim=1)


class Decoder(DecoderInput):
    """A transformer. Tokens have fixed sin-cos positions, so their order does not matter and is not restored.

    Args:
        encoder_dim: width of the encoded tokens.
        arch: the decoder's width, blocks and heads.
        grid: rows and columns of the image's patches.
        num_outputs: values predicted for each patch.
        aggregation: computes the masked tokens that do not go through the blocks (`aggregation.py`).
        mask_tokens: whether it has mask tokens; not in an auto-encoder, nor if the encoder has them.
        num_prefix_tokens: the encoder's tokens in front of the patches, whose position here is zero.
    """

    def __init__(
        self,
        encoder_dim: int,
        arch: Arch,
        grid: tuple[int, int],
        num_outputs: int,
        aggregation: nn.Module | None = None,
        mask_tokens: bool = True,
        num_prefix_tokens: int = 1,
    ):
        super().__init__(encoder_dim, arch.dim, grid, mask_tokens, num_prefix_tokens)
        self.blocks = nn.ModuleList(Block(arch, relative=False) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.dim, eps=1e-6)
        self.pred: nn.Module = nn.Linear(arch.dim, num_outputs)
        self.aggregation = aggregation
        self.initialize()

    def forward(
        self, encoded: Tensor, visible: Tensor, masked: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Predicts the masked patches, or the encoded ones if nothing is masked.

        Args:
            encoded: (B, P+V, D) prefix tokens and encoded tokens.
            visible: (B, V) their grid positions; those of encoded mask tokens come last.
            masked: (B, M) grid positions.
            kept: (B, K) those of `masked` that get a mask token here; all of them unless there is an `aggregation`.

        Returns:
            (B, M, num_outputs), or (B, V, num_outputs) without `masked`.
        """
        x, entered = self.enter(encoded, visible, kept)
        for block in self.blocks:
            x = block(x, None)
        if masked is None:
            x = x[:, self.num_prefix_tokens :]
        elif self.aggregation is None:
            x = x[:, -masked.shape[1] :]
        else:
            x = self.aggregation(x[:, self.num_prefix_tokens :], entered, masked)
        return self.pred(self.norm(x))


class _FilledGrid(nn.Module):
    """The encoded image: visible tokens at their positions, a mask token at the others; plus sin-cos positions."""

    pos_embed: Tensor

    def __init__(self, dim: int, grid: tuple[int, int]):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_buffer("pos_embed", sincos_positions(dim, *grid), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """(B, P+V, D) with prefix tokens, which are dropped, and (B, V) positions -> (B, N, D) in raster order."""
        visible_tokens = encoded[:, -visible.shape[1] :].float()
        tokens = self.mask_token.expand(len(visible_tokens), len(self.pos_embed), -1)
        return tokens.scatter(1, visible.unsqueeze(-1).expand_as(visible_tokens), visible_tokens) + self.pos_embed


class AverageDecoder(nn.Module):
    """LC-MAE's "weighted average" (Table 2): a fixed 5x5 Gaussian, sigma 1, over the filled grid, then an MLP.

    The Gaussian's weights sum to one over the patches inside the grid, so the border does not fade. Called like
    `Decoder`.
    """

    average: Tensor

    def __init__(self, encoder_dim: int, grid: tuple[int, int], num_outputs: int):
        super().__init__()
        self.restore = _FilledGrid(encoder_dim, grid)
        self.register_buffer("average", gaussian_average(*grid), persistent=False)
        self.norm = nn.LayerNorm(encoder_dim, eps=1e-6)
        self.mlp = Mlp(encoder_dim, 4 * encoder_dim, num_outputs)
        self.mlp.apply(init_weights)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        averaged = self.average @ self.restore(encoded, visible)
        return self.mlp(self.norm(averaged.take_along_dim(masked.unsqueeze(-1), 1)))


class ConvDecoder(nn.Module):
    """LC-MAE's "conv layer" (Table 2): one zero-padded 5x5 convolution of the filled grid. Called like `Decoder`."""

    def __init__(self, encoder_dim: int, grid: tuple[int, int], num_outputs: int):
        super().__init__()
        self.grid = grid
        self.restore = _FilledGrid(encoder_dim, grid)
        self.conv = nn.Conv2d(encoder_dim, num_outputs, kernel_size=5, padding=2)
        self.conv.apply(init_weights)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        image = self.restore(encoded, visible).transpose(1, 2).unflatten(2, self.grid)
        return self.conv(image).flatten(2).transpose(1, 2).take_along_dim(masked.unsqueeze(-1), 1)


def gaussian_average(height: int, width: int, sigma: float = 1.0, reach: int = 2) -> Tensor:
    """(N, N) weights of every patch's neighbors up to `reach` rows and columns away; each row sums to one."""
    rows = torch.arange(height).repeat_interleave(width)
    cols = torch.arange(width).repeat(height)
    down, right = rows[:, None] - rows, cols[:, None] - cols
    near = (down.abs() <= reach) & (right.abs() <= reach)
    weights = torch.exp(-(down**2 + right**2) / (2 * sigma**2)) * near
    return weights / weights.sum(1, keepdim=True)
