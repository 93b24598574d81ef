"""The metrics of the robustness sets, computed from logits and correct classes."""

import torch
from torch import Tensor

from downstream.classify.robustness.datasets import ALEXNET_ERRORS
from pretrain.trainer.accuracy import topk_hits


def top1_hits(logits: Tensor, right: Tensor, candidates: Tensor | None = None) -> Tensor:
    """(B, 1) of 0 and 1: whether the largest logit belongs to a correct class.

    Args:
        logits: (B, 1000); a row with a non-finite logit counts as 0.
        right: bool (B, 1000).
        candidates: the classes to choose from, ascending; by default, all.
    """
    finite = torch.isfinite(logits).all(1, keepdim=True)
    if candidates is not None:
        logits, right = logits[:, candidates], right[:, candidates]
    return topk_hits(logits, right, ks=(1,)) * finite


def confidence(logits: Tensor, candidates: Tensor) -> Tensor:
    """(B,) float64: the largest probability in a softmax over only the candidate classes."""
    others = torch.full_like(logits, -torch.inf)
    masked = others.index_copy(1, candidates.to(logits.device), logits[:, candidates])
    return masked.double().softmax(1).amax(1)


def mean_corruption_error(errors: dict[str, list[float]]) -> dict[str, float]:
    """`mce`, and `ce_*` of each corruption, relative to AlexNet's, from the errors at all severities.

    CE = sum of errors / sum of AlexNet's errors; mCE = mean of the 15 CE.
    """
    assert errors.keys() == ALEXNET_ERRORS.keys()
    ce = {name: sum(values) / (len(values) * ALEXNET_ERRORS[name]) for name, values in errors.items()}
    return {"mce": sum(ce.values()) / len(ce), **{f"ce_{name}": value for name, value in ce.items()}}


def occlude(images: Tensor) -> Tensor:
    """(B, H, W, 3) with the central half of the height and width black: 112 of 224 pixels."""
    height, width = images.shape[1:3]
    images = images.clone()
    images[:, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 0
    return images
