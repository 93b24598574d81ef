"""A run's metrics: accumulated over steps and ranks, and read back from its files."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import Loader


class Meter:
    """Accumulates over steps, until it is reset. Losses stay on the device until `read`: no step waits for them."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._micro_batches = self._steps = self._images = self._skipped = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Adds what a method returned for one micro-batch of this rank: `loss` and other values to log, by name."""
        for name, value in losses.items():
            value = value.detach().double()
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._micro_batches += 1

    def add_step(self, images: int, waited: float, skipped: int) -> None:
        """Adds a step: its global batch size, the seconds that this rank waited for data, the images it replaced."""
        self._steps += 1
        self._images += images
        self._waited += waited
        self._skipped += skipped

    def exclude(self, seconds: float) -> None:
        """Takes time that was not spent on training out of the steps' time."""
        self._since += seconds

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reset, and the number of skipped images; called by all ranks together."""
        seconds = time.perf_counter() - self._since
        losses = torch.stack(list(self._losses.values())) / self._micro_batches
        totals = torch.cat([losses, losses.new_tensor([self._waited / seconds, self._skipped])])
        dist.all_reduce(totals)
        *means, wait, skipped = totals.tolist()
        world = dist.get_world_size()
        named = {name: mean / world for name, mean in zip(self._losses, means, strict=True)}
        return {
            "loss": named.pop("loss"),
            **named,
            "images_per_s": self._images / seconds,
            "step_s": seconds / self._steps,
            "data_wait": wait / world,
            "skipped_images": int(skipped),
        }


def varying_size(loader: Loader, position: int) -> dict[str, int | str]:
    """The image size at a step of the order, if the run has several: the side of a square, or height x width."""
    if len(loader.sizes) == 1:
        return {}
    height, width = loader.size_at(position)
    return {"image_size": height if height == width else f"{height}x{width}"}


def read_metrics(path: Path, counter: str = "step") -> list[dict[str, Any]]:
    """The records of a file of JSON lines that count steps by the key `counter`; empty if there is no file.

    Skips what is no record: lines that a kill or a full disk has cut off, and what a crash may leave in a file.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:  # perhaps not even UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get(counter), int):
            records.append(record)
    return records
