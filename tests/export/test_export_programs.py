"""Tests of exported programs, which run without our code at any batch size, and of exported classifiers."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import originals
from helpers.originals import ORIGINALS, PATCH, SAME_PARAMETERS, randomized
from safetensors.torch import save_file
from torch import Tensor, nn

import downstream.checkpoints.export_programs
from downstream.checkpoints.classifiers import load_classifier_weights
from downstream.checkpoints.compare import max_difference
from downstream.checkpoints.export import export_classifier, export_encoder, main
from downstream.checkpoints.timm_models import build_vit
from downstream.checkpoints.weights import features, load_encoder
from downstream.classify.classifier_spec import ClassifierSpec
from pretrain.models.encoder_spec import EncoderSpec

FP32 = 1e-5
NAMES = ("cat", "dog", "owl")
HAS_ONNX = importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript")


def images(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 2 * PATCH, 3 * PATCH, generator=torch.Generator().manual_seed(seed))


def encoder(folder: Path, source: str) -> Path:
    """Export an encoder for images that are not square."""
    export_encoder(ORIGINALS[source](folder).path, folder / "encoder.pth", "mm", image_size=(2 * PATCH, 3 * PATCH))
    return folder / "encoder.pth"


def classifier(folder: Path, position: str, pool: str, fc_norm: bool) -> Path:
    """Save a classifier of this project."""
    spec = ClassifierSpec(EncoderSpec("vit_tiny", PATCH, (2 * PATCH, 3 * PATCH), position), 3, pool, NAMES)
    model = randomized(build_vit(spec.encoder, 3, pool, fc_norm=fc_norm))
    save_file(model.state_dict(), folder / "model.safetensors", spec.to_metadata())
    return folder / "model.safetensors"


def load(kind: str, path: Path) -> Any:
    if kind == "torchscript":
        return torch.jit.load(str(path))
    if kind == "torch_export":
        return torch.export.load(str(path)).module()
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    return lambda pixels: torch.tensor(evaluator.run(None, {"images": pixels.numpy()})[0])


SUFFIXES = {"torchscript": ".pt", "torch_export": ".pt2", "onnx": ".onnx"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "source"),
    [("torchscript", "mae"), ("torchscript", "lomar"), ("torchscript", "simmim"), ("torch_export", "lomar")],
)
def test_programs_compute_features_at_any_batch_size(kind: str, source: str, tmp_path: Path):
    path = encoder(tmp_path, source)
    out = tmp_path / f"program{SUFFIXES[kind]}"
    _, difference, usage = export_encoder(path, out, kind)
    assert difference < FP32
    assert str(out) in usage
    program, model = load(kind, out), load_encoder(path)[0]
    for batch in (1, 2, 5):
        found = program(images(batch))
        assert max_difference(found, features(model, images(batch))) < FP32
        assert found.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "position", "pool"), [("torchscript", "sincos", "token"), ("torch_export", "relative", "avg")]
)
def test_programs_compute_logits_at_any_batch_size(kind: str, position: str, pool: str, tmp_path: Path):
    path = classifier(tmp_path, position, pool, fc_norm=pool == "avg")
    out = tmp_path / f"program{SUFFIXES[kind]}"
    assert export_classifier(path, out, kind)[1] < FP32
    program, found = load(kind, out), load_classifier_weights(path)
    assert found is not None
    for batch in (1, 4):
        assert max_difference(program(images(batch)), found.build()(images(batch))) < FP32


@torch.no_grad()
@pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxscript are not installed")
def test_onnx_computes_features_at_any_batch_size(tmp_path: Path):
    import onnx

    path = encoder(tmp_path, "lomar")
    export_encoder(path, tmp_path / "encoder.onnx", "onnx")
    program, model = load("onnx", tmp_path / "encoder.onnx"), load_encoder(path)[0]
    for batch in (1, 5):
        assert max_difference(program(images(batch)), features(model, images(batch))) < FP32
    stored = onnx.load(str(tmp_path / "encoder.onnx"))
    assert {entry.key: entry.value for entry in stored.metadata_props}["arch"] == "vit_tiny"
    assert [output.name for output in stored.graph.output] == ["features"]


def test_onnx_without_its_packages_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs: pip install -e '\.\[onnx\]'; torch_export needs nothing more"):
        export_encoder(originals.mae(tmp_path).path, tmp_path / "out.onnx", "onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_program_with_other_features_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Broken(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return load_encoder(path)[0].norm(torch.zeros(len(pixels), 10, 16))

    path = originals.mae(tmp_path).path
    monkeypatch.setattr(downstream.checkpoints.export_programs.torch.jit, "load", lambda _: Broken())
    with pytest.raises(ValueError, match="computes different features: in float32"):
        export_encoder(path, tmp_path / "out.pt", "torchscript")
    assert not list(tmp_path.glob("*out.pt"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("position", "pool", "fc_norm"),
    [("sincos", "token", False), ("sincos", "avg", True), ("sincos", "avg", False), ("relative", "avg", True)],
)
def test_timm_loads_exported_classifiers(position: str, pool: str, fc_norm: bool, tmp_path: Path):
    path = classifier(tmp_path, position, pool, fc_norm)
    for out, kind in ((tmp_path / "out.safetensors", "timm"), (tmp_path / "folder", "hf")):
        report, difference, usage = export_classifier(path, out, kind)
        assert difference < SAME_PARAMETERS
        assert not report.dropped
        if "timm.create_model" not in usage:
            continue
        scope: dict[str, Any] = {}
        exec(usage.replace("timm.create_model", "model = timm.create_model"), scope)
        found = load_classifier_weights(path)
        assert found is not None
        expected = found.build().double()(images(2).double())
        assert max_difference(scope["model"].double().eval()(images(2).double()), expected) < SAME_PARAMETERS
        reloaded = load_classifier_weights(out)
        assert reloaded is not None
        assert reloaded.spec == found.spec
    assert ("transformers" in usage) == (position == "sincos" and pool == "token")


@torch.no_grad()
def test_transformers_loads_exported_classifiers_with_class_names(tmp_path: Path):
    from transformers import AutoModelForImageClassification

    path = classifier(tmp_path, "sincos", "token", fc_norm=False)
    export_classifier(path, tmp_path / "out", "hf")
    model = AutoModelForImageClassification.from_pretrained(str(tmp_path / "out")).double().eval()
    found, reloaded = load_classifier_weights(path), load_classifier_weights(tmp_path / "out")
    assert found is not None
    assert reloaded is not None
    expected = found.build().double()(images(2).double())
    assert max_difference(model(images(2).double()).logits, expected) < SAME_PARAMETERS
    assert tuple(model.config.id2label[label] for label in range(3)) == NAMES == reloaded.spec.class_names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "classifier of 3 classes, on the class token" in card
    assert "image-classification" in card


def test_timm_hub_folder_has_the_class_names(tmp_path: Path):
    export_classifier(classifier(tmp_path, "relative", "avg", True), tmp_path / "out", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["label_names"] == list(NAMES)
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).num_classes == 3


@torch.no_grad()
def test_encoder_without_class_token_can_be_exported(tmp_path: Path):
    from helpers.other_libraries import ijepa

    path, model = ijepa(tmp_path)
    for kind, out in (("timm", "a.safetensors"), ("hf", "folder"), ("mm", "a.pth"), ("torchscript", "a.pt")):
        export_encoder(path, tmp_path / out, kind)
        if kind != "torchscript":
            reloaded = load_encoder(tmp_path / out)[0]
            assert originals.feature_difference(reloaded, model, originals.images()) < SAME_PARAMETERS


def test_command_exports_classifiers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = classifier(tmp_path, "sincos", "avg", fc_norm=True)
    with pytest.raises(SystemExit) as ended:
        main([str(path), str(tmp_path / "out.safetensors"), "--format", "timm", "--classifier"])
    assert ended.value.code == 0
    assert "in float64, logits agree" in capsys.readouterr().out
    for arguments, message in (
        ([str(path), str(tmp_path / "a.pth"), "--format", "mm", "--classifier"], "mm is for backbones"),
        ([str(originals.mae(tmp_path).path), str(tmp_path / "a.pt2"), "--format", "torch_export", "--classifier"],
         "has no classifier: leave out --classifier"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 1
        assert message in capsys.readouterr().err


@torch.no_grad()
def test_pixel_normalization_can_be_overridden(tmp_path: Path):
    """BEiT v2's files use BEiT's names, but ImageNet's normalization."""
    path, model = originals.beit_finetuned(tmp_path)
    with pytest.raises(SystemExit):
        main([str(path), str(tmp_path / "out.safetensors"), "--format", "timm", "--pixels", "imagenet"])
    model.__class__ = originals.Beit
    encoder, report = load_encoder(tmp_path / "out.safetensors")
    assert originals.feature_difference(encoder, model, originals.images()) < originals.SAME_TO_FP32
    assert not report.pixels
