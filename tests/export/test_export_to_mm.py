"""What `downstream.checkpoints.export --format mm` prints is what a configuration of mmengine takes."""

from pathlib import Path

import pytest
import torch
from helpers.naive_attention import randomized
from mmengine.registry import MODELS
from safetensors.torch import save_file

import downstream.dense.backbone.plain_vit
from downstream.checkpoints.export import export_encoder
from downstream.checkpoints.weights import features, load_encoder, max_difference
from pretrain.models.vit import ViT


@torch.no_grad()
@pytest.mark.parametrize("kind", ["relative", "sincos"])
def test_the_printed_backbone_is_the_encoder(kind: str, tmp_path: Path):
    torch.manual_seed(3)
    encoder = randomized(ViT("vit_tiny", 8, (3, 4), kind == "relative"))
    facts = {"arch": "vit_tiny", "patch": "8", "size": "24x32", "position": kind}
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", facts)
    _, _, usage = export_encoder(tmp_path / "encoder.safetensors", tmp_path / "out.pth", "mm")

    config = eval(usage.removeprefix("backbone="))
    assert downstream.dense.backbone.plain_vit.__name__ in usage  # what a configuration imports
    whole = {"size": (24, 32), "window": 0, "class_token": True}
    backbone = MODELS.build({**config, **whole}).eval()
    backbone.init_weights()
    images = torch.randn(2, 3, 24, 32)
    expected = features(load_encoder(tmp_path / "out.pth")[0], images)[:, 1:].transpose(1, 2).unflatten(2, (3, 4))
    assert max_difference(backbone(images)[0], expected) < 1e-5
