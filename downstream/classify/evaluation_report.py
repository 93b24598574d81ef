"""The files of `downstream.classify.evaluate --out FOLDER`: tables for spreadsheets, and pictures of them."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from downstream.classify.scores import (
    CALIBRATION_BINS,
    MultiLabelPredictions,
    Predictions,
    expected_calibration_error,
)
from downstream.own_images import write_csv

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
from matplotlib.colors import PowerNorm

MAX_NAMED = 60  # classes whose names fit beside a picture
MAX_NUMBERS = 20  # classes whose counts fit into the cells
MAX_CONFUSIONS = 1000


def write_report(folder: Path, predictions: Predictions | MultiLabelPredictions, class_names: Sequence[str]) -> None:
    """Writes the files, replacing those of an earlier evaluation.

        per_class.csv             class, label, images, accuracy
        confusion_matrix.csv      a row for each true class, a column for each predicted one; .png: shares of each row
        confusions.csv            the wrong predictions of one class as another, the most frequent first
        calibration.csv           bins of the confidence: from, to, images, mean confidence, accuracy
        reliability.png           accuracy over confidence

    For lists of labels it writes only per_class.csv, with the average precision.

    Args:
        folder: created if it does not exist.
        predictions: of all images.
        class_names: in the order of the labels; if empty, the labels serve as names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = predictions.images_per_class().tolist()
    names = list(class_names) or [str(label) for label in range(len(images))]
    if isinstance(predictions, Predictions):
        score, scores = "accuracy", predictions.accuracy_per_class()
    else:
        score, scores = "average precision", predictions.average_precision_per_class()
    write_csv(
        folder / "per_class.csv",
        ("class", "label", "images", score),
        ((name, label, images[label], _number(scores[label].item())) for label, name in enumerate(names)),
    )
    if isinstance(predictions, Predictions):
        _write_single_label(folder, predictions, names)


def _write_single_label(folder: Path, predictions: Predictions, names: list[str]) -> None:
    matrix = predictions.confusion_matrix()
    write_csv(
        folder / "confusion_matrix.csv",
        ("true class", *names, "(no prediction)"),
        ((name, *row) for name, row in zip(names, matrix.tolist(), strict=True)),
    )
    write_csv(
        folder / "confusions.csv",
        ("true class", "predicted class", "images", "share of the true class"),
        _most_frequent_confusions(matrix[:, :-1], matrix.sum(1), names),
    )
    _draw_confusion(matrix[:, :-1], names, folder / "confusion_matrix.png")
    calibration = predictions.calibration()
    edges = [number / CALIBRATION_BINS for number in range(CALIBRATION_BINS + 1)]
    write_csv(
        folder / "calibration.csv",
        ("confidence from", "to", "images", "mean confidence", "accuracy"),
        (
            (f"{low:.4f}", f"{high:.4f}", int(row[0]), *map(_number, row[1:]))
            for low, high, row in zip(edges, edges[1:], calibration.tolist(), strict=False)
        ),
    )
    _draw_reliability(calibration, folder / "reliability.png")


def _most_frequent_confusions(matrix: Tensor, images: Tensor, names: list[str]) -> list[tuple[str, str, int, str]]:
    wrong = matrix - matrix.diagonal().diag()
    pairs = wrong.nonzero()
    counts = wrong[pairs[:, 0], pairs[:, 1]]
    order = counts.argsort(descending=True, stable=True)[:MAX_CONFUSIONS]
    return [
        (names[true], names[predicted], count, _number(count / images[true].item()))
        for (true, predicted), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def _number(value: float) -> str:
    return "" if value != value else f"{value:.6f}"  # NaN: there are no images


def _draw_confusion(matrix: Tensor, names: list[str], path: Path) -> None:
    """Colors show each row's shares, so that rare classes are as clear as frequent ones; small shares stay visible."""
    count = len(names)
    side = min(max(0.35 * count, 4.0), 16.0)
    figure, axis = plt.subplots(figsize=(side + 1.5, side), layout="constrained")
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    picture = axis.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(picture, label="share of the true class", shrink=0.8)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    if count <= MAX_NAMED:
        shown = [name.replace("$", r"\$") for name in names]  # not a formula
        axis.set_xticks(range(count), shown, rotation=90)
        axis.set_yticks(range(count), shown)
    if count <= MAX_NUMBERS:
        for row, column in torch.nonzero(matrix).tolist():
            color = "white" if shares[row, column] > 0.3 else "black"
            axis.text(column, row, int(matrix[row, column]), ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_reliability(calibration: Tensor, path: Path) -> None:
    """Draws accuracy bars with the diagonal of perfect calibration; below them, the number of images in each bin."""
    width = 1 / CALIBRATION_BINS
    centers = [(number + 0.5) * width for number in range(CALIBRATION_BINS)]
    count, _, accuracy = calibration.T.tolist()
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(4.5, 5.5), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    above.bar(centers, [0 if value != value else value for value in accuracy], width * 0.95, color="tab:blue")
    above.plot([0, 1], [0, 1], color="tab:gray", ls="--", lw=1)
    above.set(ylabel="accuracy", ylim=(0, 1), xlim=(0, 1))
    above.set_title(f"expected calibration error {expected_calibration_error(calibration):.2%}")
    below.bar(centers, count, width * 0.95, color="tab:gray")
    below.set(xlabel="confidence", ylabel="images")
    figure.savefig(path, dpi=110)
    plt.close(figure)
