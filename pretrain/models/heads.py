"""The MLP heads of methods that compare features, with batch normalization over all ranks.

Torch's SyncBatchNorm does not work on CPUs, so the few lines of it that are needed are implemented here.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as collective
from torch import Tensor, nn

from pretrain.models.vit import at_least_fp32, init_weights


def _sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all ranks; gradients flow back to all of them."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        return collective.all_reduce(x)
    return x


class SyncBatchNorm(nn.Module):
    """Batch normalization of (R, D) vectors by the statistics over all ranks, in fp32 whatever the input's dtype.

    A learned scale and shift follow if `affine`. In eval mode the running statistics are used; a batch that is not
    finite does not change them.
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
            total = _sum_over_ranks(
                torch.cat([x.sum(0), x.new_full((1,), len(x))])
            )  # ranks may have different numbers of vectors
            mean, count = total[:-1] / total[-1], total[-1].detach()
            var = _sum_over_ranks((x - mean).square().sum(0)) / count
            self._update_running(mean.detach(), var.detach() * count / (count - 1))
        x = (x - mean) * (var + self.eps).rsqrt()
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(batch.isfinite(), running.lerp(batch, self.momentum), running))


def mlp_head(dim: int, hidden_dim: int) -> nn.Sequential:
    """Linear, batch normalization, ReLU, linear, without biases: (R, D) -> (R, D)."""
    head = nn.Sequential(
        nn.Linear(dim, hidden_dim, bias=False),
        SyncBatchNorm(hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, dim, bias=False),
    )
    return head.apply(init_weights)
