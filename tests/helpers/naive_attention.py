"""Reference for the backbone's attention: pairwise over grids, in float64, from the papers' formulas."""

import math

import torch
from torch import Tensor, nn

from downstream.dense.backbone.attention import DecomposedAttention, GridAttention


def piecewise(offset: int) -> int:
    """iRPE's formula (18) with alpha 1.9, beta 3.8, gamma 15.2."""
    if abs(offset) <= 1.9:
        return offset
    far = 1.9 + math.log(abs(offset) / 1.9) / math.log(15.2 / 1.9) * 1.9
    return int(math.copysign(min(round(far), 3.8), offset))


def bucket(i: int, j: int, width: int) -> int:
    """Return the bucket of two patches in raster order, by the offset query minus key."""
    rows, cols = i // width - j // width, i % width - j % width
    return (piecewise(rows) + 3) * 7 + piecewise(cols) + 3


def stretched(table: Tensor, side: int) -> Tensor:
    """Interpolate a table of offsets linearly, with aligned centers and constant ends."""
    old, new = len(table), 2 * side - 1
    rows = []
    for place in range(new):
        at = min(max((place + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        low = int(at)
        rows.append(table[low] * (low + 1 - at) + table[min(low + 1, old - 1)] * (at - low))
    return torch.stack(rows)


def naive_attention(attention: GridAttention, x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(B, L, D) tokens -> (B, L, D), with an explicit bias for every pair and a mask for the windows.

    Gradients reach the module's own parameters.
    """
    height, width = grid
    count, first = height * width, x.shape[1] - height * width
    L, h, C = x.shape[1], attention.heads, x.shape[2] // attention.heads
    vectors = torch.zeros(L, L, C, dtype=x.dtype)
    mask = torch.zeros(L, L, dtype=x.dtype)
    if isinstance(attention, DecomposedAttention):
        down, right = attention.rel_pos_h, attention.rel_pos_w
        if not window:
            down, right = stretched(down, height), stretched(right, width)
        for i in range(count):
            for j in range(count):
                rows, cols = i // width - j // width, i % width - j % width
                if abs(rows) <= len(down) // 2 and abs(cols) <= len(right) // 2:
                    vector = down[rows + len(down) // 2] + right[cols + len(right) // 2]
                    vectors[first + i, first + j] = vector
    else:
        table = attention.rpe_k.lookup_table_weight[0]
        for i in range(L):
            for j in range(L):
                of_class = i < first or j < first
                vectors[i, j] = table[:, 49 if of_class else bucket(i - first, j - first, width)]
    if window:
        for i in range(count):
            for j in range(count):
                a, b = (i // width // window, i % width // window), (j // width // window, j % width // window)
                mask[i, j] = 0.0 if a == b else -math.inf
    q, k, v = attention.qkv(x).view(len(x), L, 3, h, C).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(2, 3) / math.sqrt(C) + (q.unsqueeze(3) * vectors).sum(-1) + mask
    return attention.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def randomized(module: nn.Module, seed: int = 1) -> nn.Module:
    """Add noise to all parameters, so that none keeps a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module
