"""Tests of the plain ViT backbone: what it computes, and which settings it rejects."""

import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.naive_attention import randomized
from helpers.tiny_backbone import POSITIONS, TINY, build_backbone, images
from torch import nn

from downstream.dense.backbone.convolution import on_grid, parallel_branch
from pretrain.models.vit import ARCHS


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with patch.dict(ARCHS, vit_tiny=TINY):
        yield


@torch.no_grad()
def test_convolutions_skip_the_class_token():
    x = torch.randn(2, 1 + 30, 16, generator=torch.Generator().manual_seed(2))
    out = on_grid(nn.Identity(), x, (5, 6))
    assert not out[:, 0].any()
    assert torch.equal(out[:, 1:], x[:, 1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "vit_giant"}, "arch='vit_giant': must be one of vit_tiny"),
        ({"position": "bias"}, "position='bias': must be relative or sincos"),
        ({"img_size": 30}, "img_size=30x30 is not a multiple of model.backbone.patch_size=4"),
        ({"img_size": 0}, "img_size=0x0"),
        ({"class_token": True}, "set model.backbone.window_size=0 (it is 3)"),
        ({"out_indices": (1,)}, "out_indices=(1,) leaves out the last block, 3"),
        ({"out_indices": (3, 4)}, "out_indices=(3, 4): give distinct blocks from 0 to 3"),
        ({"global_blocks": (2, 5)}, "global_blocks=(2, 5)"),
        ({"conv_blocks": (1, 1)}, "conv_blocks=(1, 1)"),
        ({"conv_blocks": (-1,)}, "conv_blocks=(-1,)"),
    ],
)
def test_invalid_settings_are_rejected(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_backbone(**options)


def test_image_size_must_be_a_multiple_of_the_patch_size():
    with pytest.raises(ValueError, match=r"image size 24x30 is not .* model\.backbone\.patch_size=4: set pad"):
        build_backbone()(images(24, 30))


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("height", [8, 20, 40])
def test_feature_maps_have_one_position_per_patch(kind: str, height: int):
    maps = build_backbone(position=kind, out_indices=(0, 3))(images(height, 28))
    assert [m.shape for m in maps] == [(2, 16, height // 4, 7)] * 2


@torch.no_grad()
def test_only_the_last_map_is_normalized():
    backbone = randomized(build_backbone(out_indices=(3, 1))).eval().double()
    first, last = backbone(images(24, 32).double())
    rest = first.flatten(2).transpose(1, 2)
    for number in (2, 3):
        rest = backbone.blocks[number](rest, (6, 8), 3)
    torch.testing.assert_close(last, backbone.norm(rest).transpose(1, 2).unflatten(2, (6, 8)))


@torch.no_grad()
def test_windows_limit_the_influence_of_a_pixel():
    """A pixel affects the whole map only through global attention, and otherwise only its own window."""
    pixels = images(24, 32, 1)
    other = pixels.clone()
    other[0, :, 0, 0] += 1
    for options, reached in (({"global_blocks": ()}, 9), ({}, 48), ({"window_size": 0, "global_blocks": ()}, 48)):
        backbone = randomized(build_backbone(**options)).eval()
        changed = (backbone(pixels)[0] != backbone(other)[0]).any(1)[0]
        assert changed.sum() == reached
        assert changed[:3, :3].all()


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("options", [{"conv_blocks": (0, 2)}, {"parallel_conv": True}])
def test_convolutions_start_at_zero_and_get_gradients(kind: str, options: dict[str, Any]):
    plain, convolved = build_backbone(position=kind), build_backbone(position=kind, **options)
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
    # Once its weights are not zero, a convolution carries information across windows.
    backbone = randomized(build_backbone(global_blocks=(), **options)).eval()
    other = pixels.clone()
    other[0, :, 11, 11] += 1  # at the corner of the first window
    assert (backbone(pixels)[0] != backbone(other)[0]).any(1)[0, 3, 3]


def test_parallel_branch_matches_torch_convolutions_and_batch_norm():
    """The block adds the branch's output for its input to the output of attention."""
    branch = randomized(parallel_branch(16)).double()
    reference = nn.Sequential(nn.Conv2d(16, 64, 3, 1, 1, groups=4), nn.BatchNorm2d(64), nn.SiLU(),
                           nn.Conv2d(64, 16, 3, 1, 1, groups=4)).double()  # fmt: skip
    reference.load_state_dict(branch.state_dict(), strict=False)
    x = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(branch(x), reference(x), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(branch[1].running_var, reference[1].running_var)
    block = randomized(build_backbone(parallel_conv=True)).blocks[1].eval().double()
    tokens = x.flatten(2).transpose(1, 2)
    convolved = block.parallel(x).flatten(2).transpose(1, 2)
    attended = tokens + block.attn(block.norm1(tokens), (5, 7), 3) + convolved
    expected = attended + block.mlp(block.norm2(attended))
    torch.testing.assert_close(block(tokens, (5, 7), 3), expected)


@pytest.mark.parametrize("kind", POSITIONS)
def test_recomputed_blocks_give_the_same_gradients_and_statistics(kind: str):
    results = []
    for grad_checkpointing in (False, True):
        backbone = build_backbone(
            position=kind, parallel_conv=True, drop_path_rate=0.5, grad_checkpointing=grad_checkpointing
        )
        randomized(backbone).double().train()
        torch.manual_seed(4)
        backbone(images(24, 32).double())[0].square().sum().backward()
        statistics = dict(backbone.named_buffers())
        assert any((buffer != 0).any() for name, buffer in statistics.items() if "running_mean" in name)
        results.append({**statistics, **{name: p.grad for name, p in backbone.named_parameters()}})
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-9, atol=1e-10)


def test_drop_path_grows_over_the_depth():
    rates = [block.drop_path.drop_prob for block in build_backbone(drop_path_rate=0.3).blocks]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor([0.0, 0.1, 0.2, 0.3]))


def test_bf16_keeps_the_residual_stream_in_fp32():
    backbone = randomized(build_backbone(out_indices=(0, 3))).eval()
    exact = backbone(images(24, 32))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(images(24, 32))
    assert rounded[0].dtype == torch.float32
    for a, b in zip(exact, rounded, strict=True):
        assert 0 < (a - b).norm() < 0.03 * a.norm()
