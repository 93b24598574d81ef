"""Tests of the robustness sets: metrics against known values, and each set on folders like the published ones."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.labeled_images import write_photo
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor

from data.image_folder import load_samples
from downstream.classify.robustness import datasets
from downstream.classify.robustness.__main__ import check_classifier, parse_paths
from downstream.classify.robustness.datasets import (
    ALEXNET_ERRORS,
    CLASS_MAPS,
    imagenet,
    imagenet_v2,
    objectnet,
    real_labels,
    right_by_real,
    right_classes,
    si_score,
    synsets,
)
from downstream.classify.robustness.evaluator import SETS, Evaluator, prepare
from downstream.classify.robustness.metrics import confidence, mean_corruption_error, occlude, top1_hits
from downstream.classify.trained_classifier import TrainedClassifier
from pretrain.trainer.launch import World

CPU = torch.device("cpu")


def evaluator(predict: Callable[[Tensor], Tensor]) -> Evaluator:
    return Evaluator(predict, (32, 32), batch=16, workers=0, world=World(0, 1, 0), device=CPU)


def class_from_color(images: Tensor) -> Tensor:
    """Decode the class from the color at an image's center: 100 * red + 10 * green + blue, in steps of 20."""
    digits = ((images[:, 12:20, 12:20].float().mean((1, 2)) - 25) / 20).round().long().clamp(min=0)
    return torch.nn.functional.one_hot(digits @ torch.tensor([100, 10, 1]), 1000).float()


def write_class_color(path: Path, number: int) -> None:
    """Write a plain image that `class_from_color` assigns to class `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), tuple(25 + 20 * int(digit) for digit in f"{number:03d}")).save(path)


def measure(name: str, predict: Callable[[Tensor], Tensor] = class_from_color, **paths: Path) -> dict[str, float]:
    return prepare(name, {key: str(path) for key, path in paths.items()})(evaluator(predict))


def test_top1_hits_with_and_without_candidates():
    logits = torch.zeros(3, 1000)
    logits[0, 7], logits[0, 3] = 2.0, 1.0
    logits[1, 999], logits[1, 998] = 1.0, 0.5
    logits[2] = torch.nan
    right = torch.zeros(3, 1000, dtype=torch.bool)
    right[0, 3] = right[1, 998] = right[1, 999] = right[2, 0] = True
    assert top1_hits(logits, right).flatten().tolist() == [0, 1, 0]
    assert top1_hits(logits, right, torch.tensor([3, 5, 9])).flatten().tolist() == [1, 0, 0]  # 7 is not a candidate
    assert top1_hits(logits, right, torch.tensor([3, 998])).flatten().tolist()[:2] == [1, 1]


def test_confidence_only_considers_the_candidates():
    logits = torch.tensor([[5.0, 1.0, 2.0, 1.0]])
    expected = np.exp(2) / (np.exp(2) + np.exp(1))
    assert confidence(logits, torch.tensor([2, 3])).item() == pytest.approx(expected, rel=1e-12)


def test_mean_corruption_error_is_relative_to_alexnet():
    """AlexNet scores 1, and halving the error on one of the 15 corruptions lowers the mean by 0.5 / 15."""
    itself = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(itself)["mce"] == pytest.approx(1)
    spread = {**itself, "fog": [ALEXNET_ERRORS["fog"] * share for share in (0.1, 0.3, 0.5, 0.7, 0.9)]}
    found = mean_corruption_error(spread)
    assert found["ce_fog"] == pytest.approx(0.5)
    assert found["mce"] == pytest.approx(14.5 / 15)
    halved = mean_corruption_error({name: [0.5] * 5 for name in ALEXNET_ERRORS})
    assert halved["mce"] == pytest.approx(np.mean([0.5 / error for error in ALEXNET_ERRORS.values()]))


def test_alexnet_errors_match_the_published_ones():
    """Compares with Table 1 of the ImageNet-C paper, in whole percent and in its order."""
    table = [89, 89, 92, 82, 83, 79, 80, 87, 83, 82, 56, 85, 65, 72, 61]
    assert [round(100 * error) for error in ALEXNET_ERRORS.values()] == table


def test_occlusion_blackens_the_middle():
    images = torch.full((2, 224, 224, 3), 9, dtype=torch.uint8)
    covered = occlude(images)
    assert (images == 9).all()
    assert (covered[:, 56:168, 56:168] == 0).all()
    assert (covered == 0).sum() == 2 * 112 * 112 * 3


def test_class_maps_match_the_published_ones():
    assert len(synsets()) == len(imagenet()) == len(imagenet_v2()) == 1000
    assert list(synsets()) == sorted(synsets())
    assert (synsets()["n01440764"], synsets()["n15075141"]) == (0, 999)  # tench, toilet tissue
    assert len(imagenet("a")) == len(imagenet("r")) == 200
    assert imagenet("a")["n01498041"] == [6]  # stingray
    found = objectnet()
    assert (len(found), sum(map(bool, found.values())), sum(map(len, found.values()))) == (313, 113, 125)
    assert (found["banana"], found["chair"], found["sponge"]) == ([954], [423, 559, 765], [])
    assert len(si_score()) == 61
    assert (si_score()["koala"], si_score()["torch"]) == ([105], [862])
    labels = real_labels()
    assert len(labels) == 50000
    assert sum(map(len, labels)) == 57553
    assert sum(not label for label in labels) == 3163  # 46837 images have labels


@pytest.mark.parametrize("name", ["a", "r"])
def test_only_the_200_candidate_classes_count(name: str, tmp_path: Path):
    """The largest logit is always outside the 200 classes; the second largest is right for all but one image."""
    classes = imagenet(name)
    outside = next(number for number in range(1000) if [number] not in classes.values())
    for folder, (number,) in classes.items():
        write_class_color(tmp_path / folder / "image.png", number if number != 13 else 11)

    def predict(images: Tensor) -> Tensor:
        logits = class_from_color(images)
        logits[:, outside] = 2
        return logits

    assert measure(name, predict, **{name: tmp_path}) == {"top1": 199 / 200, "images": 200, "skipped": 0}


@pytest.fixture
def ten(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Reduce ImageNet to its last ten classes, so that class numbers differ from folder positions."""
    some = dict(list(synsets().items())[-10:])
    monkeypatch.setattr(datasets, "synsets", lambda: some)
    return some


def test_accuracy_on_val_sketch_and_occlusion(ten: dict[str, int], tmp_path: Path):
    for folder, number in ten.items():
        write_class_color(tmp_path / folder / "right.png", number)
        write_class_color(tmp_path / folder / "wrong.png", 7)
    (tmp_path / folder / "broken.png").write_bytes(b"\x89PNG")
    for name in ("val", "sketch"):
        assert measure(name, **{name: tmp_path}) == {"top1": 10 / 21, "images": 21, "skipped": 1}

    def corner(images: Tensor) -> Tensor:
        assert (images[:, 8:24, 8:24] == 0).all()
        return class_from_color(images[:, :1, :1].expand(-1, 32, 32, -1))

    assert measure("occlusion", corner, occlusion=tmp_path) == {"top1": 10 / 21, "images": 21, "skipped": 1}


def test_v2_folder_names_are_class_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Folder 10 is sorted before folder 2."""
    monkeypatch.setitem(CLASS_MAPS, "v2", lambda: {str(number): [number] for number in range(12)})
    for number in range(12):
        write_class_color(tmp_path / str(number) / "image.png", number if number != 4 else 5)
    assert measure("v2", v2=tmp_path) == {"top1": 11 / 12, "images": 12, "skipped": 0}


def test_real_accepts_any_label_and_skips_images_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "real_labels", lambda: [[3, 5], [], [7], [1, 2], [9]])
    for number, predicted in ((1, 5), (2, 0), (3, 8), (4, 2)):
        write_class_color(tmp_path / f"n0{number}" / f"ILSVRC2012_val_{number:08d}.png", predicted)
    assert measure("real", real=tmp_path) == {"top1": 2 / 3, "images": 3, "skipped": 0}
    write_class_color(tmp_path / "n09" / "ILSVRC2012_val_00000006.png", 1)
    with pytest.raises(ValueError, match="'n09/ILSVRC2012_val_00000006' is not named ILSVRC2012_val_00000001 to"):
        right_by_real(load_samples(tmp_path))


def test_objectnet_accepts_any_class_of_a_folder_and_crops_the_border(tmp_path: Path):
    mapping = objectnet()
    for folder, numbers in mapping.items():
        path = tmp_path / "images" / folder / "image.png"
        path.parent.mkdir(parents=True)
        framed = Image.new("RGB", (44, 44), (255, 0, 0))
        write_class_color(path, numbers[-1] if numbers else 0)
        framed.paste(Image.open(path), (2, 2))
        framed.save(path)

    def even(images: Tensor) -> Tensor:
        assert (images == images[:, :1, :1]).all(), "nothing is seen of the border"
        return class_from_color(images)

    whole = Evaluator(even, (240, 240), batch=16, workers=0, world=World(0, 1, 0), device=CPU)
    found = prepare("objectnet", {"objectnet": str(tmp_path)})(whole)
    assert found == {"top1": 1.0, "images": 113, "skipped": 0}


def test_accuracy_on_si_score(tmp_path: Path):
    for folder, (number,) in si_score().items():
        write_class_color(tmp_path / folder / "1.png", number if folder != "koala" else 106)
    assert measure("si_size", si_size=tmp_path) == {"top1": 60 / 61, "images": 61, "skipped": 0}


def test_corruption_errors_on_imagenet_c(ten: dict[str, int], tmp_path: Path):
    """At severity s, s of ten images are wrong, except that none is wrong on fog."""
    for corruption in (*ALEXNET_ERRORS, "spatter"):
        for severity in range(1, 6):
            for position, (folder, number) in enumerate(ten.items()):
                wrong = position < severity and corruption != "fog"
                write_class_color(tmp_path / corruption / str(severity) / folder / "1.png", 0 if wrong else number)
    found = measure("c", c=tmp_path)
    expected = [0.3 / error for name, error in ALEXNET_ERRORS.items() if name != "fog"]
    assert found["mce"] == pytest.approx(sum(expected) / 15)
    assert found["ce_fog"] == 0
    assert (found["images"], found["skipped"]) == (750, 0)
    (tmp_path / "snow" / "4").rename(tmp_path / "snow" / "six")
    with pytest.raises(ValueError, match=r"has no snow/4; ImageNet-C has 15 corruptions at 5 severities"):
        prepare("c", {"c": str(tmp_path)})


def test_outlier_detection_on_imagenet_o(tmp_path: Path):
    """Confidence follows brightness: two outliers are darker than all inliers, the rest brighter or undecodable."""
    names = list(synsets())[300:500]
    for number, name in enumerate(names):
        write_class_color(tmp_path / "o" / name / "1.png", 0 if number < 2 else 333)
    for number, name in enumerate(synsets()):
        # Only images of the classes from 300 to 499 are inliers.
        write_class_color(tmp_path / "val" / name / "1.png", 111 if 300 <= number < 500 else 0)
    (tmp_path / "o" / names[5] / "1.png").write_bytes(b"broken")
    (tmp_path / "val" / names[7] / "1.png").write_bytes(b"broken")

    def predict(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 1000)
        logits[:, 300] = images.float().mean((1, 2, 3)) / 10
        logits[:, 2] = 100  # not a candidate
        return logits

    found = measure("o", predict, o=tmp_path / "o", val=tmp_path / "val")
    scores = [-1.0] * 2 + [-3.0] * 197 + [-9.0] + [0.0] + [-2.0] * 199  # undecodable images get the worst score
    expected = average_precision_score([1] * 200 + [0] * 200, scores)
    assert found == pytest.approx({"aupr": expected, "images": 400, "skipped": 2})


def test_folders_that_do_not_match_the_set_are_rejected_before_evaluation(tmp_path: Path):
    write_photo(tmp_path / "set" / "n01440764" / "1.jpg", 0)
    photos = tmp_path / "set"
    with pytest.raises(ValueError, match=r"set: 999 of this set's 1000 classes are missing, for example 'n01443537'"):
        prepare("val", {"val": str(photos)})
    with pytest.raises(
        ValueError, match=r"1 folders, for example 'n01440764', are not among this set's 200 classes.*like 'n01498041'"
    ):
        prepare("a", {"a": str(photos)})
    with pytest.raises(ValueError, match="has 1 classes, but ImageNet-O has 200"):
        prepare("o", {"o": str(photos), "val": str(photos)})
    with pytest.raises(ValueError, match="give val=PATH as well"):
        prepare("o", {"o": str(photos)})
    with pytest.raises(ValueError, match=r"1 folders, for example 'n01440764', are not among this set's 15 classes"):
        prepare("c", {"c": str(photos)})
    with pytest.raises(ValueError, match="has no class folders with names like 'n01440764'"):
        right_classes(load_samples(photos / "n01440764"), imagenet())
    for pair in ("v3=/x", "v2", "v2="):
        with pytest.raises(ValueError, match="give set=PATH, where set is one of val, occlusion, v2"):
            parse_paths([pair])
    assert len(SETS) == 13


def test_labels_of_shards_without_class_names_are_imagenet_classes(tmp_path: Path):
    write_photo(tmp_path / "photo.jpg", 0)
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for name, content in {"a.jpg": (tmp_path / "photo.jpg").read_bytes(), "a.cls": b"417"}.items():
            member: Any = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    right = right_classes(load_samples(tmp_path / "val.tar"), imagenet())
    assert right.nonzero().tolist() == [[0, 417]]


def test_classifier_with_other_classes_is_rejected(tmp_path: Path):
    def trained(names: list[str], classes: int = 1000) -> TrainedClassifier:
        return TrainedClassifier(tmp_path / "a.safetensors", torch.nn.Identity(), (32, 32), classes, tuple(names))

    ids = list(synsets())
    for names in (ids, [], [f"class {number}" for number in range(1000)]):
        check_classifier(trained(names))
    with pytest.raises(ValueError, match=r"a\.safetensors has 7 classes; these sets are for ImageNet's 1000"):
        check_classifier(trained([], 7))
    with pytest.raises(ValueError, match=r"label 0 is 'n15075141' in .*a\.safetensors and 'n01440764' in ImageNet"):
        check_classifier(trained(ids[::-1]))
