"""MAE's decoder: a narrow transformer over the encoded visible tokens and a mask token at every place to predict."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.vit import Arch, Block, init_weights, sincos_positions


class Decoder(nn.Module):
    """Tokens carry fixed sin-cos positions, so their order does not matter and nothing is put back in raster order.

    Args:
        encoder_dim: width of what comes in.
        arch: its own width, blocks and heads.
        grid: rows and columns of the image's patches.
        outputs: values predicted for each patch.
        fill: makes the masked tokens that did not go through the blocks (`methods/partial.py`).
    """

    pos_embed: Tensor

    def __init__(
        self, encoder_dim: int, arch: Arch, grid: tuple[int, int], outputs: int, fill: nn.Module | None = None
    ):
        super().__init__()
        self.embed = nn.Linear(encoder_dim, arch.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
        self.register_buffer("pos_embed", F.pad(sincos_positions(arch.dim, *grid), (0, 0, 1, 0)), persistent=False)
        self.blocks = nn.ModuleList(Block(arch, relative=False) for _ in range(arch.depth))
        self.norm = nn.LayerNorm(arch.dim, eps=1e-6)
        self.pred = nn.Linear(arch.dim, outputs)
        self.fill = fill
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """Predicts the masked patches.

        Args:
            encoded: (B, 1+V, D) class token and visible tokens.
            visible, masked: (B, V) and (B, M) grid positions.
            kept: (B, K) those of the masked ones that get a mask token; all of them unless there is a `fill`.

        Returns:
            (B, M, outputs)
        """
        x = self.embed(encoded).float()
        x = x + self.pos_embed[F.pad(1 + visible, (1, 0))]
        hidden = self.mask_token + self.pos_embed[1 + kept]
        x = torch.cat([x, hidden], dim=1)
        for block in self.blocks:
            x = block(x, None)
        if self.fill is None:
            x = x[:, -masked.shape[1] :]
        else:
            x = self.fill(x[:, 1:], torch.cat([visible, kept], dim=1), masked)
        return self.pred(self.norm(x))
