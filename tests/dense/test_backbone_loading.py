"""Tests of loading checkpoints into the backbone: loaded weights, compared features and rejected encoders."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.naive_attention import randomized
from helpers.tiny_backbone import POSITIONS, TINY, build_backbone, images
from mmengine.config import Config
from mmengine.logging import MMLogger
from safetensors.torch import save_file
from torch import Tensor, nn

from downstream.checkpoints.compare import float64_copy, max_difference
from downstream.checkpoints.weights import features, load_encoder
from downstream.dense.backbone import loading
from downstream.dense.backbone.loading import EncoderCheckpoint, compare_features, load_start
from downstream.dense.backbone.plain_vit import PlainViT
from pretrain.models.vit import ARCHS, Arch, ViT


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with patch.dict(ARCHS, vit_tiny=TINY):
        yield


def without_windows(**options: Any) -> PlainViT:
    return build_backbone(window_size=0, global_blocks=(), class_token=True, **options)


def start(path: Path, weights: str | None = None) -> dict[str, Any]:
    return {"type": "EncoderCheckpoint", "checkpoint": str(path), **({"weights": weights} if weights else {})}


def encoder_features(encoder: ViT, height: int, width: int) -> Tensor:
    """Compute the encoder's features of `images`, (2, D, rows, cols) in float64."""
    tokens = features(float64_copy(encoder), images(height, width).double())[:, max(encoder.num_prefix_tokens, 1) :]
    return tokens.transpose(1, 2).unflatten(2, (height // 4, width // 4))


def encoder_file(folder: Path, kind: str = "relative", grid: tuple[int, int] = (3, 4), patch: int = 4, **facts) -> Path:
    torch.manual_seed(3)
    registers = int(facts.get("registers", 0))
    encoder = randomized(ViT("vit_tiny", patch, grid, kind == "relative", bias=kind == "bias", registers=registers))
    size = f"{grid[0] * patch}x{grid[1] * patch}"
    metadata = {"arch": "vit_tiny", "patch_size": str(patch), "image_size": size, "position": kind, **facts}
    save_file(encoder.state_dict(), folder / "encoder.safetensors", metadata)
    return folder / "encoder.safetensors"


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_backbone_without_windows_matches_the_encoder(kind: str, tmp_path: Path):
    """At the checkpoint's image size, the backbone computes what `features` computes with the encoder."""
    path = encoder_file(tmp_path, kind)
    backbone = without_windows(position=kind, img_size=(12, 16), init_cfg=start(path))
    backbone.init_weights()
    encoder, _ = load_encoder(path)
    (found,) = float64_copy(backbone)(images(12, 16).double())
    assert max_difference(found, encoder_features(encoder, 12, 16)) < 1e-12
    assert encoder.cls_token.equal(backbone.cls_token)


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_registers_are_loaded_only_with_the_class_token(kind: str, tmp_path: Path):
    path = encoder_file(tmp_path, kind, registers="2")
    encoder, _ = load_encoder(path)
    backbone = without_windows(position=kind, img_size=(12, 16), registers=2, init_cfg=start(path))
    backbone.init_weights()
    (found,) = float64_copy(backbone)(images(12, 16).double())
    assert max_difference(found, encoder_features(encoder, 12, 16)) < 1e-12
    assert encoder.reg_token.equal(backbone.reg_token)
    report = load_start(build_backbone(position=kind), str(path), None)
    assert report.dropped["reg_token"] == "registers: model.backbone.class_token=False"
    with pytest.raises(ValueError, match=r"has 2 registers, but model\.backbone\.registers is 1: set it to 2, or"):
        without_windows(position=kind, registers=1, init_cfg=start(path)).init_weights()
    with pytest.raises(ValueError, match=r"set model\.backbone\.class_token=True, or registers=0"):
        build_backbone(registers=1)


def test_unsuitable_encoder_is_rejected_before_the_data_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from downstream.dense.job import Job
    from downstream.dense.mmengine import runner
    from pretrain.trainer.launch import World

    def check(cfg: Any, splits: list[str]) -> list[str]:
        raise ValueError("the data are checked")

    monkeypatch.setattr(runner, "first_problem", lambda problem: problem)
    path = encoder_file(tmp_path, patch=8)
    backbone = {"type": "PlainViT", "arch": "vit_tiny", "patch_size": 4, "init_cfg": start(path)}
    job = Job(Config({"model": {"backbone": backbone}, "work_dir": str(tmp_path)}))
    for keys, message in (
        ({}, r"start\.checkpoint: .* patches of 8 pixels, the encoder of 4"),
        ({"patch_size": 8, "arch": "vit_small"}, "is vit_tiny, but model.backbone.arch is vit_small"),
        ({"patch_size": 8, "position": "sincos"}, "set model.backbone.position=relative"),
        ({"patch_size": 8, "class_token": True, "registers": 1}, "has 0 registers, but model.backbone.registers is 1"),
        ({"patch_size": 8, "init_cfg": start(tmp_path / "gone")}, "gone"),
        ({"patch_size": 8}, "the data are checked"),
    ):
        job.cfg.model.backbone = {**backbone, **keys}
        with pytest.raises(ValueError, match=message):
            runner.run(job, World(0, 1, 0), check)


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_backbone_at_another_size_matches_the_resized_encoder(kind: str, tmp_path: Path):
    path = encoder_file(tmp_path, kind)
    backbone = without_windows(position=kind, init_cfg=start(path))
    backbone.init_weights()
    exact = float64_copy(backbone)
    encoder, _ = load_encoder(path, image_size=(24, 32))
    assert max_difference(exact(images(24, 32).double())[0], encoder_features(encoder, 24, 32)) < 1e-12
    # At a size other than img_size, the backbone resizes its own table in the same way.
    larger = ViT("vit_tiny", 4, (5, 9), kind == "relative").eval()
    state = encoder.state_dict()
    if kind == "sincos":
        table = torch.nn.functional.pad(backbone.pos_embed, (0, 0, 1, 0))
        save_file({**state, "pos_embed": table.contiguous()}, tmp_path / "own.safetensors", facts("24x32"))
        larger, _ = load_encoder(tmp_path / "own.safetensors", image_size=(20, 36))
    else:
        larger.load_state_dict(state)
    # The encoder's table is resized in fp32 on loading, the backbone's in float64 here.
    limit = 1e-5 if kind == "sincos" else 1e-12
    assert max_difference(exact(images(20, 36).double())[0], encoder_features(larger, 20, 36)) < limit


def facts(size: str) -> dict[str, str]:
    return {"arch": "vit_tiny", "patch_size": "4", "image_size": size, "position": "sincos"}


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("conv", [False, True])
def test_loading_fills_all_pretrained_weights(kind: str, conv: bool, tmp_path: Path):
    """The backbone has windows, no class token and maybe convolutions; the report lists what was dropped."""
    path = encoder_file(tmp_path, kind)
    options = {"conv_blocks": (0, 3), "parallel_conv": True, "global_blocks": ()} if conv else {}
    backbone = build_backbone(position=kind, init_cfg=start(path), **options)
    encoder, _ = load_encoder(path)
    report = load_start(backbone, str(path), None)
    state = backbone.state_dict()
    fresh = {name for name in state if any(mark in name for mark in loading.FRESH)}
    assert state.keys() - fresh == encoder.state_dict().keys() - {"cls_token"}
    for name in state.keys() - fresh - {"pos_embed"}:
        assert state[name].equal(encoder.state_dict()[name]), name
    assert report.dropped["cls_token"] == "the class token: model.backbone.class_token=False"
    assert "cls_token" not in report.used
    assert ("pos_embed" in report.resized) == (kind == "sincos")
    assert bool(fresh) == (conv or kind == "sincos")


def test_comparison_of_features_includes_the_class_token(tmp_path: Path):
    path = encoder_file(tmp_path)
    backbone = without_windows()
    load_start(backbone, str(path), None)
    backbone.cls_token.data[..., ::2] += 1  # norms would cancel a constant added to all channels
    assert compare_features(backbone, load_encoder(path)[0]) > 1e-4


def test_loading_report_is_logged(tmp_path: Path):
    logger = MMLogger.get_instance("backbone", log_file=str(tmp_path / "log"))
    build_backbone(init_cfg=start(encoder_file(tmp_path))).init_weights()
    logger.handlers[-1].flush()
    assert "encoder.safetensors (online weights)" in (tmp_path / "log").read_text()


@torch.no_grad()
def test_encoder_without_class_token_needs_a_backbone_without_one(tmp_path: Path):
    """I-JEPA's encoders have no class token."""
    encoder = randomized(ViT("vit_tiny", 4, (3, 4), relative=False, class_token=False))
    spec = {"arch": "vit_tiny", "patch_size": "4", "image_size": "12x16", "position": "sincos", "class_token": "false"}
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors", spec)
    options = {"position": "sincos", "init_cfg": start(tmp_path / "encoder.safetensors")}
    backbone = build_backbone(window_size=0, global_blocks=(), img_size=(12, 16), **options)
    backbone.init_weights()
    found = float64_copy(backbone)(images(12, 16).double())[-1]
    assert max_difference(found, encoder_features(encoder, 12, 16)) < 1e-12
    with pytest.raises(ValueError, match=r"no class token: set model\.backbone\.class_token=False"):
        without_windows(img_size=(12, 16), **options).init_weights()


def test_14_pixel_patches_are_resized_to_16_pixels(tmp_path: Path):
    path = encoder_file(tmp_path, "relative", patch=14)
    backbone = build_backbone(patch_size=16, img_size=(96, 128), init_cfg=start(path))
    backbone.init_weights()
    expected, _ = load_encoder(path, image_size=(48, 64), patch_size=16)
    assert backbone.patch_embed.proj.weight.equal(expected.patch_embed.proj.weight)


@pytest.mark.parametrize("kind", POSITIONS)
def test_comparison_of_features_notices_any_changed_parameter(kind: str, tmp_path: Path):
    """A parameter that changes after loading changes the features, and NaN features raise an error."""
    path = encoder_file(tmp_path, kind)
    broken = build_backbone(position=kind)
    load_start(broken, str(path), None)
    encoder, _ = load_encoder(path)
    assert compare_features(broken, encoder) < 1e-12
    named = [(name, p) for name, p in broken.named_parameters() if name != "pos_embed"]
    parameters = [p for name, p in named if name.startswith("blocks.2") or not name.startswith("blocks.")]
    assert len(parameters) >= 4 + 12
    for parameter in parameters:
        kept = parameter.detach().clone()
        # Random, because keys and norms would cancel a constant.
        parameter.data += torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
        changed = compare_features(broken, encoder)
        parameter.data.copy_(kept)
        assert changed > 1e-4
    with (
        patch.object(loading, "compare_features", lambda *_: float("nan")),
        pytest.raises(ValueError, match="features differ from the encoder's by nan"),
    ):
        load_start(broken, str(path), None)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("sincos", {"position": "relative"}, "has an absolute position table and no relative ones, but "
         "model.backbone.position is relative: set model.backbone.position=sincos"),
        ("relative", {"position": "sincos"}, "has relative tables (LoMaR's), but model.backbone.position is sincos: "
         "set model.backbone.position=relative"),
        ("bias", {}, "has learned relative bias tables (BEiT's, SimMIM's), but the backbone supports"),
        ("relative", {"patch_size": 8, "img_size": 64}, "has patches of 4 pixels, the encoder of 8"),
        ("relative", {"arch": "vit_small"}, "is vit_tiny, but model.backbone.arch is vit_small: set it to vit_tiny"),
        ("relative", {"start.weights": "ema"}, "holds the online weights, not the ema ones"),
    ],
)  # fmt: skip
def test_unsuitable_checkpoints_are_rejected(kind: str, options: dict[str, Any], message: str, tmp_path: Path):
    with patch.dict(ARCHS, vit_small=Arch(8, 4, 2)):
        init_cfg = start(encoder_file(tmp_path, kind), options.get("start.weights"))
        backbone_options = {key: value for key, value in options.items() if key != "start.weights"}
        backbone = build_backbone(init_cfg=init_cfg, **backbone_options)
        with pytest.raises(ValueError, match=rf"start\.checkpoint.*{re.escape(message)}"):
            backbone.init_weights()


def test_missing_checkpoint_is_rejected(tmp_path: Path):
    with pytest.raises(ValueError, match=r"start\.checkpoint: no checkpoint"):
        build_backbone(init_cfg=start(tmp_path / "none.pth")).init_weights()


def test_checkpoint_cannot_initialize_another_module(tmp_path: Path):
    with pytest.raises(ValueError, match="EncoderCheckpoint fills a PlainViT, not a Linear"):
        EncoderCheckpoint(str(encoder_file(tmp_path)))(nn.Linear(2, 2))


def test_other_normalization_is_converted_and_other_channels_are_rejected(tmp_path: Path):
    path = encoder_file(tmp_path, mean="[0.3, 0.4, 0.5]", std="[0.1, 0.2, 0.3]")
    backbone = without_windows(img_size=(12, 16))
    assert "computes the same from pixels with mean 0.485" in str(load_start(backbone, str(path), None))
    path = encoder_file(tmp_path, mean="[0.3, 0.4, 0.5]", std="[0.1, 0.2, 0.3]", dtype='"uint16"')
    with pytest.raises(ValueError, match=r"start.checkpoint: .* was trained on 3 channels of uint16, but detection"):
        load_start(backbone, str(path), None)
