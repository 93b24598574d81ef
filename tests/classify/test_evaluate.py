"""Tests of accuracy against sklearn and hand-counted hits; test_evaluation_commands.py covers two ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.labeled_images import write_classes, write_classifier, write_photo
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score
from torch import Tensor

from data.image_folder import Samples, load_samples
from downstream.classify.classifier_spec import ClassifierSpec
from downstream.classify.evaluate import check_classes, evaluate
from downstream.classify.scores import Predictions
from downstream.classify.trained_classifier import load_classifier
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.accuracy import topk_hits

CPU = torch.device("cpu")
NAMES = [f"c{number}" for number in range(7)]


def predictions(predict: Any, samples: Samples, **settings: Any) -> tuple[Predictions, dict[str, int]]:
    one_rank = {"rank": 0, "world_size": 1, "num_workers": 0, "device": CPU}
    return evaluate(predict, samples, **{"size": (32, 32), "batch": 4, **one_rank, **settings})


def run(predict: Any, samples: Samples, **settings: Any) -> dict[str, float]:
    found, counts = predictions(predict, samples, **settings)
    return {**found.summary(), **counts}


@pytest.fixture
def photos(tmp_path: Path) -> Samples:
    """23 images, two of which cannot be decoded, in 7 classes."""
    write_classes(tmp_path / "photos", NAMES, 3, bad=2)
    write_photo(tmp_path / "photos" / "c0" / "more.jpg", 100)
    write_photo(tmp_path / "photos" / "c3" / "more.jpg", 101)
    return load_samples(tmp_path / "photos")


def pixels_as_logits(images: Tensor) -> Tensor:
    """Use pixels of the crop as logits, with offsets that avoid ties, so that nothing is rounded."""
    return images[:, 3:30:4, 5, 1] + torch.arange(7) / 8


def naive_logits(samples: Samples) -> np.ndarray:
    """Compute the same logits image by image with PIL, with black pixels for undecodable images."""
    logits = []
    for name in samples.names:
        try:
            image = Image.open(samples.root / name)
            w, h = image.size
            side = min(w, h) * 224 / 256
            box = ((w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2)
            pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box))
        except OSError:
            pixels = np.zeros((32, 32, 3))
        logits.append(pixels[3:30:4, 5, 1] + np.arange(7) / 8)
    return np.array(logits)


def test_accuracies_and_confusion_matrix_match_sklearn(photos: Samples, capsys: pytest.CaptureFixture[str]):
    logits, labels = naive_logits(photos), photos.label
    readable = logits[:, 0] > 0
    assert readable.sum() == 21
    expected = {
        f"top{k}": top_k_accuracy_score(labels[readable], logits[readable], k=k, labels=range(7)) * 21 / 23
        for k in (1, 5)
    }
    predicted = np.where(readable, logits.argmax(1), 7)
    per_class = recall_score(labels, predicted, labels=range(7), average=None)
    expected["mean_class_accuracy"] = per_class.mean()
    found, counts = predictions(pixels_as_logits, photos)
    measured = {**found.summary(), **counts}
    assert {name: measured[name] for name in (*expected, "images", "skipped")} == pytest.approx(
        {**expected, "images": 23, "skipped": 2}
    )
    assert 0 < measured["top1"] < measured["top5"] < 1
    assert found.accuracy_per_class().tolist() == pytest.approx(per_class)
    assert found.confusion_matrix().tolist() == confusion_matrix(labels, predicted, labels=range(8))[:7].tolist()
    assert "2 of 23 images cannot be decoded and count as wrong: c0/000, c1/001" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_results_do_not_depend_on_batch_size_or_workers(photos: Samples, batch: int):
    assert run(pixels_as_logits, photos, batch=batch, num_workers=1) == run(pixels_as_logits, photos)


def test_padding_and_undecodable_images_never_count_as_correct(photos: Samples):
    """The model always predicts class 0, which has 4 images, one of them undecodable."""
    always = run(lambda images: -torch.arange(7.0).repeat(len(images), 1), photos, batch=20)
    assert always["top1"] == 3 / 23
    assert always["top5"] == (21 - 6) / 23  # classes 0 to 4


def test_topk_hits_match_hand_counted_ones():
    logits = torch.tensor([[0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.6], [7, 6, 5, 4, 3, 2, 1.0], [float("nan")] * 7])
    assert topk_hits(logits[[0, 0, 0]], torch.tensor([1, 2, 0])).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert topk_hits(logits[[1, 1]], torch.tensor([4, 5])).tolist() == [[0, 1], [0, 0]]  # ranked fifth and sixth
    assert topk_hits(logits[[2, 2]], torch.tensor([0, 6])).tolist() == [[0, 0], [0, 0]]  # a diverged model
    assert topk_hits(torch.tensor([[0.0, 1, 2]]), torch.tensor([0])).tolist() == [[0, 1]]  # only three classes


@pytest.mark.parametrize(("position", "pool"), [("relative", "token"), ("sincos", "avg"), ("sincos", "token")])
def test_saved_classifier_loads_in_eval_mode_and_predicts(tmp_path: Path, position: str, pool: str):
    trained = load_classifier(write_classifier(tmp_path / "model.safetensors", 5, position, pool), CPU)
    assert (trained.num_classes, trained.image_size) == (5, (32, 32))
    assert not trained.model.training
    logits = trained.predict(torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8))
    assert logits.shape == (2, 5)
    assert logits.std() > 0


def test_unsuitable_classifiers_and_data_are_rejected(tmp_path: Path, photos: Samples):
    checkpoint = write_classifier(tmp_path / "model.safetensors", 5)
    with pytest.raises(ValueError, match=r"model\.safetensors has 5 classes, .*photos has 7"):
        check_classes(load_classifier(checkpoint, CPU), photos)
    seven = load_classifier(write_classifier(tmp_path / "seven.safetensors", 7, class_names=NAMES), CPU)
    check_classes(seven, photos)
    other = replace(seven, class_names=(*NAMES[:6], "zebra"))
    with pytest.raises(ValueError, match=r"label 6 is 'zebra' in .*seven\.safetensors and 'c6' in .*photos"):
        check_classes(other, photos)
    with pytest.raises(ValueError, match="has label 6, but the classifier has 5 classes"):
        run(lambda images: torch.zeros(len(images), 5), photos)
    flat = tmp_path / "flat"
    write_photo(flat / "a.jpg", 0)
    with pytest.raises(ValueError, match=r"1 of 1 samples in .*flat have no label, for example 'a': use class folders"):
        run(pixels_as_logits, load_samples(flat))
    tensors = load_file(checkpoint)
    encoder = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    save_file(encoder, tmp_path / "other.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not a classifier: it lacks a head"):
        load_classifier(tmp_path / "other.safetensors", CPU)
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run has no model\.safetensors, .*: if it was stopped, run its command"):
        load_classifier(tmp_path / "run", CPU)
    del tensors["blocks.0.norm1.bias"]
    spec = ClassifierSpec(EncoderSpec("vit_tiny", 16, (32, 32), "relative"), 5, "token")
    save_file(tensors, tmp_path / "part.safetensors", spec.to_metadata())
    with pytest.raises(ValueError, match=r"does not fit .*blocks\.0\.norm1\.bias"):
        load_classifier(tmp_path / "part.safetensors", CPU)
