"""Top-k accuracy: the one definition that every evaluation uses."""

from collections.abc import Sequence

import torch
from torch import Tensor


def topk_hits(scores: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5)) -> Tensor:
    """(B, len(ks)) int64, 1 where one of the k largest scores belongs to a right class, else 0.

    A row with non-finite scores has no hits: NaN sorts as the largest, so a diverged classifier would be right about
    its first class.

    Args:
        scores: (B, C); with fewer than k classes, all of them count.
        targets: the right class of each row, int64 (B,), or bool (B, C) where several may be right.
        ks: the values of k. For k = 1 alone, the first of equal scores is the largest; otherwise any of them may be.
    """
    most = min(max(ks), scores.shape[1])
    best = scores.argmax(1, keepdim=True) if most == 1 else scores.topk(most).indices
    right = best == targets[:, None] if targets.ndim == 1 else targets.gather(1, best)
    right &= torch.isfinite(scores).all(1, keepdim=True)
    return torch.stack([right[:, :k].any(1) for k in ks], dim=1).long()
