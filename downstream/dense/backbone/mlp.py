"""A block's MLP in less memory: of its two wide maps, one is kept for the backward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """linear(gelu(linear(x))), with timm's parameter names; (..., D) -> (..., D).

    Args:
        dim, hidden: D, and the width of what is between.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = ActivatedLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class ActivatedLinear(nn.Linear):
    """linear(gelu(x)), computed in x's precision. A module of its own, for ZeRO 3 gathers weights by modules."""

    def forward(self, x: Tensor) -> Tensor:
        return _ActivatedLinear.apply(x, self.weight, self.bias)


class _ActivatedLinear(torch.autograd.Function):
    """Keeps x and the weight itself, neither gelu(x) nor the copy of the weight that autocast would keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_weight = rows.mT @ F.gelu(x).flatten(0, -2)
        of_x = torch.ops.aten.gelu_backward(gradient @ weight.to(x.dtype), x)
        return of_x, of_weight, rows.sum(0)
