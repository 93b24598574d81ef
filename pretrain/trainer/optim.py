"""Parameter groups, the learning-rate schedule, and AdamW."""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pretrain.trainer.config import OptimConfig, RunConfig
from pretrain.trainer.nonfinite import NonfiniteGuard


def decays(name: str, ndim: int, decay_class_token: bool) -> bool:
    """Whether `parameter_groups` gives a parameter weight decay."""
    return ndim > 1 and (decay_class_token or name.rpartition(".")[2] != "cls_token")


def parameter_groups(model: nn.Module, weight_decay: float, decay_class_token: bool = True) -> list[dict[str, Any]]:
    """Every trainable parameter exactly once: matrices, tokens and relative tables decay, vectors do not.

    This is timm's rule, which the authors of MAE and LoMaR used. Call it before ZeRO-3 empties the shapes.

    Args:
        decay_class_token: False for SimMIM's rule, under which the encoder's class token does not decay.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decaying = {name for name, p in trainable.items() if decays(name, p.ndim, decay_class_token)}
    groups = [
        {"params": [p for name, p in trainable.items() if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if name not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


# An encoder's parameters in front of its blocks, or shared by all of them.
_BELOW = ("patch_embed.", "cls_token", "class_adapter.", "reg_token", "pos_embed", "rel_pos_bias.")


def layers_above(name: str, depth: int) -> int:
    """How many layers below the head an encoder's parameter is, for layer decay: 0 for what follows the blocks.

    The last block is 1 below it. What is in front of the blocks, and a table that they share, is depth + 1 below.
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        return depth - int(block[1])
    return depth + 1 if name.startswith(_BELOW) else 0


def learning_rate(step: int, steps_per_epoch: int, epochs: int, peak: float, config: OptimConfig) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr`, or steps; a pure function of the step."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return peak * epoch / config.warmup_epochs
    if config.schedule == "steps":
        passed = sum(epoch >= end for end in config.step_epochs)
        return max(peak * config.step_factor**passed, config.min_lr)
    progress = (epoch - config.warmup_epochs) / (epochs - config.warmup_epochs)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """Sets the rate of every group, scaled by its `lr_scale`. DeepSpeed's schedulers would overwrite such scales."""
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


class GuardedAdamW(NonfiniteGuard, torch.optim.AdamW):
    """AdamW for stage 0."""


def build_adamw(groups: list[dict[str, Any]], config: RunConfig, stage: int) -> torch.optim.Optimizer:
    """AdamW in one kernel, guarded in ZeRO stage 0."""
    kind = torch.optim.AdamW if stage else GuardedAdamW
    return kind(groups, lr=config.peak_lr, betas=config.optim.betas, fused=True)


def keep_fused(optimizer: torch.optim.Optimizer) -> None:
    """Call it after loading the optimizer's state: the saved options must not win.

    A fused optimizer reads its step counts on the device; others keep them on the CPU.
    """
    if not optimizer.defaults.get("fused"):
        return
    for group in optimizer.param_groups:
        group["fused"] = True
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
