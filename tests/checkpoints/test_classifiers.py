"""Tests of published classifiers: their logits, pooling and order of classes."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import originals
from helpers.originals import PATCH, SAME_TO_FP32, images
from helpers.other_libraries import mmpretrain_beit, mmpretrain_vit, transformers_model
from timm.data import ImageNetInfo

from downstream.checkpoints.classifiers import ClassifierWeights, load_classifier_weights
from downstream.checkpoints.compare import float64_copy, max_difference
from downstream.classify.evaluate import check_classes
from downstream.classify.trained_classifier import TrainedClassifier

SIZE = 3 * PATCH
CLASSES = 5


def load(path: Path) -> ClassifierWeights:
    found = load_classifier_weights(path)
    assert found is not None
    return found


@torch.no_grad()
def assert_same_logits(found: ClassifierWeights, model: Any) -> None:
    assert found.spec.encoder.image_size == (SIZE, SIZE)
    pixels = images().double()
    expected = float64_copy(model)(pixels)
    assert expected.shape == (2, CLASSES)
    assert max_difference(float64_copy(found.build())(pixels), expected) < SAME_TO_FP32


def saved(model: Any, folder: Path, **beside: Any) -> tuple[Path, Any]:
    torch.save({"model": model.state_dict(), **beside}, folder / "classifier.pth")
    return folder / "classifier.pth", model


def mae(folder: Path) -> tuple[Path, Any]:
    """Like mae_finetuned_vit_base.pth, whose last norm follows the pooling."""
    return saved(originals.vit(num_classes=CLASSES, global_pool="avg"), folder, epoch=99)


def lomar(folder: Path) -> tuple[Path, Any]:
    options = {"num_classes": CLASSES, "global_pool": "avg", "fc_norm": True, "pos_embed": "none"}
    model = originals.vit(**options)
    for block, other in zip(model.blocks, originals.lomar_model().blocks, strict=True):
        block.attn = other.attn
    state = {**originals.randomized(model).state_dict(), "pos_embed": originals.noise(1, 10, 16)}
    torch.save({"model": state}, folder / "lomar.pth")
    return folder / "lomar.pth", model


def deit(folder: Path) -> tuple[Path, Any]:
    return saved(originals.vit(num_classes=CLASSES), folder)


def deit3(folder: Path) -> tuple[Path, Any]:
    return saved(originals.vit(num_classes=CLASSES, init_values=0.1, no_embed_class=True), folder)


def _beit(folder: Path, **options: Any) -> tuple[Path, Any]:
    options = {"num_classes": CLASSES, "global_pool": "avg", "init_values": 0.1, **options}
    return saved(originals.beit(kind=originals.HalfBeit, **options), folder)


def beit(folder: Path) -> tuple[Path, Any]:
    return _beit(folder, use_rel_pos_bias=True)


def beit_with_a_shared_table(folder: Path) -> tuple[Path, Any]:
    return _beit(folder, use_shared_rel_pos_bias=True)


def simmim(folder: Path) -> tuple[Path, Any]:
    """Has BEiT's names and ImageNet's normalization, and a config beside the weights."""
    options = {"num_classes": CLASSES, "global_pool": "avg", "init_values": 0.1, "use_shared_rel_pos_bias": True}
    return saved(originals.beit(**options), folder, config={})


def probe(folder: Path) -> tuple[Path, Any]:
    """MAE's linear probe, with a batch norm without parameters before the linear layer."""
    model = originals.vit(num_classes=CLASSES)
    norm = torch.nn.BatchNorm1d(16, affine=False, eps=1e-6)
    norm.running_mean, norm.running_var = originals.noise(16), originals.noise(16).exp()
    model.head = torch.nn.Sequential(norm, model.head)
    return saved(model.eval(), folder)


def without_class_token(folder: Path) -> tuple[Path, Any]:
    return saved(originals.vit(num_classes=CLASSES, class_token=False, global_pool="avg", fc_norm=False), folder)


@pytest.mark.parametrize(
    ("make", "pool"),
    [
        (mae, "avg"),
        (lomar, "avg"),
        (deit, "token"),
        (deit3, "token"),
        (beit, "avg"),
        (beit_with_a_shared_table, "avg"),
        (simmim, "avg"),
        (probe, "token"),
        (without_class_token, "avg"),
        (mmpretrain_vit, "token"),
    ],
)
def test_logits_match_the_original(make: Any, pool: str, tmp_path: Path):
    path, model = make(tmp_path)
    found = load(path)
    assert found.spec.pool == pool
    assert_same_logits(found, model)
    assert not [key for key in found.report.dropped if "head.weight" in key or "norm" in key]
    assert not [text for text in found.report.folded.values() if "of every token" in text]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTForImageClassification", {}),
        ("BeitForImageClassification", {"use_relative_position_bias": True}),
        ("BeitForImageClassification", {"use_absolute_position_embeddings": True}),
    ],
)
def test_transformers_classifiers_keep_logits_and_class_names(name: str, options: dict[str, Any], tmp_path: Path):
    names = {label: f"kind {label}" for label in range(CLASSES)}
    path, model = transformers_model(tmp_path, name, id2label=names, num_labels=CLASSES, **options)
    found = load(path)
    assert_same_logits(found, model)
    assert found.spec.class_names == tuple(names.values())


def test_pooling_is_read_from_timm_hub_folder(tmp_path: Path):
    options = {"img_size": SIZE, "patch_size": PATCH, "num_classes": CLASSES, "global_pool": "avg", "fc_norm": False}
    model = originals.randomized(timm.create_model("vit_tiny_patch16_224", **options))
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    timm.models.save_for_hf(model, tmp_path / "hub")
    found = load(tmp_path / "hub")
    assert found.spec.pool == "avg"
    model.__class__ = originals.HalfViT
    assert_same_logits(found, model)


def test_only_files_with_a_head_are_classifiers(tmp_path: Path):
    for make in (originals.mae, originals.lut, originals.dino, originals.beit_pretrained, mmpretrain_beit):
        found = load_classifier_weights(make(tmp_path).path)
        assert (found is None) == (make is not mmpretrain_beit)


def test_heads_that_do_not_fit_are_rejected(tmp_path: Path):
    state = originals.vit(num_classes=CLASSES).state_dict()
    norm = {"fc_norm.weight": originals.noise(16), "fc_norm.bias": originals.noise(16)}
    for change, message in (
        ({"head.weight": originals.noise(5, 32)}, r"its head is \(5, 32\), but must .* the encoder's width \(16\)"),
        (norm, "norms before and after the pool: this classifier has only one"),
    ):
        torch.save({"model": {**state, **change}}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=message):
            load_classifier_weights(tmp_path / "a.pth")


def _with_classes(count: int, folder: Path) -> TrainedClassifier:
    found = load(saved(originals.vit(num_classes=count), folder)[0])
    return TrainedClassifier(folder, found.build(), (SIZE, SIZE), found.spec.num_classes, found.spec.class_names)


def test_1000_classes_are_imagenets_in_synset_order(tmp_path: Path):
    trained = _with_classes(1000, tmp_path)
    synsets = sorted(trained.class_names)
    assert list(trained.class_names) == synsets
    assert synsets[0] == "n01440764"

    def data(classes: list[str]) -> Any:
        return type("Data", (), {"root": tmp_path / "val", "classes": classes})

    check_classes(trained, data(synsets))
    check_classes(trained, data([]))
    with pytest.raises(ValueError, match=r"label 0 is 'n01440764' in .* and 'n15075141' in"):
        check_classes(trained, data(synsets[::-1]))
    assert _with_classes(21841, tmp_path).class_names == tuple(ImageNetInfo("imagenet-22k").label_names())
    assert _with_classes(999, tmp_path).class_names == ()


def test_imagenet_labels_in_words_become_synsets(tmp_path: Path):
    words = {0: "tench, Tinca tinca", **dict.fromkeys(range(1, 999), "x"), 999: "toilet tissue"}
    path, _ = transformers_model(tmp_path, "ViTForImageClassification", id2label=words, num_labels=1000)
    assert load(path).spec.class_names[0] == "n01440764"
    words[0] = "a"
    path, _ = transformers_model(tmp_path / "own", "ViTForImageClassification", id2label=words, num_labels=1000)
    assert load(path).spec.class_names[:2] == ("a", "x")


def test_wrong_pixel_normalization_changes_the_logits(tmp_path: Path):
    """The tolerance of `assert_same_logits` is tight enough to notice it."""
    path, model = beit(tmp_path)
    model.__class__ = originals.Beit
    with pytest.raises(AssertionError):
        assert_same_logits(load(path), model)
