"""Tests of ViTDet's feature pyramid: strides, layers, and its norm in mmdet's heads."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_norm_layer
from mmengine.registry import MODELS
from torch import nn

from downstream.detect.pyramid import SimpleFeaturePyramid


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2)])
def test_strides_and_shapes(size: tuple[int, int]):
    neck = MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": 16, "out_channels": 8})
    maps = neck((torch.randn(2, 16, *size),))
    half = [-(-side // 2) for side in size]
    quarter = [-(-side // 2) for side in half]
    sizes = [[4 * side for side in size], [2 * side for side in size], list(size), half, quarter]
    assert [list(m.shape) for m in maps] == [[2, 8, *s] for s in sizes]
    assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])


def test_scales_are_aligned():
    """A change at one position of the map affects only nearby positions at every scale."""
    neck = SimpleFeaturePyramid(16, 8).eval()
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, :, 8, 4] += 1
    for number, (a, b) in enumerate(zip(neck((x,)), neck((other,)), strict=True)):
        stride = 2.0 ** (2 - number)  # positions of this map per position of the backbone's map
        rows, cols = (a != b).any(1)[0].nonzero().T
        assert len(rows)
        assert rows.min() >= 8 * stride - 1 - stride
        assert rows.max() <= 9 * stride + 1
        assert cols.min() >= 4 * stride - 1 - stride
        assert cols.max() <= 5 * stride + 1


def test_layers_match_vitdet():
    kinds = [[type(layer).__name__ for layer in scale] for scale in SimpleFeaturePyramid(16, 8).scales]
    out = ["Conv2d", "LayerNorm2d", "Conv2d", "LayerNorm2d"]
    up = "ConvTranspose2d"
    assert kinds == [[up, "LayerNorm2d", "GELU", up, *out], [up, *out], out, ["MaxPool2d", *out]]


def test_ln2d_works_as_a_norm_in_heads():
    norm = build_norm_layer({"type": "LN2d"}, 6)[1].double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), eps=norm.eps).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)
    layer = ConvModule(6, 5, 3, padding=1, norm_cfg={"type": "LN2d"})
    assert layer(x.float()).shape == (2, 5, 3, 4)
    assert isinstance(layer.norm, nn.LayerNorm)
    assert layer.conv.bias is None
