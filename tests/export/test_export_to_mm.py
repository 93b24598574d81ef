"""Tests that the config printed by `downstream.checkpoints.export --format mm` builds the exported encoder."""

from pathlib import Path

import pytest
import torch
from helpers.naive_attention import randomized
from mmengine.registry import MODELS
from safetensors.torch import save_file

import downstream.dense.backbone.loading
from downstream.checkpoints.compare import FLOAT64_TOLERANCE, float64_copy, max_difference, random_images
from downstream.checkpoints.export import export_encoder
from downstream.checkpoints.weights import features, load_encoder
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.models.vit import ViT


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relative", "sincos"])
def test_printed_backbone_computes_the_features_of_the_encoder(kind: str, tmp_path: Path):
    torch.manual_seed(3)
    encoder = randomized(ViT("vit_tiny", 8, (3, 4), kind == "relative"))
    spec = EncoderSpec.of(encoder)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", spec.to_metadata())
    _, _, usage = export_encoder(tmp_path / "encoder.safetensors", tmp_path / "out.pth", "mm")

    config = eval(usage.removeprefix("backbone="))
    assert downstream.dense.backbone.loading.__name__ in usage  # the module that a config imports
    last_block = encoder.arch.depth - 1
    as_pretrained = {"img_size": (24, 32), "window_size": 0, "class_token": True, "out_indices": (last_block,)}
    backbone = MODELS.build({**config, **as_pretrained}).eval()
    backbone.init_weights()
    images = random_images(24, 32)
    loaded = float64_copy(load_encoder(tmp_path / "out.pth")[0])
    expected = features(loaded, images)[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
    assert max_difference(float64_copy(backbone)(images)[0], expected) < FLOAT64_TOLERANCE
