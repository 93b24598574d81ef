"""Tests that encoders with registers, learned positions, a shared bias or LayerScale can be loaded and exported."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import originals
from helpers.originals import SAME_PARAMETERS, SAME_TO_FP32, randomized

from downstream.checkpoints.compare import float64_copy, max_difference
from downstream.checkpoints.export import export_encoder
from downstream.checkpoints.weights import load_encoder
from pretrain.build import build_method
from pretrain.config import PretrainConfig
from pretrain.finish import save_encoder
from pretrain.models.features import features, image_features
from pretrain.models.vit import ViT

MAE = {"name": "mae", "decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
SUFFIXES = {"torchscript": ".pt", "torch_export": ".pt2"}
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "relative-registers": ({"name": "lomar", "window_size": 2}, {"registers": 3}),
    "sincos-registers": (MAE, {"position": "sincos", "registers": 3}),
    "learned": (MAE, {"position": "learned"}),
    "learned-registers": (MAE, {"position": "learned", "registers": 1}),
    "bias": ({"name": "simmim", "mask_patch_size": 4}, {"position": "bias", "layer_scale": 0.1}),
    "bias-registers": ({"name": "simmim", "mask_patch_size": 4}, {"position": "bias", "registers": 2}),
}


def pretrained(name: str, folder: Path) -> tuple[ViT, Path]:
    """Build an encoder as pretraining does, for images that are not square, and save it."""
    method, model = ENCODERS[name]
    config = PretrainConfig.model_validate(
        {
            "name": "x",
            "method": method,
            "model": {"arch": "vit_tiny", "patch_size": 4, **model},
            "data": {"shards": "unused", "image_size": [12, 20]},
        }
    )
    encoder = randomized(build_method(config).encoder)
    save_encoder(encoder.state_dict(), config, folder / "encoder.safetensors", config.train.epochs)
    return encoder, folder / "encoder.safetensors"


def images() -> torch.Tensor:
    return originals.images((12, 20)).double()


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_loading_and_exporting_preserves_features(name: str, tmp_path: Path):
    encoder, path = pretrained(name, tmp_path)
    loaded, report = load_encoder(path)
    found, expected = (features(float64_copy(model), images()) for model in (loaded, encoder))
    assert max_difference(found, expected) < (SAME_TO_FP32 if report.folded else SAME_PARAMETERS)
    pixels = torch.randint(0, 256, (1, 12, 20, 3), dtype=torch.uint8)
    assert torch.equal(image_features(loaded, pixels, "patches").mean(1), image_features(loaded, pixels, "mean"))
    assert image_features(loaded, pixels, "patches").shape[1] == 15, "no register is a patch"

    _, difference, usage = export_encoder(path, tmp_path / "timm.safetensors", "timm")
    assert difference < SAME_PARAMETERS
    scope: dict[str, Any] = {}
    exec(usage.replace("timm.create_model", "model = timm.create_model"), scope)
    assert originals.feature_difference(loaded, scope["model"].eval(), images()) < SAME_PARAMETERS
    assert load_encoder(tmp_path / "timm.safetensors")[0].registers == encoder.registers

    export_encoder(path, tmp_path / "hub", "hf")
    if "architectures" not in (tmp_path / "hub" / "config.json").read_text():
        folder = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        assert originals.feature_difference(loaded, folder, images()) < SAME_PARAMETERS
    else:
        assert name == "learned", "transformers has no registers in a plain ViT"


@pytest.mark.parametrize(("kind", "name"), [("torchscript", "sincos-registers"), ("torch_export", "bias-registers")])
def test_encoders_can_be_exported_as_programs(kind: str, name: str, tmp_path: Path):
    _, path = pretrained(name, tmp_path)
    assert export_encoder(path, tmp_path / f"program{SUFFIXES[kind]}", kind)[1] < 1e-5
