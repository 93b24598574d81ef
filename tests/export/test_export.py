"""Tests that exports compute their source's features in the library they are for, and that wrong exports fail."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import originals
from helpers.originals import ORIGINALS, SAME_PARAMETERS, SAME_TO_FP32, images
from safetensors import safe_open

import downstream.checkpoints.export
from downstream.checkpoints.compare import max_difference
from downstream.checkpoints.export import Export, export_encoder, main
from downstream.checkpoints.report import Report
from downstream.checkpoints.timm_models import SIZES
from downstream.checkpoints.weights import features, load_encoder
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ARCHS, ViT

SOURCES = ["lomar", "simmim", "dinov2", "mae", "dinov2_registers"]
NAMES = {"timm": "out.safetensors", "mm": "out.pth", "hf": "out"}


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("size", [None, (16, 8)])
def test_timm_export_computes_the_original_features(source: str, size: Any, tmp_path: Path):
    path, model = ORIGINALS[source](tmp_path)
    out = tmp_path / "new" / "out.safetensors"
    report, difference, usage = export_encoder(path, out, "timm", image_size=size)
    assert difference < SAME_PARAMETERS
    assert bool(report.resized) == (size is not None and source != "lomar")
    scope: dict[str, Any] = {}
    exec(usage.replace("timm.create_model", "model = timm.create_model"), scope)
    loaded = scope["model"].eval()
    assert loaded.num_classes == 0
    encoder, _ = load_encoder(out)
    if size is None:
        assert originals.feature_difference(encoder, model, images()) < SAME_TO_FP32
        assert originals.feature_difference(encoder, loaded, images()) < SAME_PARAMETERS
    pixels = images(size or 12).double()
    tokens = loaded.double().forward_intermediates(pixels, indices=[1], intermediates_only=True, norm=True)[0]
    expected = (
        features(encoder.double(), pixels)[:, encoder.num_prefix_tokens :].transpose(1, 2).unflatten(2, encoder.grid)
    )
    assert max_difference(tokens, expected) < SAME_PARAMETERS
    with safe_open(str(out), "pt") as file:
        assert file.metadata()["image_size"] == ("16x8" if size else "12x12")
        assert file.get_tensor("norm.weight").dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("source", SOURCES)
def test_mm_export_has_plain_names_and_rebuilds_the_encoder(source: str, tmp_path: Path):
    path, _ = ORIGINALS[source](tmp_path)
    export_encoder(path, tmp_path / "out.pth", "mm", image_size=(12, 20))
    stored = torch.load(tmp_path / "out.pth", weights_only=True)
    encoder, _ = load_encoder(path, image_size=(12, 20))
    assert stored["state_dict"].keys() == encoder.state_dict().keys()
    assert stored["meta"].pop("registers", "0") == str(encoder.registers)
    assert {**stored["meta"], "weights": ""} == {
        "arch": "vit_tiny", "patch_size": "4", "image_size": "12x20", "weights": "",
        "position": {"lomar": "relative", "simmim": "bias"}.get(source, "sincos"),
    }  # fmt: skip
    reloaded, _ = load_encoder(tmp_path / "out.pth")
    assert torch.equal(features(reloaded, images((12, 20))), features(encoder, images((12, 20))))


@torch.no_grad()
@pytest.mark.parametrize("source", ["dinov2", "mae"])
def test_transformers_export_computes_the_original_features(source: str, tmp_path: Path):
    from transformers import AutoImageProcessor, ViTModel

    path, model = ORIGINALS[source](tmp_path)
    out = tmp_path / "out"
    export_encoder(path, out, "hf")
    loaded = ViTModel.from_pretrained(str(out), add_pooling_layer=False).eval()
    assert next(loaded.parameters()).dtype == torch.float32
    encoder, _ = load_encoder(path)
    assert originals.feature_difference(encoder, model, images()) < SAME_TO_FP32
    found = loaded.double()(images().double()).last_hidden_state
    assert max_difference(found, features(encoder.double(), images().double())) < SAME_PARAMETERS
    processor = AutoImageProcessor.from_pretrained(str(out))
    white = processor(torch.full((3, 30, 40), 255, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert white.shape == (1, 3, 12, 12)
    torch.testing.assert_close(
        white[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card
    assert path.name in card
    assert str(tmp_path) not in card
    assert "no records of a run" in card
    assert "computed in float64 on random images" in card
    assert "MAE's decoder" in card or source == "dinov2"


@torch.no_grad()
@pytest.mark.parametrize("source", ["lomar", "simmim", "dinov2_registers"])
def test_timm_loads_hub_folders_that_transformers_cannot(source: str, tmp_path: Path):
    path, model = ORIGINALS[source](tmp_path)
    export_encoder(path, tmp_path / "out", "hf")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    encoder, _ = load_encoder(path)
    assert originals.feature_difference(encoder, model, images()) < SAME_TO_FP32
    assert originals.feature_difference(encoder, loaded, images()) < SAME_PARAMETERS
    imported = "import downstream.checkpoints.timm_models" in (tmp_path / "out" / "README.md").read_text()
    assert imported == (source != "dinov2_registers"), "timm has absolute positions itself"


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch != "vit_tiny"])
@pytest.mark.parametrize("position", ["sincos", "relative", "bias"])
def test_timm_builds_every_size(arch: str, position: str):
    with torch.device("meta"):
        for patch, grid in ((16, (14, 14)), (14, (16, 16)), (8, (28, 28)), (16, (24, 24)), (14, (3, 5))):
            encoder = ViT(arch, patch, grid, position == "relative", bias=position == "bias")
            name, options = Export(encoder, EncoderSpec.of(encoder), Report(Path("x"), "online")).timm_call()
            theirs = timm.create_model(name, **options).state_dict()
            assert {k: v.shape for k, v in encoder.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
            assert (options == {}) == (position == "relative" and (arch, patch, patch * grid[0]) in SIZES)


ERROR = 1e-6  # added to one parameter; rounding in fp32 changes features more


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("source", ["lomar", "mae"])
def test_wrong_export_fails_and_leaves_no_files(
    kind: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, _ = ORIGINALS[source](tmp_path)
    (tmp_path / "made" / f"unfinished-{NAMES[kind]}").mkdir(parents=True)  # left by a killed export

    class Broken(downstream.checkpoints.export.Export):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            bias = self.tensors["blocks.1.mlp.fc2.bias"].clone()
            bias[3] += ERROR
            self.tensors["blocks.1.mlp.fc2.bias"] = bias

    monkeypatch.setattr(downstream.checkpoints.export, "Export", Broken)
    with pytest.raises(ValueError, match="computes different features: in float64"):
        export_encoder(path, tmp_path / "made" / NAMES[kind], kind)
    assert not list((tmp_path / "made").iterdir())


def test_export_with_nan_features_fails(tmp_path: Path):
    path, model = originals.dino_backbone(tmp_path)
    state = model.state_dict()
    state["norm.bias"][0] = torch.nan
    torch.save(state, path)
    with pytest.raises(ValueError, match="computes different features: in float64"):
        export_encoder(path, tmp_path / "out.pth", "mm")


@pytest.mark.parametrize("kind", NAMES)
def test_existing_files_are_not_overwritten(kind: str, tmp_path: Path):
    path, _ = originals.mae(tmp_path)
    out = tmp_path / NAMES[kind]
    out.write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        export_encoder(path, out, kind)
    assert out.read_text() == "precious"
    if kind != "hf":
        with pytest.raises(ValueError, match="is a file named"):
            export_encoder(path, tmp_path / "out.bin", kind)


def test_command_prints_what_was_used_and_how_to_load_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, _ = originals.lut(tmp_path)
    arguments = [str(path), str(tmp_path / "out.safetensors"), "--format", "timm"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--weights", "ema", "--image-size", "16", "8"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for part in (
        "(ema weights)", "projection head of LUT", "3x3 -> 4x2 patches, bicubic", "in float64", "timm.create_model"
    ):  # fmt: skip
        assert part in printed
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: ")
