"""Fixtures of the GPU tests: `pytest -m cuda -n 8 --dist loadfile`, a few minutes on one GPU.

The tests of a file share fixtures, in test_cuda_runs.py many real runs, so a file should not be split over processes.

Without a GPU all of them are skipped. With `CUDA_TESTS_DEVICE=cpu`, those that can run on a CPU do so, so that changes
to the tests can be tried without a GPU.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.commands import Command
from helpers.shard_tools import jpeg, write_tar


@pytest.fixture(scope="session")
def device() -> torch.device:
    name = os.environ.get("CUDA_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of 80 JPEGs."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "train-000000.tar", [(f"{number:03d}.jpg", jpeg(number, 160, 140)) for number in range(80)])
    return folder


@pytest.fixture(scope="session")
def write_recipe(shards: Path) -> Callable[..., Path]:
    """write_recipe(folder, name, section={...}) -> a recipe with ten steps per epoch and the smallest shipped encoder.

    It has heads of 64 channels and two windows of 7x7 patches, so that the window kernel is used.
    """

    def write(folder: Path, name: str, **sections: Any) -> Path:
        keys = {
            "name": name,
            "runs": str(folder / "runs"),
            "method": {"name": "lomar", "num_windows": 2},
            "model": {"arch": "vit_tiny"},
            "data": {"shards": str(shards), "image_size": [128, 144], "num_workers": 2},
            "optim": {"warmup_epochs": 0.3, "base_lr": 1e-2},
            "train": {"epochs": 1, "global_batch_size": 8},
            "checkpoint": {"every_steps": 5},
            "log": {"every_steps": 1, "num_reconstructions": 2},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(keys | sections))
        return path

    return write


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Command]]:
    """command(recipe, 'key=value', ...) starts pretrain/run.py; processes still running at the end are killed."""
    folder = tmp_path_factory.mktemp("commands")
    started: list[Command] = []

    def start(*arguments: Path | str) -> Command:
        started.append(Command([str(argument) for argument in arguments], folder / f"{len(started)}.txt"))
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            one.kill()
