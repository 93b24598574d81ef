"""Relative position: LoMaR's contextual kind (iRPE "product" on keys), as a bias of attention's logits.

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


def axis_buckets(length: int) -> Tensor:
    """(length, length) int64: the bucket along one axis, 0..6, of each query (row) and key (column)."""
    buckets = [[_axis_bucket(query - key) + _REACH for key in range(length)] for query in range(length)]
    return torch.tensor(buckets)


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
        On a GPU the keys are padded to a multiple of 8.
    """
    tokens = F.pad(1 + index, (1, 0))
    dtype = torch.get_autocast_dtype(index.device.type) if torch.is_autocast_enabled(index.device.type) else None
    ids = _pad_keys(buckets[tokens.unsqueeze(2), tokens.unsqueeze(1)])
    return F.one_hot(ids, NUM_BUCKETS).to(dtype or torch.get_default_dtype())


def _pad_keys(buckets: Tensor) -> Tensor:
    """On a GPU, more keys up to a multiple of 8: fused attention would copy a bias whose rows are not aligned so."""
    missing = -buckets.shape[-1] % 8 if buckets.is_cuda else 0
    return F.pad(buckets, (0, missing), value=CLASS_BUCKET) if missing else buckets


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
            bias = torch.einsum("bhic,ijc->bhij", q, _vectors(_pad_keys(buckets), table))
        else:
            bias = torch.einsum("bhik,bijk->bhij", q @ table, buckets)
        return bias[..., : q.shape[2]]


def _vectors(buckets: Tensor, table: Tensor) -> Tensor:
    """The vector of each bucket: (L, L) and (C, NUM_BUCKETS) -> (L, L, C)."""
    if not buckets.is_cuda:
        return F.embedding(buckets, table.T)
    # Compiled, the gradient of an embedding is a sum by atomic additions: not deterministic.
    with torch.autocast("cuda", enabled=False):
        return F.one_hot(buckets, NUM_BUCKETS).to(table.dtype) @ table.T


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
