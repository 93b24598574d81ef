"""A block's MLP that saves memory: it keeps only one of its two hidden activations for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """linear(gelu(linear(x))), with timm's parameter names; (..., D) -> (..., D).

    Args:
        dim, hidden_dim: D, and the hidden width.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = ActivatedLinear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class ActivatedLinear(nn.Linear):
    """linear(gelu(x)), computed in x's precision; a module because ZeRO-3 gathers weights per module."""

    def forward(self, x: Tensor) -> Tensor:
        return _ActivatedLinear.apply(x, self.weight, self.bias)


class _ActivatedLinear(torch.autograd.Function):
    """Saves x and the weight itself, instead of gelu(x) and the copy of the weight that autocast would save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        tokens = gradient.flatten(0, -2)
        weight_gradient = tokens.mT @ F.gelu(x).flatten(0, -2)
        x_gradient = torch.ops.aten.gelu_backward(gradient @ weight.to(x.dtype), x)
        return x_gradient, weight_gradient, tokens.sum(0)
