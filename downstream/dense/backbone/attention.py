"""Memory-efficient self-attention with relative position over grids of tokens, in windows or global.

At 1024 pixels the logits of a ViT-B's global block are 800 MB, and autograd keeps several such tensors. Here they never
exist as a whole: logits and bias are computed for some rows of queries at a time, and again in the backward pass.

Windows cut off by the right and bottom edge of the grid are not padded: a token attends to the existing tokens of its
window, so nothing needs masking. There are at most four window shapes; the windows of one shape form one batch.

Shapes: B images, N grids (images, or windows of one shape), h heads, L tokens, C channels per head, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from downstream.dense.backbone.relative_position import (
    BucketTerms,
    Grid,
    decomposed_bias,
    decomposed_terms,
    one_hot_keys,
    product_bias,
    resize_table,
)
from pretrain.models.attention import attend

# Logits that exist at a time: fewer need less memory, more need fewer kernel calls.
_MAX_LOGITS = {"cpu": 2**24, "cuda": 2**26}

Bias = Callable[[Tensor, Grid, int, int], Tensor]


def attend_by_rows(q: Tensor, k: Tensor, v: Tensor, terms: Tensor, bias: Bias, grid: Grid) -> Tensor:
    """Attention that computes the logits for some rows of queries at a time, in the backward pass too.

    Args:
        q, k, v: (N, h, L, C), L = P + H*W with P prefix tokens (class token, registers) in front.
        terms: (N, h, L, K), the first argument of `bias`.
        bias: `product_bias` or `decomposed_bias`.

    Returns:
        (N, h, L, C)
    """
    height, width = grid
    num_prefix_tokens = q.shape[2] - height * width
    rows = max(1, _MAX_LOGITS[q.device.type] // (q.shape[0] * q.shape[1] * width * q.shape[2]))
    counts = [min(rows, height - top) * width for top in range(0, height, rows)]
    # `split` instead of slices: the gradient of each slice would be padded to the whole tensor.
    lengths = [num_prefix_tokens, *counts]
    parts = list(zip(q.split(lengths, 2), terms.split(lengths, 2), strict=True))
    # A prefix token's query has the same bias for all keys, which does not change its softmax.
    out = [attend(parts[0][0], k, v, None)] if num_prefix_tokens else []

    def some_rows(some_q: Tensor, some_terms: Tensor, k: Tensor, v: Tensor, top: int) -> Tensor:
        return attend(some_q, k, v, bias(some_terms, grid, top, num_prefix_tokens))

    for number, (some_q, some_terms) in enumerate(parts[1:]):
        arguments = (some_q, some_terms, k, v, number * rows)
        if torch.is_grad_enabled():
            out.append(checkpoint(some_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            out.append(some_rows(*arguments))
    return torch.cat(out, dim=2)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, terms: Tensor, grid: Grid) -> Tensor:
    """The same for `decomposed_terms`, using torch's fused kernels, which never store the logits.

    q.k + bias is one product of longer vectors, (q, terms) and (k, its row and column one-hot). Their length is padded
    to a multiple of 8, and values are padded to the same length, as flash attention requires. On a CPU, torch's kernel
    is slower than `attend_by_rows`: three times the arithmetic, and in bf16 far slower than matrix products.
    """
    channels = q.shape[-1]
    keys = one_hot_keys(grid, q.device, q.dtype, k.shape[2] - grid[0] * grid[1])
    long_q = torch.cat([q * channels**-0.5, terms.to(q.dtype)], dim=-1)
    long_k = torch.cat([k, keys.expand(*k.shape[:2], -1, -1)], dim=-1)
    padding = -long_q.shape[-1] % 8
    long_q, long_k = F.pad(long_q, (0, padding)), F.pad(long_k, (0, padding))
    long_v = F.pad(v, (0, long_q.shape[-1] - channels))
    return F.scaled_dot_product_attention(long_q, long_k, long_v, scale=1.0)[..., :channels]


class GridAttention(nn.Module):
    """Multi-head self-attention with timm's parameter names; a subclass for each kind of position.

    Args:
        dim, heads: width, and the number of heads that share it.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, window_size: int = 0) -> Tensor:
        """(B, L, D) tokens in raster order -> (B, L, D).

        Args:
            x: L = H*W, or more with prefix tokens in front; these attend to all tokens, and all tokens to them.
            grid: (H, W).
            window_size: side of the windows in tokens, from the top left corner; 0 for attention over the whole grid.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if window_size == 0:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(self.attend(q, k, v, grid, False).transpose(1, 2).flatten(2))
        assert x.shape[1] == grid[0] * grid[1], "a class token does not work with windows"
        (heights, rows), (widths, cols) = _split_side(grid[0], window_size), _split_side(grid[1], window_size)
        bands = []
        for band, row in zip(qkv.unflatten(1, grid).split(heights, 1), rows, strict=True):
            areas = zip(band.split(widths, 2), cols, strict=True)
            bands.append(torch.cat([self._attend_windows(area, (row, col)) for area, col in areas], dim=2))
        return self.proj(torch.cat(bands, dim=1).flatten(1, 2))

    def _attend_windows(self, qkv: Tensor, window: Grid) -> Tensor:
        """(B, Y, X, 3, h, C) of an area consisting of windows of one shape -> (B, Y, X, D)."""
        B, Y, X, _, h, C = qkv.shape
        rows, cols = window
        cells = qkv.view(B, Y // rows, rows, X // cols, cols, 3, h, C)
        q, k, v = cells.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, -1, h, rows * cols, C).unbind(0)
        out = self.attend(q, k, v, window, True)
        cells = out.view(B, Y // rows, X // cols, h, rows, cols, C).permute(0, 1, 4, 2, 5, 3, 6)
        return cells.reshape(B, Y, X, h * C)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, windowed: bool) -> Tensor:
        """(N, h, L, C) each -> (N, h, L, C), over the whole grid of a window or an image."""
        raise NotImplementedError


class RelativeAttention(GridAttention):
    """Attention with LoMaR's contextual relative position; buckets are offsets in patches, independent of the grid."""

    def __init__(self, dim: int, heads: int):
        super().__init__(dim, heads)
        self.rpe_k = BucketTerms(dim // heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, windowed: bool) -> Tensor:
        return attend_by_rows(q, k, v, self.rpe_k(q), product_bias, grid)


class DecomposedAttention(GridAttention):
    """Attention with ViTDet's decomposed relative position, initially zero so as to keep the pretrained positions.

    Args:
        dim, heads: width, and the number of heads that share it.
        grid: rows and columns of the window or image that the tables are for. They are interpolated for images of
            other sizes, as in ViTDet; windows at the edge use a part of them.
    """

    def __init__(self, dim: int, heads: int, grid: Grid):
        super().__init__(dim, heads)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * grid[0] - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * grid[1] - 1, dim // heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, windowed: bool) -> Tensor:
        table_h: Tensor = self.rel_pos_h
        table_w: Tensor = self.rel_pos_w
        if not windowed:
            table_h, table_w = resize_table(table_h, grid[0]), resize_table(table_w, grid[1])
        num_prefix_tokens = q.shape[2] - grid[0] * grid[1]
        terms = decomposed_terms(q[:, :, num_prefix_tokens:], table_h, table_w, grid)
        terms = F.pad(terms, (0, 0, num_prefix_tokens, 0))
        if q.is_cuda:
            return attend_fused(q, k, v, terms, grid)
        return attend_by_rows(q, k, v, terms, decomposed_bias, grid)


def _split_side(length: int, window_size: int) -> tuple[list[int], list[int]]:
    """The lengths of a side's parts (whole windows, and the rest if any), and the window size in each part."""
    rest = length % window_size
    extents, sides = [length - rest, rest], [window_size, rest]
    kept = [number for number in (0, 1) if extents[number]]
    return [extents[number] for number in kept], [sides[number] for number in kept]
