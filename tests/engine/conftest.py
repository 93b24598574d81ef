"""Fixtures for real runs of `pretrain/run.py`: shards of JPEGs, and DeepSpeed engines in their own processes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.processes import ROOT, Processes, starter
from PIL import Image


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with 80 JPEGs of colored gradients and discs, packed by `data.pack`."""
    folder, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[0:96, 0:112]
    for number in range(80):
        centre, radius, colors = rng.uniform(20, 80, 2), rng.uniform(10, 40), rng.integers(0, 256, (2, 3))
        disc = ((rows - centre[0]) ** 2 + (cols - centre[1]) ** 2 < radius**2)[..., None]
        shade = (rows * rng.uniform(0.3, 1) + cols * rng.uniform(0.3, 1))[..., None] / 200
        pixels = np.where(disc, colors[0], colors[1]) * shade.clip(0, 1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.jpg", quality=90)
    command = [
        sys.executable,
        "-m",
        "data.pack",
        str(folder),
        str(out),
        "--samples-per-shard",
        "30",
        "--short-side",
        "90",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def write_recipe(shards: Path) -> Callable[..., Path]:
    """write_recipe(folder, name, section={...}) -> ten steps of a small LoMaR, with the given sections replaced.

    The images are not square. Two processes train it in a few seconds.
    """

    def write(folder: Path, name: str = "tiny", **sections: Any) -> Path:
        keys = {
            "name": name,
            "runs": str(folder / "runs"),
            "method": {"name": "lomar", "num_windows": 2, "window_size": 3},
            "model": {"arch": "vit_tiny"},
            "data": {"shards": str(shards), "image_size": [64, 80], "num_workers": 1},
            "optim": {"warmup_epochs": 0.3, "base_lr": 1e-2},
            "train": {"epochs": 1, "global_batch_size": 8, "precision": "fp32"},
            "checkpoint": {"every_steps": 5},
            "log": {"every_steps": 1, "num_reconstructions": 2},
        }
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(keys | sections))
        return path

    return write


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Processes]]:
    with starter(tmp_path) as starts:
        yield starts
