"""Parameter groups, the learning-rate schedule, and an AdamW that refuses non-finite gradients."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter exactly once: matrices, tokens and relative tables decay, vectors do not.

    This is timm's rule, which the authors of MAE and LoMaR used. Call it before ZeRO-3 empties the shapes.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, steps_per_epoch: int, epochs: int, peak: float, config: OptimConfig) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr`; a pure function of the step."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (epochs - config.warmup_epochs)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Ours, not one of DeepSpeed's schedulers: those overwrite the rates of single groups."""
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that leaves the weights alone where the gradient is not finite, as DeepSpeed's ZeRO optimisers do.

    DeepSpeed has no such check without ZeRO (stage 0); it reads these two attributes after `step`.
    """

    overflow = False
    _global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm(gradients).item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step()
