"""The backbone: what it computes, loads, compares and refuses."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.naive_attention import randomized
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from safetensors.torch import save_file
from torch import Tensor, nn

from downstream.checkpoints.compare import float64_copy, max_difference
from downstream.checkpoints.weights import features, load_encoder
from downstream.dense.backbone import loading
from downstream.dense.backbone.convolution import on_grid, parallel_branch
from downstream.dense.backbone.loading import compare_features, load_start
from downstream.dense.backbone.plain_vit import PlainViT
from pretrain.models.vit import ARCHS, Arch, ViT

TINY = Arch(dim=16, depth=4, heads=2)
POSITIONS = ("relative", "sincos")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with patch.dict(ARCHS, vit_tiny=TINY):
        yield


def build(**options: Any) -> PlainViT:
    defaults = {"patch_size": 4, "img_size": (24, 32), "window_size": 3, "global_blocks": (1,), "out_indices": (3,)}
    defaults["drop_path_rate"] = 0.0
    torch.manual_seed(0)
    return MODELS.build({"type": "PlainViT", "arch": "vit_tiny", **defaults, **options})


def whole(**options: Any) -> PlainViT:
    return build(window_size=0, global_blocks=(), class_token=True, **options)


def start(path: Path, weights: str | None = None) -> dict[str, Any]:
    return {"type": "EncoderCheckpoint", "checkpoint": str(path), **({"weights": weights} if weights else {})}


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def encoder_features(encoder: ViT, height: int, width: int) -> Tensor:
    """(2, D, rows, cols) float64 of `images`."""
    tokens = features(float64_copy(encoder), images(height, width).double())[:, 1:]
    return tokens.transpose(1, 2).unflatten(2, (height // 4, width // 4))


def encoder_file(folder: Path, kind: str = "relative", grid: tuple[int, int] = (3, 4), patch: int = 4, **facts) -> Path:
    torch.manual_seed(3)
    encoder = randomized(ViT("vit_tiny", patch, grid, kind == "relative", bias=kind == "bias"))
    size = f"{grid[0] * patch}x{grid[1] * patch}"
    metadata = {"arch": "vit_tiny", "patch_size": str(patch), "image_size": size, "position": kind, **facts}
    save_file(encoder.state_dict(), folder / "encoder.safetensors", metadata)
    return folder / "encoder.safetensors"


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_without_windows_it_is_the_pretrained_encoder(kind: str, tmp_path: Path):
    """At the checkpoint's size, by `forward` and by `features`."""
    path = encoder_file(tmp_path, kind)
    backbone = whole(position=kind, img_size=(12, 16), init_cfg=start(path))
    backbone.init_weights()
    encoder, _ = load_encoder(path)
    (found,) = float64_copy(backbone)(images(12, 16).double())
    assert max_difference(found, encoder_features(encoder, 12, 16)) < 1e-12
    assert encoder.cls_token.equal(backbone.cls_token)


@pytest.mark.parametrize("kind", POSITIONS)
@torch.no_grad()
def test_at_another_size_it_is_the_encoder_resized(kind: str, tmp_path: Path):
    path = encoder_file(tmp_path, kind)
    backbone = whole(position=kind, init_cfg=start(path))
    backbone.init_weights()
    exact = float64_copy(backbone)
    encoder, _ = load_encoder(path, image_size=(24, 32))
    assert max_difference(exact(images(24, 32).double())[0], encoder_features(encoder, 24, 32)) < 1e-12
    # And at a size that it was not built for, its own table is resized in the same way.
    larger = ViT("vit_tiny", 4, (5, 9), kind == "relative").eval()
    state = encoder.state_dict()
    if kind == "sincos":
        own = torch.nn.functional.pad(backbone.pos_embed, (0, 0, 1, 0))
        save_file({**state, "pos_embed": own.contiguous()}, tmp_path / "own.safetensors", facts("24x32"))
        larger, _ = load_encoder(tmp_path / "own.safetensors", image_size=(20, 36))
    else:
        larger.load_state_dict(state)
    # The encoder's table is resized in fp32 when it is loaded, the backbone's here in float64.
    limit = 1e-5 if kind == "sincos" else 1e-12
    assert max_difference(exact(images(20, 36).double())[0], encoder_features(larger, 20, 36)) < limit


def facts(size: str) -> dict[str, str]:
    return {"arch": "vit_tiny", "patch_size": "4", "image_size": size, "position": "sincos"}


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("conv", [False, True])
def test_loading_fills_everything_that_pretraining_has(kind: str, conv: bool, tmp_path: Path):
    """Windows, no class token, convolutions: the parity check passes, and the report lists what was dropped."""
    path = encoder_file(tmp_path, kind)
    options = {"conv_blocks": (0, 3), "parallel_conv": True, "global_blocks": ()} if conv else {}
    backbone = build(position=kind, init_cfg=start(path), **options)
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


def test_the_class_token_is_compared(tmp_path: Path):
    path = encoder_file(tmp_path)
    backbone = whole()
    load_start(backbone, str(path), None)
    backbone.cls_token.data[..., ::2] += 1  # norms remove the same number added to all channels
    assert compare_features(backbone, load_encoder(path)[0]) > 1e-4


@torch.no_grad()
def test_convolutions_leave_the_class_token_out():
    x = torch.randn(2, 1 + 30, 16, generator=torch.Generator().manual_seed(2))
    out = on_grid(nn.Identity(), x, (5, 6))
    assert not out[:, 0].any()
    assert torch.equal(out[:, 1:], x[:, 1:])


def test_the_report_is_logged(tmp_path: Path):
    logger = MMLogger.get_instance("backbone", log_file=str(tmp_path / "log"))
    build(init_cfg=start(encoder_file(tmp_path))).init_weights()
    logger.handlers[-1].flush()
    assert "encoder.safetensors (online weights)" in (tmp_path / "log").read_text()


def test_patches_of_14_pixels_become_16(tmp_path: Path):
    path = encoder_file(tmp_path, "relative", patch=14)
    backbone = build(patch_size=16, img_size=(96, 128), init_cfg=start(path))
    backbone.init_weights()
    expected, _ = load_encoder(path, image_size=(48, 64), patch_size=16)
    assert backbone.patch_embed.proj.weight.equal(expected.patch_embed.proj.weight)


@pytest.mark.parametrize("kind", POSITIONS)
def test_other_features_are_an_error(kind: str, tmp_path: Path):
    """The backbone's own parameters are compared: one that changed after loading is found."""
    path = encoder_file(tmp_path, kind)
    broken = build(position=kind)
    load_start(broken, str(path), None)
    encoder, _ = load_encoder(path)
    assert compare_features(broken, encoder) < 1e-12
    named = [(name, p) for name, p in broken.named_parameters() if name != "pos_embed"]
    parameters = [p for name, p in named if name.startswith("blocks.2") or not name.startswith("blocks.")]
    assert len(parameters) >= 4 + 12
    for parameter in parameters:
        kept = parameter.detach().clone()
        # Not by a constant, which keys and norms would remove.
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
        ("sincos", {"position": "relative"}, "has an absolute position table and no relative ones, and "
         "model.backbone.position is relative: set model.backbone.position=sincos"),
        ("relative", {"position": "sincos"}, "has relative tables (LoMaR's), and model.backbone.position is sincos: "
         "set model.backbone.position=relative"),
        ("bias", {}, "has learned relative bias tables (BEiT's, SimMIM's), and the backbone offers"),
        ("relative", {"patch_size": 8, "img_size": 64}, "has patches of 4 pixels, the encoder of 8"),
        ("relative", {"arch": "vit_small"}, "is vit_tiny, model.backbone.arch is vit_small: set it to vit_tiny"),
        ("relative", {"weights": "ema"}, "holds the online weights, not the ema ones"),
    ],
)  # fmt: skip
def test_other_checkpoints_are_refused(kind: str, options: dict[str, Any], message: str, tmp_path: Path):
    with patch.dict(ARCHS, vit_small=Arch(8, 4, 2)):
        init_cfg = start(encoder_file(tmp_path, kind), options.pop("weights", None))
        backbone = build(init_cfg=init_cfg, **options)
        with pytest.raises(ValueError, match=rf"start\.checkpoint.*{re.escape(message)}"):
            backbone.init_weights()


def test_missing_checkpoint(tmp_path: Path):
    with pytest.raises(ValueError, match=r"start\.checkpoint: no checkpoint"):
        build(init_cfg=start(tmp_path / "none.pth")).init_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "vit_giant"}, "arch='vit_giant': one of vit_tiny"),
        ({"position": "bias"}, "position='bias': relative or sincos"),
        ({"img_size": 30}, "img_size=30x30 is not a multiple of model.backbone.patch_size=4"),
        ({"img_size": 0}, "img_size=0x0"),
        ({"class_token": True}, "set model.backbone.window_size=0 (it is 3)"),
        ({"out_indices": (1,)}, "out_indices=(1,) leaves out the last block, 3"),
        ({"out_indices": (3, 4)}, "out_indices=(3, 4): give different blocks from 0 to 3"),
        ({"global_blocks": (2, 5)}, "global_blocks=(2, 5)"),
        ({"conv_blocks": (1, 1)}, "conv_blocks=(1, 1)"),
        ({"conv_blocks": (-1,)}, "conv_blocks=(-1,)"),
    ],
)
def test_contradicting_settings(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


def test_image_size_is_a_multiple_of_the_patch_size():
    with pytest.raises(ValueError, match=r"images of 24x30 pixels .* model\.backbone\.patch_size=4: set pad"):
        build()(images(24, 30))


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("height", [8, 20, 40])
def test_maps_of_any_size(kind: str, height: int):
    maps = build(position=kind, out_indices=(0, 3))(images(height, 28))
    assert [m.shape for m in maps] == [(2, 16, height // 4, 7)] * 2


@torch.no_grad()
def test_only_the_last_map_is_normalized():
    backbone = randomized(build(out_indices=(3, 1))).eval().double()
    first, last = backbone(images(24, 32).double())
    rest = first.flatten(2).transpose(1, 2)
    for number in (2, 3):
        rest = backbone.blocks[number](rest, (6, 8), 3)
    torch.testing.assert_close(last, backbone.norm(rest).transpose(1, 2).unflatten(2, (6, 8)))


@torch.no_grad()
def test_windows_limit_what_a_pixel_reaches():
    """A pixel reaches the whole map through the global block only, and its own window without one."""
    pixels = images(24, 32, 1)
    other = pixels.clone()
    other[0, :, 0, 0] += 1
    for options, reached in (({"global_blocks": ()}, 9), ({}, 48), ({"window_size": 0, "global_blocks": ()}, 48)):
        backbone = randomized(build(**options)).eval()
        changed = (backbone(pixels)[0] != backbone(other)[0]).any(1)[0]
        assert changed.sum() == reached
        assert changed[:3, :3].all()


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("options", [{"conv_blocks": (0, 2)}, {"parallel_conv": True}])
def test_convolutions_are_zero_at_first_and_are_trained(kind: str, options: dict[str, Any]):
    plain, convolved = build(position=kind), build(position=kind, **options)
    state = randomized(plain).state_dict()
    convolved.load_state_dict(state, strict=False)
    pixels = images(24, 32)
    expected = plain(pixels)[0]
    out = convolved(pixels)[0]
    assert torch.equal(out, expected)
    (out * images(6, 8).repeat(1, 6, 1, 1)[:, :16]).sum().backward()
    last = {"conv_blocks": "propagate.7.weight", "parallel_conv": "parallel.3.weight"}[next(iter(options))]
    learning = [name for name, p in convolved.named_parameters() if name.endswith(last) and p.grad.abs().max() > 0]
    assert len(learning) == (2 if "conv_blocks" in options else 4)
    # Once they are not zero, a convolution carries a pixel across windows.
    backbone = randomized(build(global_blocks=(), **options)).eval()
    other = pixels.clone()
    other[0, :, 11, 11] += 1  # at the corner of the first window
    assert (backbone(pixels)[0] != backbone(other)[0]).any(1)[0, 3, 3]


def test_the_parallel_branch_is_torchs_convolutions_and_batch_norm():
    """Of the block's input, added to attention."""
    branch = randomized(parallel_branch(16)).double()
    torchs = nn.Sequential(nn.Conv2d(16, 64, 3, 1, 1, groups=4), nn.BatchNorm2d(64), nn.SiLU(),
                           nn.Conv2d(64, 16, 3, 1, 1, groups=4)).double()  # fmt: skip
    torchs.load_state_dict(branch.state_dict(), strict=False)
    x = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(branch(x), torchs(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(branch[1].running_var, torchs[1].running_var)
    block = randomized(build(parallel_conv=True)).blocks[1].eval().double()
    tokens = x.flatten(2).transpose(1, 2)
    convolved = block.parallel(x).flatten(2).transpose(1, 2)
    attended = tokens + block.attn(block.norm1(tokens), (5, 7), 3) + convolved
    expected = attended + block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(tokens, (5, 7), 3), expected)


@pytest.mark.parametrize("kind", POSITIONS)
def test_recomputed_blocks_give_the_same_gradients_and_statistics(kind: str):
    results = []
    for grad_checkpointing in (False, True):
        backbone = build(position=kind, parallel_conv=True, drop_path_rate=0.5, grad_checkpointing=grad_checkpointing)
        randomized(backbone).double().train()
        torch.manual_seed(4)
        backbone(images(24, 32).double())[0].square().sum().backward()
        statistics = dict(backbone.named_buffers())
        assert any((buffer != 0).any() for name, buffer in statistics.items() if "running_mean" in name)
        results.append({**statistics, **{name: p.grad for name, p in backbone.named_parameters()}})
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-9, atol=1e-10)


def test_drop_path_grows_over_the_depth():
    rates = [block.drop_path.drop_prob for block in build(drop_path_rate=0.3).blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2, 0.3]))


def test_bf16_keeps_the_residual_stream_in_fp32():
    backbone = randomized(build(out_indices=(0, 3))).eval()
    exact = backbone(images(24, 32))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(images(24, 32))
    assert rounded[0].dtype == torch.float32
    for a, b in zip(exact, rounded, strict=True):
        assert 0 < (a - b).norm() < 0.03 * a.norm()
