"""Exponential moving averages of parts of the trained module, in fp32, under every ZeRO stage; LUT's teacher is one.

They live outside of the engine, whole on every rank and with the same bits on all of them: each rank computes the same
from the same parameters. These are fp32 in every stage (autocast instead of DeepSpeed's bf16 mode), so there are no
masters to look for; ZeRO-3's are gathered for the moment of an update.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pretrain.methods.context import LUT, Context


def momentum(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end` while `progress` goes from 0 to 1."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))


class Average:
    """A copy that follows.

    Args:
        copy: of the followed modules, which are its children in the same order; made before ZeRO-3 partitions them.
        followed: parts of the module that the engine trains.
        start, end: momentum at the beginning and at the end of training.
    """

    FILE = "average.safetensors"  # in a checkpoint

    def __init__(self, copy: Any, followed: list[nn.Module], start: float, end: float, device: torch.device):
        self.target, self.followed, self.start, self.end = copy.to(device), followed, start, end

    def targets(self, images: Tensor) -> dict[str, Tensor]:
        """What the method's forward takes beside images and view."""
        return {}

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """One step after the optimiser's: only where it moved the weights. All ranks together.

        Args:
            progress: share of the training's updates that is done.
        """
        import deepspeed

        weight = 1 - momentum(self.start, self.end, progress)
        theirs = [p for module in self.followed for p in module.parameters()]
        with deepspeed.zero.GatheredParameters(theirs):  # no-op below stage 3
            _move(self.target.parameters(), theirs, weight)
        copied = [b for module in self.target.children() for b in module.buffers()]
        _move(copied, [b for module in self.followed for b in module.buffers()], weight)

    def save(self, checkpoint: Path) -> None:
        """Raises OSError where the disk does not take it. The main rank's only."""
        (checkpoint / self.FILE).write_bytes(safetensors.torch.save(self.weights()))

    def load(self, checkpoint: Path) -> None:
        self.target.load_state_dict(safetensors.torch.load_file(checkpoint / self.FILE))

    def weights(self) -> dict[str, Tensor]:
        """The copy's weights and buffers on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in self.target.state_dict().items()}


class Teacher(Average):
    """LUT's: an average that gives the method the targets of its images.

    Args:
        method: made of `followed()` modules, which `target()` copies; before ZeRO-3 partitions it.
        config: the add-on's.
        device: where the images are.
        bf16: whether it computes under autocast, as the engine does.
    """

    def __init__(self, method: LUT, config: Context, device: torch.device, bf16: bool):
        super().__init__(method.target(), method.followed(), config.momentum, config.final_momentum, device)
        self.bf16 = bf16

    @torch.no_grad()
    def targets(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return {"target": self.target(images)}


def _move(average: Iterable[Tensor], new: Iterable[Tensor], weight: float) -> None:
    for mine, theirs in zip(average, new, strict=True):
        mine.lerp_(theirs, weight)


class NoAverage:
    """What trainings without one have."""

    target = None

    def targets(self, images: Tensor) -> dict[str, Tensor]:
        return {}

    def follow(self, progress: float) -> None: ...

    def save(self, checkpoint: Path) -> None: ...

    def load(self, checkpoint: Path) -> None: ...

    def weights(self) -> dict[str, Tensor]:
        return {}
