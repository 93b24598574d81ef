"""Non-finite gradients: the optimizer skips the step on every rank, and its samples are listed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.trainer.launch import World


class Diverged(RuntimeError):  # noqa: N818
    """Too many steps in a row had no finite gradient."""


def poison_nonfinite(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite its gradient is NaN, so that the optimizer skips the step on every rank."""
    return loss * (loss * 0 + 1).detach()


def list_samples(path: Path, step: int, keys: list[str], world: World) -> None:
    """Appends the samples of a skipped step to a file; called by all ranks, each with the keys of its own samples."""
    parts: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(parts, keys)
    if world.is_main:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "samples": [key for part in parts for key in part]}) + "\n")


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
