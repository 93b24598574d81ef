"""Records which images each step trained on, to compare runs: `log.samples=true`."""

import json
import zlib
from pathlib import Path

import torch.distributed as dist

from data.batch import Batch
from pretrain.trainer.append import append
from pretrain.trainer.launch import World
from pretrain.trainer.loggers import drop_after


class SampleRecord:
    """samples.jsonl: for each step, the keys of its global batch in order, and a CRC-32 of each image's pixels.

    Neither depends on the number of ranks or of micro-batches.
    """

    def __init__(self, path: Path, world: World, start: int):
        """Continues the file of a run that goes on after step `start`; called on all ranks."""
        self._path, self._world = path, world
        self._micro_batches: list[list[tuple[str, int]]] = []
        if world.is_main:
            drop_after(path, start)

    def add(self, batch: Batch) -> None:
        """Adds the next micro-batch of this rank."""
        pixels = batch.images.cpu().numpy()
        digests = [zlib.crc32(image.tobytes()) for image in pixels]
        self._micro_batches.append(list(zip(batch.keys, digests, strict=True)))

    def write(self, step: int) -> None:
        """Writes the step of all micro-batches since the last call; called by all ranks together."""
        ranks: list[list[list[tuple[str, int]]]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(ranks, self._micro_batches)
        self._micro_batches = []
        if self._world.is_main:
            shown = [pair for parts in zip(*ranks, strict=True) for part in parts for pair in part]
            keys, digests = zip(*shown, strict=True)
            append(self._path, json.dumps({"step": step, "keys": keys, "digests": digests}) + "\n")
