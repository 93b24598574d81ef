"""Relative position on grids: a few terms per query, from which the bias of any key is computed on demand.

Shapes: N grids (images or windows) of `grid` = (H, W) tokens, h heads, C channels per head. Tokens are in raster
order, after the prefix tokens if there are any.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from pretrain.models.attention import RelativeKey
from pretrain.models.relative_position import CLASS_BUCKET, product_buckets

Grid = tuple[int, int]

_AXIS = math.isqrt(CLASS_BUCKET)


class BucketTerms(RelativeKey):
    """LoMaR's table; the terms are the query's products with all buckets, and `product_bias` makes the bias."""

    def forward(self, q: Tensor) -> Tensor:  # type: ignore[override]
        """(N, h, L, C) queries -> (N, h, L, 50)."""
        return q @ self.lookup_table_weight[0]


@lru_cache  # otherwise each forward pass would copy it to the device and make the host wait
@torch.inference_mode(False)  # otherwise a tensor cached by an evaluation could not be used in training
def _axis_one_hot(side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(side, side, 7): one-hot, the bucket of an axis that each pair of positions falls into."""
    positions = torch.arange(side)
    buckets = product_buckets(positions, torch.zeros_like(positions)) // _AXIS
    return F.one_hot(buckets, _AXIS).to(device, dtype)


def product_bias(terms: Tensor, grid: Grid, top: int = 0, num_prefix_tokens: int = 0) -> Tensor:
    """The bias of every key for queries in whole rows of a grid, starting at row `top`.

    A bucket combines a row bucket and a column bucket. So two small products with one-hot tables, first along the keys'
    columns, then along their rows, do the work of a gather, and their backward is deterministic on a GPU.

    Args:
        terms: (N, h, R*W, 50) of `BucketTerms`.
        num_prefix_tokens: number of class tokens and registers in front of the other keys, P.

    Returns:
        (N, h, R*W, P + H*W).
    """
    height, width = grid
    by_row = terms[..., :CLASS_BUCKET].unflatten(-1, (_AXIS, _AXIS)).unflatten(2, (-1, width))  # N, h, R, W, 7, 7
    count = by_row.shape[2]
    cols = _axis_one_hot(width, terms.device, terms.dtype).transpose(1, 2)
    rows = _axis_one_hot(height, terms.device, terms.dtype)[top : top + count, None]
    bias = (rows @ (by_row @ cols)).flatten(4).flatten(2, 3)
    return torch.cat([terms[..., CLASS_BUCKET:].expand(-1, -1, -1, num_prefix_tokens), bias], dim=-1)


def decomposed_terms(q: Tensor, table_h: Tensor, table_w: Tensor, grid: Grid) -> Tensor:
    """ViTDet's terms: the query's product with the vector of its offset to every row, and to every column.

    Args:
        q: (N, h, H*W, C).
        table_h, table_w: (2a-1, C) with a >= H, (2b-1, C) with b >= W: a vector per offset, query minus key.

    Returns:
        (N, h, H*W, H + W)
    """
    height, width = grid
    on_grid = q.unflatten(2, grid)
    rows = torch.einsum("nhyxc,ykc->nhyxk", on_grid, _per_pair(table_h, height))
    cols = torch.einsum("nhyxc,xkc->nhyxk", on_grid, _per_pair(table_w, width))
    return torch.cat([rows, cols], dim=-1).flatten(2, 3)


def _per_pair(table: Tensor, side: int) -> Tensor:
    """(2n-1, C) -> (side, side, C), n >= side."""
    positions = torch.arange(side, device=table.device)
    return F.embedding(positions[:, None] - positions + len(table) // 2, table)


def resize_table(table: Tensor, side: int) -> Tensor:
    """(2n-1, C) -> (2*side-1, C), linearly interpolated."""
    if len(table) == 2 * side - 1:
        return table
    return F.interpolate(table.T[None], 2 * side - 1, mode="linear")[0].T


def decomposed_bias(terms: Tensor, grid: Grid, top: int = 0, num_prefix_tokens: int = 0) -> Tensor:
    """Like `product_bias`, from `decomposed_terms` (N, h, R*W, H + W); the prefix tokens' bias is zero."""
    del top  # the terms already depend on their query's position
    rows, cols = terms.split(grid, dim=-1)
    bias = (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(-2)
    return F.pad(bias, (num_prefix_tokens, 0))


def one_hot_keys(grid: Grid, device: torch.device, dtype: torch.dtype, num_prefix_tokens: int) -> Tensor:
    """(P + H*W, H + W): each key's row and column, one-hot; the product of `decomposed_terms` with it is the bias."""
    height, width = grid
    rows = torch.eye(height, device=device, dtype=dtype).repeat_interleave(width, 0)
    cols = torch.eye(width, device=device, dtype=dtype).repeat(height, 1)
    return F.pad(torch.cat([rows, cols], dim=1), (0, 0, num_prefix_tokens, 0))


def resize_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resizes an absolute table (1, N, D) from one grid to another, bicubic as in `downstream.checkpoints.weights`."""
    if old == new:
        return table
    return resample_abs_pos_embed(table, list(new), old_size=list(old), num_prefix_tokens=0)
