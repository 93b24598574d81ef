"""CrossMAE's decoder (Fu et al., section 3): mask tokens attend to the encoded tokens, and not to each other.

So a patch's prediction does not depend on which others are predicted, and only supervised patches need be computed.
With inter-block attention, each of its blocks attends to its own learned sum over the encoder's blocks.

Shapes: B images, T encoded tokens including the prefix tokens, V visible patches, M masked, K kept, D the encoder's
width, S its residual streams.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from pretrain.models.attention import attend
from pretrain.models.vit import Arch, ViT, init_weights, sincos_positions


class CrossAttention(nn.Module):
    """Multi-head attention of queries of one width to tokens of another."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, K, width) and (B, T, D) -> (B, K, width)."""
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attend(q, k, v, None).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """x + cross-attention(norm(x), context), then x + mlp(norm(x)); there is no self-attention."""

    def __init__(self, arch: Arch, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.cross_attn = CrossAttention(arch.dim, context_dim, arch.heads)
        self.norm2 = nn.LayerNorm(arch.dim, eps=1e-6)
        self.mlp = Mlp(arch.dim, 4 * arch.dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.cross_attn(self.norm1(x), context)
        return x + self.mlp(self.norm2(x))


class InterBlockAttention(nn.Module):
    """What each block of the decoder attends to: y_j = LN_j(sum_i W_ji f_i) over the encoder's residual streams f_i."""

    def __init__(self, num_streams: int, depth: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, num_streams))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(depth))
        nn.init.normal_(self.weight, std=num_streams**-0.5)

    def forward(self, streams: Tensor) -> list[Tensor]:
        """(S, B, T, D) -> (B, T, D) for each block."""
        sums = torch.einsum("js,sbtd->jbtd", self.weight, streams)
        return [norm(x) for norm, x in zip(self.norms, sums, strict=True)]


class CrossDecoder(nn.Module):
    """Cross-attention from the masked patches to the encoded tokens; queries have fixed sin-cos positions.

    Args:
        encoder_dim: width of the encoded tokens.
        arch: the decoder's width, blocks and heads.
        grid: rows and columns of the patches.
        num_outputs: values predicted for each patch.
        aggregation: computes the masked tokens that are not queries (`aggregation.py`). The visible patches, which are
            not tokens of this decoder, enter it through a linear layer, `embed`.
        num_streams: residual streams of the encoder, for inter-block attention; 0 without it.
    """

    pos_embed: Tensor

    def __init__(
        self,
        encoder_dim: int,
        arch: Arch,
        grid: tuple[int, int],
        num_outputs: int,
        aggregation: nn.Module | None = None,
        num_streams: int = 0,
    ):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, arch.dim))
        self.register_buffer("pos_embed", sincos_positions(arch.dim, *grid), persistent=False)
        self.blocks = nn.ModuleList(CrossBlock(arch, encoder_dim) for _ in range(arch.depth))
        self.inter_block = InterBlockAttention(num_streams, arch.depth, encoder_dim) if num_streams else None
        self.norm = nn.LayerNorm(arch.dim, eps=1e-6)
        self.pred = nn.Linear(arch.dim, num_outputs)
        self.embed = nn.Linear(encoder_dim, arch.dim) if aggregation is not None else None
        self.aggregation = aggregation
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor, visible: Tensor, masked: Tensor, kept: Tensor) -> Tensor:
        """Predicts the masked patches.

        Args:
            encoded: (B, T, D) prefix tokens and visible patches; with inter-block attention, these in all residual
                streams (S, B, T, D).
            visible: (B, V) grid positions of the encoded patches.
            masked: (B, M) grid positions.
            kept: (B, K) those of `masked` that are queries; all of them unless there is an `aggregation`.

        Returns:
            (B, M, num_outputs)
        """
        contexts = [encoded] * len(self.blocks) if self.inter_block is None else self.inter_block(encoded)
        x = self.mask_token + self.pos_embed[kept]
        for block, context in zip(self.blocks, contexts, strict=True):
            x = block(x, context)
        if self.embed is not None and self.aggregation is not None:
            patches = self.embed(contexts[-1][:, -visible.shape[1] :]).to(x.dtype)
            x = self.aggregation(torch.cat([patches, x], dim=1), torch.cat([visible, kept], dim=1), masked)
        return self.pred(self.norm(x))


def fix_last_norm(encoder: ViT) -> None:
    """Makes the weight and bias of an encoder's last norm constant; inter-block attention does not use them.

    They are not trained, so they must not be parameters. They stay in the encoder's file, as ones and zeros: features
    and fine-tuning start from a normalization without a scale.
    """
    dim = encoder.arch.dim
    for name, value in (("weight", torch.ones(dim)), ("bias", torch.zeros(dim))):
        delattr(encoder.norm, name)
        encoder.norm.register_buffer(name, value)
