"""MFF, multi-level feature fusion (Liu et al., arXiv:2308.00261): MAE that decodes a sum over several encoder blocks.

So deep blocks need not carry what pixels need. The output of each block but the last goes through its own projection,
and a softmax over learned scalars weights them all. The encoder's last norm is trained on the sum. Whatever uses the
encoder later applies it to the last block's output alone, as the authors do, although the scale differs. Batch
normalization, as in probes, hides that.

Shapes: B images, T tokens (class token, visible patches), D width, S blocks.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pretrain.methods.base import LossAndTokens, MaskIndices
from pretrain.methods.mae import MAE
from pretrain.methods.mae_config import MAEConfig
from pretrain.methods.masking import Grid
from pretrain.methods.multiscale import check_blocks
from pretrain.methods.pr_mim import PRMIMConfig
from pretrain.methods.targets import PatchTarget
from pretrain.models.vit import ViT, init_weights
from pretrain.trainer.config import ModelConfig


class MFF(MAE):
    """MAE with multi-level feature fusion; each block's share of the sum is logged as `weight_<block>`."""

    class Config(MAEConfig):
        """MAE's keys, and the blocks whose outputs are summed."""

        name: Literal["mff"] = "mff"
        blocks: tuple[int, ...] = Field(
            (1, 3, 5, 7, 9, 12), min_length=2, description="blocks whose outputs are summed; 1 is the first"
        )

        def check(self, grid: Grid, model: ModelConfig) -> None:
            super().check(grid, model)
            check_blocks(self.blocks, model)
            if self.inter_block_attention:
                raise ValueError(
                    "method.inter_block_attention=true computes a sum for each decoder block, but mff uses one for "
                    "all: set method.inter_block_attention=false, or method.name=mae"
                )

    def __init__(self, config: Config, encoder: ViT, target: PatchTarget, pr_mim: PRMIMConfig | None = None):
        super().__init__(config, encoder, target, pr_mim)
        self.blocks = config.blocks
        self.fusion = Fusion(encoder.arch.dim, len(config.blocks))

    def compute_loss(
        self, images: Tensor, mask_indices: MaskIndices, num_predicted: int | None = None
    ) -> LossAndTokens:
        result = super().compute_loss(images, mask_indices, num_predicted)
        shares = {f"weight_{block}": share for block, share in zip(self.blocks, self.fusion.shares, strict=True)}
        return result._replace(losses=result.losses | shares)

    def _run_encoder(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.encoder.norm(self.fusion(self.encoder(tokens, positions, hidden=self.blocks)))


class Fusion(nn.Module):
    """The weighted sum over blocks.

    Attributes:
        shares: (S,) the weights of the last sum, detached.
    """

    shares: Tensor

    def __init__(self, dim: int, count: int):
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count - 1)).apply(init_weights)
        self.logits = nn.Parameter(torch.ones(count))

    def forward(self, streams: Sequence[Tensor]) -> Tensor:
        """S residual streams (B, T, D), the last block's last -> (B, T, D)."""
        shares = self.logits.softmax(0)
        self.shares = shares.detach()
        total = shares[-1] * streams[-1]
        for share, projection, stream in zip(shares, self.projections, streams, strict=False):
            total = total + share * projection(stream)
        return total
