"""The robustness sets' metrics: from logits and right classes to a number."""

import numpy as np
import torch
from torch import Tensor

from downstream.classify.robustness.layouts import ALEXNET


def hits(logits: Tensor, right: Tensor, among: Tensor | None = None) -> Tensor:
    """(B, 1) of 0 and 1: whether the largest logit is of a right class.

    Args:
        logits: (B, 1000); those that are not finite hit nothing.
        right: bool (B, 1000).
        among: the classes that are candidates, all unless given.
    """
    finite = torch.isfinite(logits).all(1, keepdim=True)
    return (right.gather(1, _only(logits, among).argmax(1, keepdim=True)) & finite).long()


def confidence(logits: Tensor, among: Tensor) -> Tensor:
    """(B,): the largest probability, of the classes that are candidates alone; in float64."""
    return _only(logits, among).double().softmax(1).amax(1)


def _only(logits: Tensor, among: Tensor | None) -> Tensor:
    if among is None:
        return logits
    rest = torch.full_like(logits, -torch.inf)
    return rest.index_copy(1, among.to(logits.device), logits[:, among])


def aupr(outliers: Tensor, inliers: Tensor) -> float:
    """Area under the precision-recall curve (average precision) of finding outliers, which should score higher."""
    scores = torch.cat([outliers, inliers]).numpy()
    found = np.concatenate([np.ones(len(outliers)), np.zeros(len(inliers))])
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], found[order].cumsum()
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # equal scores are found together
    recall = np.concatenate([[0.0], found[last] / len(outliers)])
    return float((np.diff(recall) * found[last] / (last + 1)).sum())


def mean_corruption_error(errors: dict[str, list[float]]) -> dict[str, float]:
    """mCE and the CE of each corruption, in shares of AlexNet's, from the errors at each severity.

    CE = sum of errors / sum of AlexNet's; mCE = mean of the 15 CE.
    """
    assert errors.keys() == ALEXNET.keys()
    ce = {name: sum(values) / (len(values) * ALEXNET[name]) for name, values in errors.items()}
    return {"mce": sum(ce.values()) / len(ce), **{f"ce_{name}": value for name, value in ce.items()}}


def occlude(images: Tensor) -> Tensor:
    """(B, H, W, 3) with the central half of the height and width black: 112 of 224 pixels."""
    height, width = images.shape[1:3]
    images = images.clone()
    images[:, height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = 0
    return images
