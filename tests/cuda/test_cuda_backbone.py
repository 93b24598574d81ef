"""Backbones of detectors and segmentors on a GPU: fused attention over feature maps, and bf16 with fp32 outputs."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers.naive_attention import randomized
from torch import Tensor, nn

from downstream.dense.backbone.attention import DecomposedAttention, RelativeAttention
from pretrain.models.vit import ARCHS, Arch

pytestmark = pytest.mark.cuda
CPU = torch.device("cpu")
DETECTOR = {"window_size": 5, "global_blocks": (1, 3), "out_indices": (3,)}
SEGMENTOR = {"window_size": 0, "class_token": True, "out_indices": (0, 1, 3)}


def run(module: nn.Module, inputs: tuple[Any, ...], device: torch.device, bf16: bool) -> tuple[list[Tensor], Any]:
    """Outputs, and gradients of a fixed weighted sum with respect to parameters and first input, moved to the CPU."""
    module.to(device).zero_grad()
    first = inputs[0].detach().to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        out = module(first, *inputs[1:])
    outputs = list(out) if isinstance(out, tuple) else [out]
    for number, one in enumerate(outputs):
        weights = torch.randn(one.shape, generator=torch.Generator().manual_seed(number)).to(device)
        (one.float() * weights).sum().backward(retain_graph=True)
    # Clone, because `to` moves a parameter's gradient along with the parameter.
    gradients = {name: p.grad.float().cpu().clone() for name, p in module.named_parameters() if p.grad is not None}
    return [one.detach().cpu() for one in outputs], gradients | {"input": first.grad.float().cpu()}


def check(module: nn.Module, inputs: tuple[Any, ...], device: torch.device, bf16: bool, tolerance: float) -> None:
    outputs, gradients = run(module, inputs, CPU, bf16=False)
    there, gradients_there = run(module, inputs, device, bf16)
    for one, other in zip(outputs, there, strict=True):
        assert (other.float() - one).norm() < tolerance * one.norm()
    assert gradients.keys() == gradients_there.keys()
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        # The gradient of the key bias is zero up to rounding, hence the second term.
        assert (gradients_there[name] - gradient).norm() < 4 * tolerance * gradient.norm() + 1e-3 * largest, name


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-4), (True, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [0, 5], ids=["whole grid", "windows"])
@pytest.mark.parametrize("kind", ["relative", "decomposed"])
def test_grid_attention_matches_cpu_fp32(kind: str, window: int, bf16: bool, tolerance: float, device: torch.device):
    """Windows of 5x5 do not divide the 12x13 grid, so those at the edges are incomplete."""
    grid = (12, 13)
    torch.manual_seed(0)
    if kind == "relative":
        attention: nn.Module = RelativeAttention(128, 2)
    else:
        attention = DecomposedAttention(128, 2, (window, window) if window else (14, 14))
    x = torch.randn(2, grid[0] * grid[1], 128, generator=torch.Generator().manual_seed(1))
    check(slightly_randomized(attention), (x, grid, window), device, bf16, tolerance)


def slightly_randomized(module: nn.Module) -> nn.Module:
    """Like `randomized`, but with smaller weights, so that attention does not saturate on a single token."""
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    randomized(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.lerp_(before[name], 0.8)
    return module


@pytest.mark.parametrize("position", ["relative", "sincos"])
@pytest.mark.parametrize("options", [DETECTOR, SEGMENTOR], ids=["a detector's", "a segmentor's"])
def test_bf16_backbone_matches_cpu_fp32(options: dict[str, Any], position: str, device: torch.device):
    pytest.importorskip("mmengine")
    from helpers.tiny_backbone import build_backbone, images

    with patch.dict(ARCHS, vit_tiny=Arch(128, 4, 2)):
        backbone = build_backbone(img_size=(64, 96), position=position, **options)
    pixels = images(64, 96)
    slightly_randomized(backbone)
    check(backbone, (pixels,), device, bf16=True, tolerance=3e-2)
    maps, _ = run(backbone, (pixels,), device, bf16=True)
    assert all(one.dtype == torch.float32 for one in maps)
