"""Tests of the comparison in float64: what it detects, and that models compute in float64 throughout."""

import math

import pytest
import timm
import torch
from helpers.originals import PATCH, SAME_PARAMETERS, SHAPE, feature_difference, images, randomized
from torch import Tensor, nn

import downstream.checkpoints.timm_models  # noqa: F401  # registers ours
from downstream.checkpoints.compare import FLOAT64_TOLERANCE, float64_copy, max_difference
from pretrain.models.features import features
from pretrain.models.vit import ViT

POSITIONS = ["relative", "bias", "sincos"]


def make(position: str) -> ViT:
    return randomized(ViT("vit_tiny", PATCH, (3, 3), position == "relative", bias=position == "bias"))


def in_timm(encoder: ViT) -> nn.Module:
    """Build the same encoder with timm's code, which includes timm's own attention for absolute positions."""
    name, options = "lomar_vit_tiny_patch16_224", {"position": encoder.position}
    if encoder.position == "sincos":
        name, options = "vit_tiny_patch16_224", {"num_classes": 0}
    model = timm.create_model(name, patch_size=PATCH, img_size=SHAPE["img_size"], **options)
    model.load_state_dict(encoder.state_dict())
    return model


@pytest.mark.parametrize("position", POSITIONS)
def test_last_bit_of_a_tensor_makes_a_difference_but_rounding_does_not(position: str):
    encoder = make(position)
    assert feature_difference(encoder, in_timm(encoder), images()) < SAME_PARAMETERS
    for name, parameter in encoder.named_parameters():
        if name.endswith("attn.qkv.bias"):  # the bias of the keys has no effect
            continue
        before = parameter.detach().clone()
        parameter.data = torch.nextafter(before, torch.full_like(before, torch.inf))
        changed = in_timm(encoder)
        parameter.data = before
        assert feature_difference(encoder, changed, images()) > FLOAT64_TOLERANCE, name


def test_difference_is_relative_to_the_largest_feature():
    first = torch.tensor([100.0, 1.0], dtype=torch.float64)
    assert max_difference(first, first + torch.tensor([0.0, 0.5])) == pytest.approx(0.005)
    assert max_difference(first * 0, first * 0) == 0
    assert max_difference(first * 0, first) == 1
    assert math.isnan(max_difference(first, torch.tensor([100.0, torch.nan])))


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_every_block_of_a_float64_copy_computes_in_float64(position: str):
    encoder = make(position)
    copied = float64_copy(encoder)
    assert {tensor.dtype for tensor in encoder.state_dict().values()} == {torch.float32}
    found: list[torch.dtype] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.extend((inputs[0].dtype, output.dtype))

    for model in (copied, encoder):
        for block in model.blocks:
            block.register_forward_hook(record)
    exact = features(copied, images().double())
    assert set(found) == {exact.dtype} == {torch.float64}
    assert max_difference(features(encoder, images()).double(), exact) < 1e-5
    found.clear()
    with torch.autocast("cpu", torch.bfloat16):
        features(encoder, images())
    assert set(found) == {torch.float32}, "the residual stream stays in fp32"
