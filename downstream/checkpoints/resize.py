"""Resizes BEiT's relative bias tables for another grid."""

import torch
from torch import Tensor


def resize_bias(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resizes a bias table as BEiT's authors do: near offsets keep their values, far ones stretch.

    (Bicubic interpolation stretches all alike: an offset of one patch would get the bias of a fraction of one.)

    Args:
        table: ((2h-1)(2w-1) + 3, heads), in fp32.
        old, new: (h, w) before and after.
    """
    offsets = table[:-3].T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)
    resized = _stretch(old[0], new[0]).T @ offsets @ _stretch(old[1], new[1])
    return torch.cat([resized.flatten(1).T, table[-3:]])


def _stretch(old: int, new: int) -> Tensor:
    """(2*old-1, 2*new-1): linear interpolation along one axis of a table, its entries placed in geometric progression.

    The entries are at 1, 1+q, 1+q+q^2, ... with q such that the outermost ones coincide; a table that shrinks loses its
    edges.
    """
    if old == 1:
        return torch.ones(1, 2 * new - 1)
    q = 1.0
    if 2 < old < new:
        low, high = 1.0, float(new)
        while high - low > 1e-9:
            q = (low + high) / 2
            low, high = (low, q) if sum(q**k for k in range(old - 1)) > new - 1 else (q, high)
    outward = torch.tensor([sum(q**k for k in range(n)) for n in range(old)], dtype=torch.float64)
    entries = torch.cat([-outward.flip(0), outward[1:]])
    wanted = torch.arange(1 - new, new, dtype=torch.float64).clamp(entries[0], entries[-1])
    right = torch.searchsorted(entries, wanted).clamp(1, len(entries) - 1)
    fraction = (wanted - entries[right - 1]) / (entries[right] - entries[right - 1])
    weights = torch.zeros(len(entries), len(wanted), dtype=torch.float64)
    weights.scatter_add_(0, (right - 1)[None], (1 - fraction)[None])
    return weights.scatter_add_(0, right[None], fraction[None]).float()
