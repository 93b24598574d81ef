"""Self-attention with contextual relative position (iRPE "product" on keys), as LoMaR uses it.

`RelativeBias` is BEiT's and SimMIM's kind, for encoders that `downstream.checkpoints` loads; no method trains it.

Shapes: B sequences, H heads, L tokens, C channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# iRPE's piecewise index function with the LoMaR authors' constants: an axis has 2 * 3 + 1 = 7 buckets.
_ALPHA, _BETA, _GAMMA = 1.9, 3.8, 15.2
_REACH = 3
_AXIS = 2 * _REACH + 1
CLASS_BUCKET = _AXIS * _AXIS
NUM_BUCKETS = CLASS_BUCKET + 1


def _axis_bucket(offset: int) -> int:
    """The bucket, -3..3, of an offset in patches along one axis: near ones exactly, distant ones by their logarithm."""
    distance = abs(offset)
    if distance <= _ALPHA:
        return offset
    log_distance = _ALPHA + math.log(distance / _ALPHA) / math.log(_GAMMA / _ALPHA) * (_BETA - _ALPHA)
    return int(math.copysign(min(round(log_distance), int(_BETA)), offset))


def product_buckets(rows: Tensor, cols: Tensor) -> Tensor:
    """The bucket of every (query, key) pair of patches, by iRPE's "product" rule.

    Args:
        rows, cols: (..., L) integer grid positions of the patches, in patches.

    Returns:
        (..., L, L) int64 ids in 0..48; the offset is query minus key.
    """
    span = int(max(rows.max() - rows.min(), cols.max() - cols.min()))
    table = torch.tensor([_axis_bucket(d) for d in range(-span, span + 1)], device=rows.device)
    row_bucket = table[rows[..., :, None] - rows[..., None, :] + span]
    col_bucket = table[cols[..., :, None] - cols[..., None, :] + span]
    return (row_bucket + _REACH) * _AXIS + col_bucket + _REACH


def grid_buckets(height: int, width: int) -> Tensor:
    """(1 + height*width) squared int64 bucket ids of a class token followed by a grid in raster order."""
    rows = torch.arange(height).repeat_interleave(width)
    cols = torch.arange(width).repeat(height)
    return F.pad(product_buckets(rows, cols), (1, 0, 1, 0), value=CLASS_BUCKET)


def pair_buckets(buckets: Tensor, index: Tensor) -> Tensor:
    """The buckets of a subset of a grid's tokens, a different one for each sequence.

    Args:
        buckets: (1+N, 1+N) int64 of `grid_buckets`.
        index: (B, T) grid positions; the class token is put in front of them.

    Returns:
        (B, 1+T, 1+T, NUM_BUCKETS) one-hot: a matrix product is deterministic on a GPU, the gradient of a gather is not.
    """
    tokens = F.pad(1 + index, (1, 0))
    dtype = torch.get_autocast_dtype(index.device.type) if torch.is_autocast_enabled(index.device.type) else None
    ids = buckets[tokens.unsqueeze(2), tokens.unsqueeze(1)]
    return F.one_hot(ids, NUM_BUCKETS).to(dtype or torch.get_default_dtype())


class RelativeKey(nn.Module):
    """A learned vector per bucket, shared by the heads of a layer; the query is *unscaled*, as in iRPE's code."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_dim, NUM_BUCKETS))

    def forward(self, q: Tensor, buckets: Tensor) -> Tensor:
        """Bias of the logits: q_i . r[bucket(i, j)].

        One matrix product per query position instead of a gather over all logits: as fast, and its backward pass is
        deterministic on a GPU, unlike that of a gather.

        Args:
            q: (B, H, L, C) queries.
            buckets: (L, L) int64, the same for all sequences, or one-hot for each sequence as from `pair_buckets`.

        Returns:
            (B, H, L, L)
        """
        table = self.lookup_table_weight[0]
        if buckets.ndim == 2:
            return torch.einsum("bhic,ijc->bhij", q, F.embedding(buckets, table.T))
        return torch.einsum("bhik,bijk->bhij", q @ table, buckets)


def offset_buckets(height: int, width: int) -> Tensor:
    """(1 + height*width) squared int64 rows of `RelativeBias`'s table for a class token and a grid in raster order.

    Every offset, query minus key, has its own row; the last three are class to patch, patch to class, class to class.
    """
    rows = torch.arange(height).repeat_interleave(width)
    cols = torch.arange(width).repeat(height)
    ids = (rows[:, None] - rows + height - 1) * (2 * width - 1) + cols[:, None] - cols + width - 1
    offsets = (2 * height - 1) * (2 * width - 1)
    buckets = F.pad(ids, (1, 0, 1, 0), value=offsets)
    buckets[1:, 0], buckets[0, 0] = offsets + 1, offsets + 2
    return buckets


class RelativeBias(nn.Module):
    """A learned number per head and exact offset, independent of the query. The table fits one grid only."""

    def __init__(self, heads: int, grid: tuple[int, int]):
        super().__init__()
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, heads))

    def forward(self, q: Tensor, buckets: Tensor) -> Tensor:
        """(1, H, L, L), to be added to the logits; `buckets` (L, L) int64 as from `offset_buckets`."""
        return F.embedding(buckets, self.relative_position_bias_table).permute(2, 0, 1)[None]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v for (B, H, L, C) tensors and an optional (B or 1, H, L, L) bias."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
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

    def forward(self, x: Tensor, buckets: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D); `buckets` for the kind of relative position, None if position is absolute."""
        B, L, D = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        for relative in (self.rpe_k, self.rpe_bias):
            if relative is not None:
                assert buckets is not None, "relative attention needs the buckets of its tokens"
                bias = relative(q, buckets)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).reshape(B, L, D))
