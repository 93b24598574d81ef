"""TEC's modules between encoder and targets: one joins the outputs of all blocks, one decodes for two targets.

Shapes: B images, N patches of an image, V of them visible, M masked, K kept, P prefix tokens, D the encoder's width, E
the decoder's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.models.aggregation import SpatialAggregation
from pretrain.models.decoder import DecoderInput
from pretrain.models.patches import gather_tokens
from pretrain.models.vit import Arch, Block, init_weights


class EncoderAdapter(nn.Module):
    """Joins and normalizes the outputs of all blocks, then projects them in groups of three.

    Each group goes through a projection and an MLP with a residual; the results are summed and normalized. If three
    does not divide the number of blocks, some groups are larger. (The authors' norms have PyTorch's epsilon.)
    """

    def __init__(self, dim: int, depth: int, hidden_dim: int):
        super().__init__()
        self.widths = [len(group) * dim for group in np.array_split(np.arange(depth), max(depth // 3, 1))]
        self.norm = nn.LayerNorm(depth * dim)
        self.fuse = nn.ModuleList(nn.Linear(width, dim) for width in self.widths)
        self.mlp = nn.ModuleList(Mlp(dim, hidden_dim) for _ in self.widths)
        self.out_norm = nn.LayerNorm(dim)
        self.apply(init_weights)

    def forward(self, outputs: Sequence[Tensor]) -> Tensor:
        """One (B, T, D) for each block -> (B, T, D)."""
        total: Tensor | float = 0.0
        groups = self.norm(torch.cat(list(outputs), dim=-1)).split(self.widths, dim=-1)
        for group, fuse, mlp in zip(groups, self.fuse, self.mlp, strict=True):
            fused = fuse(group)
            total = total + fused + mlp(fused)
        return self.out_norm(total)


class SharedDecoder(nn.Module):
    """MAE's decoder for several targets: each has its own entry and exit, and all go through the same blocks.

    Args:
        encoder_dim: width of the encoded tokens.
        arch: the decoder's width, blocks and heads.
        grid: rows and columns of the image's patches.
        num_outputs: values predicted for each token, by target.
        aggregations: for each target, the module, if any, for the tokens that do not go through the blocks (PR-MIM).
        num_prefix_tokens: the encoder's tokens in front of the patches, whose position here is zero.
    """

    def __init__(
        self,
        encoder_dim: int,
        arch: Arch,
        grid: tuple[int, int],
        num_outputs: Sequence[int],
        aggregations: Sequence[SpatialAggregation | None],
        num_prefix_tokens: int,
    ):
        super().__init__()
        self.num_prefix_tokens, self.length = num_prefix_tokens, grid[0] * grid[1]
        self.entries = nn.ModuleList(_Entry(encoder_dim, arch.dim, grid, num_prefix_tokens) for _ in num_outputs)
        self.blocks = nn.ModuleList(Block(arch, relative=False) for _ in range(arch.depth))
        self.exits = nn.ModuleList(
            _Exit(arch.dim, count, aggregation, self.length)
            for count, aggregation in zip(num_outputs, aggregations, strict=True)
        )
        self.blocks.apply(init_weights)

    def forward(self, encoded: Tensor, visible: Tensor, kept: Tensor, wanted: Sequence[Tensor | None]) -> list[Tensor]:
        """Predictions, by target.

        Args:
            encoded: (B, P+V, D) prefix tokens and encoded tokens.
            visible, kept: (B, V) and (B, K) grid positions of these tokens, and of those that get a mask token.
            wanted: for each target the (B, M) grid positions to predict; None for the class token and all N patches.

        Returns:
            (B, M, num_outputs) each, or (B, 1+N, num_outputs), in raster order.
        """
        x = torch.cat([entry(encoded, visible, kept) for entry in self.entries])
        for block in self.blocks:
            x = block(x, None)
        entered = torch.cat([visible, kept], dim=1)
        return [
            leave(tokens[:, :1] if positions is None else None, tokens[:, self.num_prefix_tokens :], entered, positions)
            for leave, tokens, positions in zip(self.exits, x.chunk(len(self.exits)), wanted, strict=True)
        ]


class _Entry(DecoderInput):
    """What one target's tokens go through before the blocks."""

    def __init__(self, encoder_dim: int, dim: int, grid: tuple[int, int], num_prefix_tokens: int):
        super().__init__(encoder_dim, dim, grid, mask_tokens=True, num_prefix_tokens=num_prefix_tokens)
        self.initialize()

    def forward(self, encoded: Tensor, visible: Tensor, kept: Tensor) -> Tensor:
        """(B, P+V, D) -> (B, P+V+K, E)"""
        return self.enter(encoded, visible, kept)[0]


class _Exit(nn.Module):
    """From tokens in any order to predictions at given places."""

    def __init__(self, dim: int, num_outputs: int, aggregation: SpatialAggregation | None, length: int):
        super().__init__()
        self.length, self.aggregation = length, aggregation
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, num_outputs).apply(init_weights)

    def forward(self, class_token: Tensor | None, x: Tensor, entered: Tensor, wanted: Tensor | None) -> Tensor:
        """Tokens (B, T, E) at grid positions `entered` (B, T) -> predictions at `wanted`, or at all of them."""
        if wanted is None:
            wanted = torch.arange(self.length, device=x.device).expand(len(x), -1)
        if self.aggregation is not None:
            tokens = self.aggregation(x, entered, wanted)
        else:  # all have entered
            tokens = gather_tokens(x, entered.argsort(dim=1).gather(1, wanted))
        if class_token is not None:
            tokens = torch.cat([class_token, tokens], dim=1)
        return self.pred(self.norm(tokens))
