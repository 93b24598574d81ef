"""Prefetching yields micro-batches in order. On a GPU it copies one ahead, and none is used before it has arrived."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from data.batch import Batch
from pretrain.trainer.prefetch import prefetch

CPU = torch.device("cpu")
ACCUMULATION = 2


def micro_batch(number: int) -> Batch:
    images = torch.full((2, 4, 4, 3), number, dtype=torch.uint8)
    return Batch(images, {"visible": torch.full((2, 3), number)}, None, torch.arange(2), ("a", "b"), ())


def loader(steps: int, read: list[int], seconds: float = 0.0) -> Iterator[list[Batch]]:
    """Appends each step that is read to `read`, and -1 when it is closed."""
    try:
        for step in range(steps):
            time.sleep(seconds)
            read.append(step)
            yield [micro_batch(step * ACCUMULATION + part) for part in range(ACCUMULATION)]
    finally:
        read.append(-1)


def numbers(batches: Iterator[tuple[Batch, float]]) -> list[int]:
    return [int(batch.images[0, 0, 0, 0]) for batch, _ in batches]


def test_cpu_yields_each_micro_batch_once_and_reads_none_early():
    read: list[int] = []
    batches = prefetch(loader(3, read), CPU)
    assert read == []
    next(batches)
    next(batches)
    assert read == [0]
    assert numbers(batches) == [2, 3, 4, 5]
    assert read == [0, 1, 2, -1]


def test_leaving_early_closes_the_loader():
    read: list[int] = []
    batches = prefetch(loader(3, read), CPU)
    next(batches)
    batches.close()
    assert read == [0, -1]


def test_wait_counts_only_the_loader():
    waits = []
    for _, waited in prefetch(loader(3, [], seconds=0.05), CPU):
        waits.append(waited)
        time.sleep(0.1)  # the step
    assert all(wait >= 0.05 for wait in waits[::ACCUMULATION])
    assert sum(waits) < 0.3


class FakeStream:
    """A queue of work that runs only when another stream waits for it."""

    def __init__(self, device: Any = None):
        self.queue: list[Callable[[], None]] = []

    def record_event(self) -> list[Callable[[], None]]:
        return list(self.queue)

    def wait_event(self, event: list[Callable[[], None]]) -> None:
        for work in event:
            work()


class FakeTensor:
    """Has a wrong value until its copy is done, and remembers the streams it was recorded on."""

    def __init__(self, value: int):
        self.coming, self.value, self.streams = value, -1, []

    def arrive(self) -> None:
        self.value = self.coming

    def record_stream(self, stream: FakeStream) -> None:
        self.streams.append(stream)


class FakeBatch:
    """Queues its copy to the device on the current stream."""

    def __init__(self, number: int):
        self.number = number

    def to(self, device: torch.device) -> Any:
        assert device.type == "cuda"
        batch = Batch(FakeTensor(self.number), {"visible": FakeTensor(self.number)}, FakeTensor(self.number), 0, (), ())  # type: ignore[arg-type]
        COPIED.append(self.number)
        for tensor in (batch.images, batch.mask_indices["visible"], batch.labels):
            CURRENT[-1].queue.append(tensor.arrive)  # type: ignore[union-attr]
        return batch


CURRENT: list[FakeStream] = []
COPIED: list[int] = []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Replaces torch.cuda's streams with fakes, and returns the compute stream."""
    computing = FakeStream()
    CURRENT[:], COPIED[:] = [computing], []

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        CURRENT.append(stream)
        yield
        CURRENT.pop()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: CURRENT[-1])
    return computing


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_gpu_copies_one_batch_ahead_and_waits_for_each_copy(count: int, gpu: FakeStream):
    steps: Any = ([FakeBatch(number)] for number in range(count))
    got = []
    for batch, _ in prefetch(steps, torch.device("cuda", 0)):
        tensors: list[Any] = [batch.images, batch.mask_indices["visible"], batch.labels]
        assert [tensor.value for tensor in tensors] == [len(got)] * 3, "the stream that computes waits for the copy"
        assert all(tensor.streams == [gpu] for tensor in tensors)
        assert list(range(min(len(got) + 2, count))) == COPIED, "one is copied ahead, and no more"
        assert gpu.queue == [], "copies are on a stream of their own"
        got.append(batch)
    assert len(got) == count


def test_gpu_counts_all_waiting_for_the_loader(gpu: FakeStream):
    def slow() -> Iterator[list[Any]]:
        for number in range(4):
            time.sleep(0.05)
            yield [FakeBatch(number)]

    assert sum(waited for _, waited in prefetch(slow(), torch.device("cuda", 0))) >= 0.2
