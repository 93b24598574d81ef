"""Exponential moving averages of parts of the trained module, in fp32, under every ZeRO stage; LUT's teacher is one.

They live outside the engine, unpartitioned and bit-identical on every rank: each rank computes the same from the same
parameters. Parameters are fp32 in every stage (autocast instead of DeepSpeed's bf16 mode), so there are no separate
master weights. ZeRO-3's partitions are gathered for each update.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from pretrain.trainer.checkpoint_layout import EMA_FILE


def cosine_momentum(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` to `end` while `progress` goes from 0 to 1."""
    return end - (end - start) * 0.5 * (1 + math.cos(math.pi * progress))


class NoEMA:
    """The interface of moving averages; this class itself stands for having none.

    Attributes:
        model: the averaged copy, if there is one.
    """

    model: nn.Module | None = None

    def model_inputs(self, images: Tensor) -> dict[str, Tensor]:
        """Further arguments of the trained module's forward for a batch of images on the device."""
        return {}

    def update(self, progress: float) -> None:
        """Called by all ranks after each optimizer step that changed the weights.

        Args:
            progress: fraction of the training's updates that is done.
        """

    def load(self, checkpoint: Path) -> None:
        """Loads `model`, if there is one, from a checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights and buffers, on the CPU."""
        return {}


class EMA(NoEMA):
    """An averaged copy of some modules.

    Args:
        model: its children are copies of `modules`, in the same order, made before ZeRO-3 partitions them.
        modules: parts of the module that the engine trains.
        start, end: momentum at the beginning and at the end of training.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], start: float, end: float, device: torch.device):
        self.model, self.modules, self.start, self.end = model.to(device), modules, start, end

    @torch.no_grad()
    def update(self, progress: float) -> None:
        import deepspeed

        weight = 1 - cosine_momentum(self.start, self.end, progress)
        parameters = [p for module in self.modules for p in module.parameters()]
        with deepspeed.zero.GatheredParameters(parameters):  # no-op below stage 3
            _lerp(self.model.parameters(), parameters, weight)
        averaged_buffers = [b for module in self.model.children() for b in module.buffers()]
        _lerp(averaged_buffers, [b for module in self.modules for b in module.buffers()], weight)

    def load(self, checkpoint: Path) -> None:
        self.model.load_state_dict(safetensors.torch.load_file(checkpoint / EMA_FILE))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}


def _lerp(average: Iterable[Tensor], new: Iterable[Tensor], weight: float) -> None:
    for averaged, current in zip(average, new, strict=True):
        averaged.lerp_(current, weight)
