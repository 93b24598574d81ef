"""Labeled images, random classifiers, and commands on one or several ranks."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import downstream.checkpoints.timm_models  # noqa: F401  # registers our models with timm
from downstream.classify.classifier_spec import ClassifierSpec
from helpers.ports import free_port
from helpers.waiting import SECONDS
from pretrain.models.encoder_spec import EncoderSpec
from pretrain.trainer.launch import World

ROOT = Path(__file__).parents[2]


def write_photo(path: Path, seed: int, size: tuple[int, int] = (48, 40), kind: int = 0) -> None:
    """Write an image of smooth color blocks; images of the same kind are slightly alike, and all crops differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse, shared = (np.random.default_rng(s).integers(0, 256, (4, 5, 3)) for s in (seed, 10**6 + kind))
    image = Image.fromarray(((coarse + shared) // 2).astype(np.uint8))
    image.resize(size, Image.Resampling.BICUBIC).save(path, quality=92)


def write_classes(root: Path, names: list[str], images: int, bad: int = 0, first: int = 0) -> Path:
    """Write `images` JPEGs into a folder for each name; the first `bad` ones cannot be decoded.

    Another `first` number gives other images of the same classes.
    """
    for number in range(len(names) * images):
        kind = number % len(names)
        path = root / names[kind] / f"{number:03d}.jpg"
        write_photo(path, first + number, kind=kind)
        if number < bad:
            path.write_bytes(path.read_bytes()[:200])
    return root


def write_classifier(
    path: Path, num_classes: int, position: str = "relative", pool: str = "avg", class_names: Sequence[str] = ()
) -> Path:
    """Write a random ViT-Ti classifier for images of 32 pixels."""
    torch.manual_seed(0)
    name = "lomar_vit_tiny_patch16_224" if position == "relative" else "vit_tiny_patch16_224"
    model = timm.create_model(name, img_size=32, num_classes=num_classes, global_pool=pool)
    state = {name: torch.randn_like(tensor) * 0.2 for name, tensor in model.state_dict().items()}
    spec = ClassifierSpec(EncoderSpec("vit_tiny", 16, (32, 32), position), num_classes, pool, tuple(class_names))
    save_file(state, path, spec.to_metadata())
    return path


def run_in_process(module: Any, *arguments: object) -> dict[str, Any]:
    """Run an evaluation module's command on one rank in this process and return its result."""
    results = []

    def run_here(command: Any, options: Any) -> None:
        results.append(command(options, World(0, 1, 0), torch.device("cpu")))

    with patch.object(module, "run_on_ranks", run_here):
        module.main([*map(str, arguments), "--num-workers", "0", "--batch-size", "4"])
    return results[0]


def run_command(*arguments: object, ranks: int = 1) -> tuple[int, str, str]:
    """Run `python ARGUMENTS` on each rank; returns the exit code, stdout and stderr of the main rank."""
    port = str(free_port())
    started = []
    for rank in range(ranks):
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                cwd=ROOT,
                env={
                    **os.environ,
                    **rank_env,
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "PYTHONPATH": str(ROOT),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return started[0].returncode, *outputs[0]
