"""Measures of a classifier's predictions: accuracy, also per class, calibration and average precision."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pretrain.trainer.accuracy import topk_hits

NOTHING = -1  # in place of a predicted class, for images that cannot be decoded and logits that are not finite
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """A classifier's predictions for N images, each with one of C classes.

    Attributes:
        labels: int64 (N,).
        hits: int64 (N, 2) of 0 and 1: whether the label is the most probable class, and among the five most probable.
        predicted: int64 (N,), the most probable class, or NOTHING.
        confidence: float64 (N,), its probability; 0 if there is none.
        num_classes: C.
    """

    labels: Tensor
    hits: Tensor
    predicted: Tensor
    confidence: Tensor
    num_classes: int

    def summary(self) -> dict[str, float]:
        """`top1` and `top5`, the mean over classes of `top1`, and the expected calibration error."""
        top1, top5 = self.hits.double().mean(0).tolist()
        per_class = self.accuracy_per_class()
        return {
            "top1": top1,
            "top5": top5,
            "mean_class_accuracy": per_class[~per_class.isnan()].mean().item(),
            "ece": expected_calibration_error(self.calibration()),
        }

    def images_per_class(self) -> Tensor:
        """int64 (C,)."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def accuracy_per_class(self) -> Tensor:
        """float64 (C,), NaN for a class without images."""
        hits = torch.bincount(self.labels, weights=self.hits[:, 0].double(), minlength=self.num_classes)
        return hits / self.images_per_class()

    def confusion_matrix(self) -> Tensor:
        """int64 (C, C+1), images by label (row) and predicted class (column); the last column is NOTHING."""
        columns = self.num_classes + 1
        cells = self.labels * columns + torch.where(self.predicted == NOTHING, self.num_classes, self.predicted)
        return torch.bincount(cells, minlength=self.num_classes * columns).view(-1, columns)

    def calibration(self) -> Tensor:
        """float64 (CALIBRATION_BINS, 3): images, mean confidence and accuracy in equally wide bins of confidence.

        Images without a prediction are left out; the means of an empty bin are NaN.
        """
        said = self.predicted != NOTHING
        confidence, right = self.confidence[said], self.hits[said, 0].double()
        bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1  # (low, high], as published
        count, sure, accurate = (
            torch.bincount(bins, weights=weights, minlength=CALIBRATION_BINS)
            for weights in (torch.ones_like(confidence), confidence, right)
        )
        return torch.stack([count, sure / count, accurate / count], dim=1)


@dataclass(frozen=True)
class MultiLabelPredictions:
    """A classifier's predictions for N images, each with any number of C classes.

    Attributes:
        labels: bool (N, C).
        scores: float (N, C), higher for more probable classes; the lowest value if an image cannot be decoded.
    """

    labels: Tensor
    scores: Tensor

    def summary(self) -> dict[str, float]:
        """`map`: the average precision, averaged over the classes that have images."""
        per_class = self.average_precision_per_class()
        return {"map": per_class[~per_class.isnan()].mean().item()}

    def images_per_class(self) -> Tensor:
        """int64 (C,)."""
        return self.labels.sum(0)

    def average_precision_per_class(self) -> Tensor:
        """float64 (C,), NaN for a class without images."""
        columns = zip(self.scores.T, self.labels.T, strict=True)
        found = [average_precision(scores[right], scores[~right]) for scores, right in columns]
        return torch.tensor(found, dtype=torch.float64)


def predict_one_label(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, C) logits, (B,) labels -> (B, 4) float64: hits of top-1 and top-5, predicted class or NOTHING, confidence."""
    finite = torch.isfinite(logits).all(1)
    best = logits.topk(min(5, logits.shape[1])).indices[:, :1]  # ties are broken as in the hits
    confidence = logits.double().softmax(1).gather(1, best)
    return torch.cat(
        [
            topk_hits(logits, labels).double(),
            torch.where(finite[:, None], best, NOTHING).double(),
            torch.where(finite[:, None], confidence, 0.0),
        ],
        dim=1,
    )


def expected_calibration_error(calibration: Tensor) -> float:
    """|accuracy - confidence| of each image's bin, averaged over images (Guo et al., 2017); NaN without predictions."""
    count, confidence, accuracy = calibration[calibration[:, 0] > 0].T
    return ((accuracy - confidence).abs() * count).sum().div(count.sum()).item()


def average_precision(positives: Tensor, negatives: Tensor) -> float:
    """Area under the precision-recall curve; positives should score higher than negatives. NaN without positives."""
    if not len(positives):
        return float("nan")
    scores = torch.cat([positives, negatives]).numpy()
    found = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], found[order].cumsum()
    last = np.flatnonzero(np.append(np.diff(scores) != 0, True))  # a threshold cannot separate equal scores
    recall = np.concatenate([[0.0], found[last] / len(positives)])
    return float((np.diff(recall) * found[last] / (last + 1)).sum())
