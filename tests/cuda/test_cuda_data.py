"""Batches on their way to a GPU: in pinned memory, and equal when they arrive."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.gpu_steps import build, cases, configure

from data.index import load_index
from data.loader import Loader

pytestmark = pytest.mark.cuda


def test_batches_are_pinned_and_arrive_as_they_were_made(device: torch.device, shards: Path):
    """Copies that nobody waits for would read memory that is pageable too late, or twice."""
    config = configure(cases()["lomar-late-pr_mim"])
    sampler = build(config, torch.device("cpu")).mask_sampler()  # type: ignore[operator]
    settings: dict[str, Any] = {"size": (128, 160), "batch": 16, "seed": 3, "mask_sampler": sampler}
    index = load_index(shards)
    pinned = Loader(index, num_workers=2, **settings).batches(0, 10)
    plain = Loader(index, num_workers=0, **settings).batches(0, 10)
    steps = 0
    for (batch,), (expected,) in zip(pinned, plain, strict=True):
        steps += 1
        assert batch.images.is_pinned() == (device.type == "cuda")
        assert all(index.is_pinned() == (device.type == "cuda") for index in batch.mask_indices.values())
        there = batch.to(device)
        assert there.images.device == device
        assert torch.equal(there.images.cpu(), expected.images)
        assert there.mask_indices.keys() == expected.mask_indices.keys()
        for name, wanted in expected.mask_indices.items():
            assert torch.equal(there.mask_indices[name].cpu(), wanted), name
    assert steps == 10
