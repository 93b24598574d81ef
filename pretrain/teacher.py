"""The momentum teacher: an exponential moving average of parts of the trained module, in fp32, under every ZeRO stage.

It lives outside of the engine, whole on every rank and with the same bits on all of them: each rank computes the same
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


def momentum(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end` while `progress` goes from 0 to 1."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))


class Teacher:
    """Gives a method the targets of its images, and follows it.

    Args:
        method: made of `followed()` modules, which `target()` copies; before ZeRO-3 partitions it.
        config: with `momentum` and `final_momentum`.
        device: where the images are.
        bf16: whether it computes under autocast, as the engine does.
    """

    FILE = "teacher.safetensors"  # in a checkpoint

    def __init__(self, method: Any, config: Any, device: torch.device, bf16: bool):
        self.config, self.bf16 = config, bf16
        self.target: Any = method.target().to(device)
        self.followed: list[nn.Module] = method.followed()

    @torch.no_grad()
    def targets(self, images: Tensor) -> dict[str, Tensor]:
        """What the method's forward takes beside images and view."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return {"target": self.target(images)}

    @torch.no_grad()
    def follow(self, progress: float) -> None:
        """One step after the optimiser's: only where it moved the weights. All ranks together.

        Args:
            progress: share of the training's updates that is done.
        """
        import deepspeed

        weight = 1 - momentum(self.config.momentum, self.config.final_momentum, progress)
        theirs = [p for module in self.followed for p in module.parameters()]
        with deepspeed.zero.GatheredParameters(theirs):  # no-op below stage 3
            _move(self.target.parameters(), theirs, weight)
        copied = [b for module in self.target.children() for b in module.buffers()]
        _move(copied, [b for module in self.followed for b in module.buffers()], weight)

    def save(self, checkpoint: Path) -> None:
        """Raises OSError where the disk does not take it. The main rank's only."""
        state = {name: tensor.cpu().contiguous() for name, tensor in self.target.state_dict().items()}
        (checkpoint / self.FILE).write_bytes(safetensors.torch.save(state))

    def load(self, checkpoint: Path) -> None:
        self.target.load_state_dict(safetensors.torch.load_file(checkpoint / self.FILE))

    def encoder(self) -> dict[str, Tensor]:
        """The averaged encoder's weights on the CPU."""
        return {name: tensor.cpu() for name, tensor in self.target.encoder.state_dict().items()}


def _move(average: Iterable[Tensor], new: Iterable[Tensor], weight: float) -> None:
    for mine, theirs in zip(average, new, strict=True):
        mine.lerp_(theirs, weight)


class NoTeacher:
    """What methods without one have."""

    def targets(self, images: Tensor) -> dict[str, Tensor]:
        return {}

    def follow(self, progress: float) -> None: ...

    def save(self, checkpoint: Path) -> None: ...

    def load(self, checkpoint: Path) -> None: ...

    def encoder(self) -> dict[str, Tensor]:
        return {}
