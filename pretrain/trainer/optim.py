"""Parameter groups, the learning-rate schedule, and optimizers that refuse non-finite gradients."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pretrain.trainer.config import OptimConfig, RunConfig


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
    """Sets the rate of every group, scaled by its `lr_scale`. DeepSpeed's schedulers would overwrite such scales."""
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class NonfiniteGuard(torch.optim.Optimizer):
    """A mixin that gives an optimizer what DeepSpeed's ZeRO optimizers have and its stage 0 lacks.

    It clips the gradient, records the norm before that, and skips a step whose gradient is not finite. DeepSpeed reads
    `overflow` and `_global_grad_norm` after `step`.
    """

    clip_grad = 0.0
    overflow = False
    _global_grad_norm = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad or math.inf)
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if not self.overflow:
            super().step()


class GuardedAdamW(NonfiniteGuard, torch.optim.AdamW):
    """AdamW for stage 0."""


def build_adamw(groups: list[dict[str, Any]], config: RunConfig, stage: int) -> torch.optim.Optimizer:
    """AdamW, guarded in ZeRO stage 0."""
    kind = torch.optim.AdamW if stage else GuardedAdamW
    return kind(groups, lr=config.peak_lr, betas=config.optim.betas)
