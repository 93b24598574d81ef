"""Non-finite gradients: the optimizer skips the step on every rank, and its samples are listed."""

import json
from pathlib import Path

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
