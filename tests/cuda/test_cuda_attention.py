"""Attention on a GPU: the window kernel and torch's kernels, with and without a bias; correct and deterministic."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.models.attention import attend
from pretrain.models.relative_position import CLASS_BUCKET, grid_buckets
from pretrain.models.sdpa import set_deterministic
from pretrain.models.window_attention import window_attention, window_tokens

pytestmark = pytest.mark.cuda
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
WINDOW, WINDOWS, HEADS = 7, 24, 4


def draw_patches(count: int) -> Tensor | None:
    """(WINDOWS, count) patches of each window in random order; None for all patches."""
    if count == WINDOW**2:
        return None
    generator = torch.Generator().manual_seed(count)
    return torch.stack([torch.randperm(WINDOW**2, generator=generator)[:count] for _ in range(WINDOWS)])


def draw(count: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, the table and an upstream gradient, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(WINDOWS, 1 + count, 3, HEADS, channels, generator=generator).to(dtype)
    table = (torch.randn(channels, CLASS_BUCKET + 1, generator=generator) * 0.2).to(dtype).float()
    return qkv, table, torch.randn(WINDOWS, 1 + count, HEADS, channels, generator=generator).to(dtype)


def exact(qkv: Tensor, table: Tensor, upstream: Tensor, patches: Tensor | None) -> list[Tensor]:
    """Output and gradients from the formula, in float64 on the CPU."""
    qkv, table = qkv.double().requires_grad_(), table.double().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    buckets = grid_buckets(WINDOW, WINDOW).expand(WINDOWS, -1, -1)
    if patches is not None:
        tokens = F.pad(1 + patches, (1, 0))
        buckets = buckets[0][tokens[:, :, None], tokens[:, None, :]]
    terms = q @ table  # (G, H, L, 50)
    bias = terms.gather(3, buckets[:, None].expand(-1, HEADS, -1, -1))
    out = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    out = out.transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, (qkv, table), upstream.double())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [64, 80])
@pytest.mark.parametrize("count", [49, 25, 10], ids=["all 50 tokens", "PR-MIM's 26", "11 visible"])
def test_window_kernel_accuracy_and_determinism(count: int, channels: int, dtype: torch.dtype, device: torch.device):
    """Close to float64. Rounding P, dS and the results alone costs 0.6 epsilon, as emulated in torch."""
    patches = draw_patches(count)
    inputs = draw(count, channels, dtype)
    expected = exact(*inputs, patches)
    if device.type != "cuda":
        pytest.skip("the kernel runs on GPUs; tests/pretrain has Triton's interpreter")
    qkv, table, upstream = (tensor.to(device) for tensor in inputs)
    tokens = window_tokens(WINDOW, None if patches is None else patches.to(device), device)
    results = []
    for _ in range(2):
        leaves = qkv.detach().requires_grad_(), table.detach().requires_grad_()
        out = window_attention(*leaves, tokens)
        assert out.dtype == dtype
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for name, first, second, wanted in zip(("out", "qkv", "table"), *results, expected, strict=True):
        assert torch.equal(first, second), f"{name} has other bits the second time"
        assert relative_error(first, wanted) < 2 * EPSILON[dtype], name


def relative_error(measured: Tensor, wanted: Tensor) -> float:
    return float((measured.cpu().double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("length", [50, 197, 785])
def test_attention_without_bias_is_accurate_and_deterministic(length: int, device: torch.device):
    """As in MAE; the backward pass is deterministic, too."""
    generator = torch.Generator().manual_seed(length)
    inputs = [torch.randn(2, 6, length, 64, generator=generator).bfloat16() for _ in range(4)]
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:3]]
    out = F.scaled_dot_product_attention(*leaves)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]
    set_deterministic(True)
    first, second = (run_attention([tensor.to(device) for tensor in inputs]) for _ in range(2))
    for name, one, other, wanted in zip(("out", "q", "k", "v"), first, second, expected, strict=True):
        assert torch.equal(one, other), f"{name} has other bits the second time"
        assert relative_error(one, wanted) < 4 * EPSILON[torch.bfloat16], name


def test_attention_with_a_learned_fp32_bias_is_accurate(device: torch.device):
    """As in BEiT and SimMIM under autocast: the bias is fp32, and heads are its last dimension in memory."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 16, 197, 64, generator=generator).bfloat16() for _ in range(4)]
    bias = torch.randn(197, 197, 16, generator=generator).permute(2, 0, 1)[None]
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:3]]
    out = F.scaled_dot_product_attention(*leaves, attn_mask=bias.double())
    expected = [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]
    set_deterministic(True)
    results = run_attention([tensor.to(device) for tensor in inputs], bias.to(device).requires_grad_())
    for name, result, wanted in zip(("out", "q", "k", "v"), results, expected, strict=True):
        assert relative_error(result, wanted) < 4 * EPSILON[torch.bfloat16], name


def run_attention(inputs: list[Tensor], bias: Tensor | None = None) -> list[Any]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out = attend(*leaves, bias)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]
