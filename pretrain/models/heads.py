"""The MLP heads of methods that compare features, with batch normalisation over all ranks.

Torch's SyncBatchNorm refuses to work on a CPU, so the few lines of it that are needed stand here.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from torch import Tensor, nn

from pretrain.models.vit import at_least_fp32, init_weights


def _sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' tensors, through which gradients flow back to all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return collective.all_reduce(x)
    return x


class SyncBatchNorm(nn.Module):
    """Batch normalisation of (R, D) rows by the statistics of all ranks' rows; in fp32 also under autocast.

    Unless `affine`, a learned scale and shift do not follow.

    In eval mode rows are normalised by the running statistics, which a batch that is not finite leaves alone.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            total = _sum_over_ranks(torch.cat([x.sum(0), x.new_full((1,), len(x))]))  # ranks may differ in their rows
            mean, rows = total[:-1] / total[-1], total[-1].detach()
            var = _sum_over_ranks((x - mean).square().sum(0)) / rows
            self._follow(mean.detach(), var.detach() * rows / (rows - 1))
        x = (x - mean) * (var + self.eps).rsqrt()
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        for running, seen in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(seen.isfinite(), running.lerp(seen, self.momentum), running))


def mlp_head(dim: int, hidden: int) -> nn.Sequential:
    """Two linear layers without biases, batch normalisation and ReLU between them: (R, D) -> (R, D)."""
    head = nn.Sequential(
        nn.Linear(dim, hidden, bias=False), SyncBatchNorm(hidden), nn.ReLU(), nn.Linear(hidden, dim, bias=False)
    )
    return head.apply(init_weights)
