"""Tests of classification scores against sklearn and plain loops, and of the report's tables and plots."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from downstream.classify.evaluation_report import write_report
from downstream.classify.scores import (
    CALIBRATION_BINS,
    NOTHING,
    MultiLabelPredictions,
    Predictions,
    average_precision,
    expected_calibration_error,
    predict_one_label,
)

NAMES = ["cat", "dog", "owl $1 a_$", "unicorn"]


@pytest.fixture
def predictions() -> Predictions:
    """50 images with labels of three of the four classes. One image could not be decoded."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (50,), generator=generator)
    found = predict_one_label(torch.randn(50, 4, generator=generator) * 2, labels)
    found[7] = torch.tensor([0, 0, NOTHING, 0])
    return Predictions(labels, found[:, :2].long(), found[:, 2].long(), found[:, 3], 4)


def test_hit_predicted_class_and_confidence_of_each_image():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [float("nan"), 1.0, 0.0]])
    hit, _, predicted, confidence = predict_one_label(logits, torch.tensor([1, 2, 1])).T.tolist()
    assert hit == [1, 0, 0]
    assert predicted == [1, 0, NOTHING]
    expected = [np.exp(2) / (1 + np.exp(2) + np.exp(1)), np.exp(3) / (np.exp(3) + 2), 0]
    assert confidence == pytest.approx(expected)


def test_calibration_error_matches_a_plain_loop(predictions: Predictions):
    decoded = [
        (confidence, hit)
        for confidence, hit, predicted in zip(
            predictions.confidence.tolist(),
            predictions.hits[:, 0].tolist(),
            predictions.predicted.tolist(),
            strict=True,
        )
        if predicted != NOTHING
    ]
    assert len(decoded) == 49
    error, counts = 0.0, []
    for number in range(CALIBRATION_BINS):
        inside = [pair for pair in decoded if number / CALIBRATION_BINS < pair[0] <= (number + 1) / CALIBRATION_BINS]
        counts.append(len(inside))
        if inside:
            mean_confidence, accuracy = np.mean(inside, axis=0)
            error += abs(accuracy - mean_confidence) * len(inside) / len(decoded)
    calibration = predictions.calibration()
    assert calibration[:, 0].tolist() == counts
    assert expected_calibration_error(calibration) == pytest.approx(error)
    assert predictions.summary()["ece"] == pytest.approx(error)
    assert error > 0.05


def test_mean_class_accuracy_ignores_a_class_without_images(predictions: Predictions):
    per_class = predictions.accuracy_per_class()
    assert per_class[3].isnan()
    assert predictions.summary()["mean_class_accuracy"] == pytest.approx(per_class[:3].mean().item())


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_report_matches_the_predictions(predictions: Predictions, tmp_path: Path):
    write_report(tmp_path / "new" / "report", predictions, NAMES)
    folder = tmp_path / "new" / "report"
    header, *rows = table(folder / "per_class.csv")
    assert header == ["class", "label", "images", "accuracy"]
    assert [row[0] for row in rows] == NAMES
    assert sum(int(row[2]) for row in rows) == 50
    assert rows[3][2:] == ["0", ""]
    assert float(rows[1][3]) == pytest.approx(predictions.accuracy_per_class()[1].item(), abs=1e-6)
    header, *rows = table(folder / "confusion_matrix.csv")
    assert header == ["true class", *NAMES, "(no prediction)"]
    counted = [[int(cell) for cell in row[1:]] for row in rows]
    assert counted == predictions.confusion_matrix().tolist()
    assert sum(map(sum, counted)) == 50
    assert sum(row[-1] for row in counted) == 1
    assert sum(int(row[2]) for row in table(folder / "calibration.csv")[1:]) == 49
    confused = table(folder / "confusions.csv")[1:]
    assert [int(row[2]) for row in confused] == sorted((int(row[2]) for row in confused), reverse=True)
    found = {(true, predicted): int(images) for true, predicted, images, _ in confused}
    assert found == {
        (NAMES[true], NAMES[predicted]): counted[true][predicted]
        for true, predicted in itertools.permutations(range(4), 2)
        if counted[true][predicted]
    }
    true, _, images, share = confused[0]
    assert float(share) == pytest.approx(int(images) / sum(counted[NAMES.index(true)]), abs=1e-6)
    for name in ("confusion_matrix.png", "reliability.png"):
        with Image.open(folder / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_average_precision_matches_sklearn_and_a_hand_computed_value():
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.ones(60), np.zeros(90)])
    for decimals in (6, 1):  # 1: many ties
        positives, negatives = np.round(rng.normal(0.4, 1, 60), decimals), np.round(rng.normal(0, 1, 90), decimals)
        ours = average_precision(torch.from_numpy(positives), torch.from_numpy(negatives))
        assert ours == pytest.approx(average_precision_score(truth, np.concatenate([positives, negatives])), rel=1e-12)
    assert average_precision(torch.tensor([3.0, 1.0]), torch.tensor([2.0])) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_mean_average_precision_ignores_a_class_without_images():
    rng = np.random.default_rng(1)
    labels, scores = rng.random((40, 5)) < 0.3, rng.normal(size=(40, 5))
    labels[:, 2] = False
    found = MultiLabelPredictions(torch.from_numpy(labels), torch.from_numpy(scores))
    expected = [average_precision_score(labels[:, label], scores[:, label]) for label in (0, 1, 3, 4)]
    assert found.average_precision_per_class()[[0, 1, 3, 4]].tolist() == pytest.approx(expected)
    assert found.average_precision_per_class()[2].isnan()
    assert found.summary() == {"map": pytest.approx(np.mean(expected))}
