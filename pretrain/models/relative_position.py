"""Relative positions of pairs of tokens as bucket ids: LoMaR's (iRPE "product"), and BEiT's exact offsets.

Shapes: B sequences, H heads, L tokens, C channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# iRPE's piecewise index function with the LoMaR authors' constants: an axis has 2 * 3 + 1 = 7 buckets.
_ALPHA, _BETA, _GAMMA = 1.9, 3.8, 15.2
_REACH = 3
AXIS_BUCKETS = 2 * _REACH + 1
CLASS_BUCKET = AXIS_BUCKETS * AXIS_BUCKETS
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


def product_buckets(rows: Tensor, cols: Tensor, span: int | None = None) -> Tensor:
    """The bucket of every (query, key) pair of patches, by iRPE's "product" rule.

    Args:
        rows, cols: (..., L) integer grid positions of the patches, in patches.
        span: the largest offset among them, if known; an exported program must not compute it from the positions.

    Returns:
        (..., L, L) int64 ids in 0..48; the offset is query minus key.
    """
    if span is None:
        span = int(max(rows.max() - rows.min(), cols.max() - cols.min()))
    table = torch.tensor([_axis_bucket(d) for d in range(-span, span + 1)], device=rows.device)
    row_bucket = table[rows[..., :, None] - rows[..., None, :] + span]
    col_bucket = table[cols[..., :, None] - cols[..., None, :] + span]
    return (row_bucket + _REACH) * AXIS_BUCKETS + col_bucket + _REACH


def grid_buckets(height: int, width: int, num_prefix_tokens: int = 1) -> Tensor:
    """(P + height*width) squared int64 bucket ids of P prefix tokens followed by a grid in raster order.

    The class token and registers have no place in the grid: all their pairs share the class token's bucket.
    """
    rows = torch.arange(height).repeat_interleave(width)
    cols = torch.arange(width).repeat(height)
    return F.pad(product_buckets(rows, cols, max(height, width) - 1), (num_prefix_tokens, 0) * 2, value=CLASS_BUCKET)


def pair_buckets(buckets: Tensor, index: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """The buckets of a subset of a grid's tokens, a different one for each sequence.

    Args:
        buckets: (P+N, P+N) int64 from `grid_buckets`.
        index: (B, T) grid positions; the prefix tokens are put in front of them.
        num_prefix_tokens: P, at least 1.

    Returns:
        (B, P+T, P+T, NUM_BUCKETS) one-hot: a matrix product is deterministic on a GPU, the gradient of a gather is not.
        On a GPU the keys are padded to a multiple of 8.
    """
    dtype = torch.get_autocast_dtype(index.device.type) if torch.is_autocast_enabled(index.device.type) else None
    ids = pad_keys(pair_offsets(buckets, index, num_prefix_tokens))
    return F.one_hot(ids, NUM_BUCKETS).to(dtype or torch.get_default_dtype())


def pair_offsets(buckets: Tensor, index: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Like `pair_buckets`, but the bucket ids themselves, (B, P+T, P+T) int64; also for those of `offset_buckets`."""
    tokens = F.pad(num_prefix_tokens + index, (num_prefix_tokens, 0))  # 0 for every prefix token: buckets are equal
    return buckets[tokens.unsqueeze(2), tokens.unsqueeze(1)]


def pad_keys(buckets: Tensor) -> Tensor:
    """On a GPU, pads the keys to a multiple of 8: fused attention would copy a bias whose rows are not aligned."""
    missing = -buckets.shape[-1] % 8 if buckets.is_cuda else 0
    return F.pad(buckets, (0, missing), value=CLASS_BUCKET) if missing else buckets


def offset_buckets(height: int, width: int, num_prefix_tokens: int = 1) -> Tensor:
    """(P + height*width) squared int64 rows of `RelativeBias`'s table for P prefix tokens and a grid in raster order.

    Every offset, query minus key, has its own row; the last three are class to patch, patch to class, class to class,
    which registers share with the class token.
    """
    rows = torch.arange(height).repeat_interleave(width)
    cols = torch.arange(width).repeat(height)
    ids = (rows[:, None] - rows + height - 1) * (2 * width - 1) + cols[:, None] - cols + width - 1
    offsets = (2 * height - 1) * (2 * width - 1)
    P = num_prefix_tokens
    buckets = F.pad(ids, (P, 0, P, 0), value=offsets)
    buckets[P:, :P], buckets[:P, :P] = offsets + 1, offsets + 2
    return buckets
