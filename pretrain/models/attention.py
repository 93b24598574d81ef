"""Self-attention, with or without relative position.

`RelativeKey` is LoMaR's contextual kind (iRPE "product" on keys). `RelativeBias` is BEiT's and SimMIM's kind: in
pretraining, all blocks share one, which the encoder owns; encoders from `downstream.checkpoints` have one per block.

Shapes: B sequences, H heads, L tokens, C channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.relative_position import NUM_BUCKETS, pad_keys
from pretrain.models.sdpa import aligned, fused_attention
from pretrain.models.window_attention import WindowTokens, window_attention

# For all pairs of tokens: buckets, or what the window kernel reads instead, or a bias that is already looked up.
Position = Tensor | WindowTokens


class RelativeKey(nn.Module):
    """A learned vector per bucket, shared by the heads of a layer; the query is *unscaled*, as in iRPE's code."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_dim, NUM_BUCKETS))

    def forward(self, q: Tensor, position: Position) -> Tensor:
        """The bias of the logits, q_i . r[bucket(i, j)]; or, for `WindowTokens`, the whole attention by the kernel.

        The bias is one matrix product per query position instead of a gather over all logits: as fast, and its backward
        pass is deterministic on a GPU, unlike that of a gather. The kernel is called here, not by `Attention`, since
        ZeRO-3 gathers the table only while this module runs.

        Args:
            q: (B, H, L, C) queries; for the kernel, queries, keys and values (B, L, 3, H, C).
            position: (L, L) int64 buckets, the same for all sequences, or one-hot for each sequence as from
                `pair_buckets`; or `WindowTokens`.

        Returns:
            (B, H, L, L); from the kernel (B, L, H, C).
        """
        table = self.lookup_table_weight[0]
        if isinstance(position, WindowTokens):
            return window_attention(q, table, position)
        if position.ndim == 2:
            bias = torch.einsum("bhic,ijc->bhij", q, _vectors(pad_keys(position), table))
        else:
            bias = torch.einsum("bhik,bijk->bhij", q @ table, position)
        return bias[..., : q.shape[2]]


def _vectors(buckets: Tensor, table: Tensor) -> Tensor:
    """The vector of each bucket: (L, L) and (C, NUM_BUCKETS) -> (L, L, C)."""
    # Not `is_compiling`: that is true in torch.export too, which cannot make a one-hot of constants and trains nothing.
    if not (buckets.is_cuda or torch.compiler.is_dynamo_compiling()):
        return F.embedding(buckets, table.T)
    # When compiled, an embedding's gradient is summed by atomic additions on every device: not deterministic.
    with torch.autocast(buckets.device.type, enabled=False):
        return F.one_hot(buckets, NUM_BUCKETS).to(table.dtype) @ table.T


class RelativeBias(nn.Module):
    """A learned number per head and exact offset, independent of the query. The table fits one grid only."""

    def __init__(self, heads: int, grid: tuple[int, int]):
        super().__init__()
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, heads))

    def forward(self, buckets: Tensor) -> Tensor:
        """`offset_buckets` (L, L) or `pair_offsets` (B, L, L) -> (B or 1, H, L, L), to be added to the logits."""
        table = self.relative_position_bias_table
        # On a GPU the gradient of an embedding may vary between runs; that of an index is sorted first.
        bias = (table[buckets] if buckets.is_cuda else F.embedding(buckets, table)).movedim(-1, -3)
        if buckets.ndim == 2:
            return bias[None]
        if bias.is_cuda and torch.is_autocast_enabled("cuda"):
            bias = aligned(bias.to(torch.get_autocast_dtype("cuda")))  # or each block would keep a copy
        return bias


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v for (B, H, L, C) tensors and an optional (B or 1, H, L, L) bias."""
    if q.is_cuda:
        return fused_attention(q, k, v, bias)
    # torch's fused CPU kernel has no backward for a bias and is slower in bf16 at the lengths of windows.
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names, plus `rpe_k` or `rpe_bias` where position is relative.

    Args:
        dim, heads: width and number of heads.
        relative: whether position is contextual and relative.
        bias_grid: the grid of a learned relative bias, used instead.
    """

    def __init__(self, dim: int, heads: int, relative: bool, bias_grid: tuple[int, int] | None = None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rpe_k = RelativeKey(dim // heads) if relative else None
        self.rpe_bias = RelativeBias(heads, bias_grid) if bias_grid else None

    def forward(self, x: Tensor, position: Position | None) -> Tensor:
        """(B, L, D) -> (B, L, D).

        Args:
            x: the tokens.
            position: of the encoder's kind; if the blocks share a bias, that bias, (B or 1, H, L, L); None if position
                is absolute.
        """
        B, L, D = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, D // self.heads)
        if isinstance(position, WindowTokens):
            assert self.rpe_k is not None
            return self.proj(self.rpe_k(qkv, position).flatten(2))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        assert position is not None or not (self.rpe_k or self.rpe_bias), "relative attention needs buckets"
        bias = position
        if self.rpe_k is not None:
            bias = self.rpe_k(q, position)
        elif self.rpe_bias is not None:
            bias = self.rpe_bias(position)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, L, D))
