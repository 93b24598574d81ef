"""Non-finite gradients: the optimizer skips the step on every rank, and its samples are listed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.trainer.append import append
from pretrain.trainer.launch import World


class Diverged(RuntimeError):  # noqa: N818
    """Too many steps in a row had a non-finite gradient."""


def poison_nonfinite(loss: Tensor) -> Tensor:
    """The same loss; if it is not finite its gradient is NaN, so that the optimizer skips the step on every rank."""
    return loss * (loss * 0 + 1).detach()


def list_samples(path: Path, step: int, keys: list[str], world: World) -> None:
    """Appends the samples of a skipped step to a file; called by all ranks, each with the keys of its own samples."""
    parts: list[list[str]] = [[] for _ in range(world.size)]
    dist.all_gather_object(parts, keys)
    if world.is_main:
        append(path, json.dumps({"step": step, "samples": [key for part in parts for key in part]}) + "\n")


class NonfiniteGuard(torch.optim.Optimizer):
    """A mixin that gives an optimizer what DeepSpeed's ZeRO optimizers have and its stage 0 lacks.

    It clips the gradient, records its norm before clipping, and skips a step whose gradient is not finite: weights,
    moments and step counts keep their bits. Parameters without a gradient get a zero gradient, and decay. With a fused
    optimizer no step waits for the device; `applied_later` tells the host the outcome. DeepSpeed reads
    `_global_grad_norm` after `step`.

    Attributes:
        skipped: () float32 on the device, 1 if the last step was skipped, else 0.
    """

    clip_grad = 0.0
    skipped: Tensor
    _global_grad_norm: float | Tensor = 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.clip_grad:  # a norm that is not finite spoils the gradient, which is skipped anyway
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad, norm)
        self._global_grad_norm = norm
        self.skipped = norm.isfinite().logical_not().float()
        if getattr(self, "_step_supports_amp_scaling", False):
            self.found_inf = self.skipped  # torch's fused kernels read it under this name, and do nothing if it is 1
            super().step()
        elif not self.skipped:  # other optimizers wait for the device
            super().step()


def applied_later(engine: Any) -> Callable[[], bool]:
    """Whether the optimizer step that was just taken changed the weights.

    Returns:
        A function that says so. In stage 0 it waits until the device is done with the step; DeepSpeed's ZeRO optimizers
        have waited already.
    """
    if not isinstance(engine.optimizer, NonfiniteGuard):
        applied = bool(engine.was_step_applied())  # the next micro-batch forgets it
        return lambda: applied
    skipped = engine.optimizer.skipped
    if skipped.device.type == "cpu":
        return lambda: not skipped
    copied = torch.empty_like(skipped, device="cpu", pin_memory=True)
    copied.copy_(skipped, non_blocking=True)
    ready = torch.cuda.current_stream(skipped.device).record_event()

    def read() -> bool:
        ready.synchronize()
        return not copied

    return read
