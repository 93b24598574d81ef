"""Micro-batches on the device, each copied there while the one before it is computed."""

import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from data.batch import Batch

T = TypeVar("T")


def prefetch(steps: Iterable[list[Batch]], device: torch.device) -> Generator[tuple[Batch, float], None, None]:
    """The micro-batches of all steps, on the device.

    On a GPU, the next micro-batch is read and its copy is started before the current one is handed out. On a CPU there
    is nothing to copy, and each is read when it is asked for.

    Yields:
        A micro-batch, and the seconds spent waiting for the loader since the previous one.
    """
    read = _timed(itertools.chain.from_iterable(steps))
    if device.type != "cuda":
        for batch, seconds in read:
            yield batch.to(device), seconds
        return
    copies, ahead, waited = _Copies(device), None, 0.0
    for batch, seconds in read:
        following, waited = copies.start(batch), waited + seconds
        if ahead is not None:
            yield copies.hand_out(ahead), waited
            waited = 0.0
        ahead = following
    if ahead is not None:
        yield copies.hand_out(ahead), waited


@dataclass(frozen=True)
class _Copy:
    """A copy that may still be under way."""

    batch: Batch
    done: torch.cuda.Event


class _Copies:
    """Copies from pinned memory on a stream of their own, while the device computes."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def start(self, batch: Batch) -> _Copy:
        with torch.cuda.stream(self._stream):
            return _Copy(batch.to(self._device), self._stream.record_event())

    def hand_out(self, copy: _Copy) -> Batch:
        """The batch; what the device computes from now on waits for its copy, the host does not."""
        stream, batch = torch.cuda.current_stream(self._device), copy.batch
        stream.wait_event(copy.done)
        for tensor in (batch.images, *batch.mask_indices.values(), batch.labels):
            if tensor is not None:
                # Or the next copy could reuse its memory once it is deleted here, while the device still uses it.
                tensor.record_stream(stream)
        return batch


def _timed(items: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Each item, with the seconds spent waiting for it."""
    while True:
        start = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, time.perf_counter() - start
