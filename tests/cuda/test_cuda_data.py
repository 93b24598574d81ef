"""Transfer of batches to a GPU: in pinned memory, and without changing their content."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gpu_steps import build, cases, configure

from data.batch import Batch
from data.index import load_index
from data.loader import Loader
from pretrain.trainer.prefetch import prefetch

pytestmark = pytest.mark.cuda


def test_batches_are_pinned_and_arrive_unchanged(device: torch.device, shards: Path):
    """Only the CUDA stream waits for a copy, so the source must not change while it is being read."""
    config = configure(cases()["lomar-late-pr_mim"])
    sampler = build(config, torch.device("cpu")).mask_sampler()  # type: ignore[operator]
    settings: dict[str, Any] = {"size": (128, 160), "batch": 16, "seed": 3, "mask_sampler": sampler}
    index = load_index(shards)
    in_memory = list(Loader(index, num_workers=0, **settings).batches(0, 10))
    pinned = []

    def recording_pinned() -> Iterator[list[Batch]]:
        for step in Loader(index, num_workers=2, **settings).batches(0, 10):
            pinned.append(all(tensor.is_pinned() for tensor in (step[0].images, *step[0].mask_indices.values())))
            yield step

    arrived = list(prefetch(recording_pinned(), device))
    assert pinned == [device.type == "cuda"] * 10
    for (batch, _), (expected,) in zip(arrived, in_memory, strict=True):
        assert batch.images.device == device
        assert torch.equal(batch.images.cpu(), expected.images)
        assert batch.mask_indices.keys() == expected.mask_indices.keys()
        for name, wanted in expected.mask_indices.items():
            assert torch.equal(batch.mask_indices[name].cpu(), wanted), name


def test_delayed_computation_uses_the_right_batch(device: torch.device):
    """Memory that is reused too early, or a copy that is not waited for, would give other sums."""
    cuda = device.type == "cuda"
    steps, side, size = (200, 4096, (64, 224, 224, 3)) if cuda else (20, 64, (2, 8, 8, 3))
    memory = [torch.full(size, number, dtype=torch.uint8, pin_memory=cuda) for number in range(8)]
    work = torch.randn(side, side, device=device)
    batches = ([Batch(memory[n % 8], {}, None, torch.arange(2), (), ())] for n in range(steps))
    sums = []
    for batch, _ in prefetch(batches, device):
        work = (work @ work).softmax(-1)  # keeps the device busy, so that it lags behind the host
        sums.append(batch.images.sum(dtype=torch.int64))
        del batch
    count = torch.Size(size).numel()
    assert torch.stack(sums).tolist() == [n % 8 * count for n in range(steps)]


def test_all_uint16_values_arrive_as_fp32(device: torch.device):
    values = torch.arange(2**16).view(4, 64, 64, 4)
    images = values.to(torch.uint16)
    images = images.pin_memory() if device.type == "cuda" else images
    ((batch, _),) = prefetch([[Batch(images, {}, None, torch.arange(4), (), ())]], device)
    assert batch.images.dtype == torch.float32
    assert batch.images.device == device
    assert torch.equal(batch.images.cpu(), values.float())
