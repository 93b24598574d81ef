"""Finds what the quick start needs on this machine to take minutes: ``python -m pretrain.quickstart``.

Takes a few steps of the recipe like one of its processes, but without data and engine. It prints the time of a step on
stderr, and the overrides for `make pretrain` on stdout: fewer epochs if not all of the recipe's fit, and fp32 on a CPU
that is slow in bf16. A run that has begun keeps both.
"""

import os
import sys
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor

from data.batch import draw_masks
from pretrain.config import PretrainConfig, load
from pretrain.trainer.cautions import has_fast_bf16
from pretrain.trainer.launch import choose_accelerator
from pretrain.trainer.run_folder import RunFolder

RECIPE = "quickstart"
STEPS_PER_EPOCH = 10
MINUTES = 4.0  # of training
FEWEST = 10  # epochs after which the reconstructions show something
PROCESSES = 2  # of `make pretrain` on CPUs
MEASURED = 5.0  # seconds, after a first step that is not counted
ENGINE = 1.3  # factor by which engine, data workers and logs lengthen a step


def measure_step(config: PretrainConfig, seconds: float = MEASURED) -> float:
    """Seconds per step on this machine as it is now: forward, backward, AdamW; on one process's part of a batch."""
    choose_accelerator()
    from pretrain.build import build_method  # imports DeepSpeed

    device, batch = torch.device("cuda"), config.train.global_batch_size
    if not torch.cuda.is_available():
        device, batch = torch.device("cpu"), batch // PROCESSES
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // PROCESSES, 1))
    method = build_method(config).to(device)
    masks = draw_masks(method.mask_sampler(), 0, ((0, sample) for sample in range(batch)))
    indices = {name: index.to(device) for name, index in masks.items()}
    images = torch.randint(0, 256, (batch, *config.data.height_width, 3), dtype=torch.uint8, device=device)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    steps, start = -1, time.perf_counter()
    while steps < 1 or time.perf_counter() - start < seconds:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss: Tensor = method(images, indices)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        steps += 1
        if steps == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / steps


def choose_epochs(step: float, most: int) -> int:
    """How many epochs fit into `MINUTES` if a step takes `step` seconds, between `FEWEST` and `most`."""
    return min(max(int(60 * MINUTES / (step * ENGINE * STEPS_PER_EPOCH)), FEWEST), most)


def main() -> int:
    """The command line; returns the exit code."""
    recipe = load(RECIPE, [])
    begun = RunFolder(Path(recipe.runs) / recipe.name).config
    if begun.is_file():
        keys = yaml.safe_load(begun.read_text())
        epochs, warmup = keys["train"]["epochs"], keys["optim"]["warmup_epochs"]
        precision = keys["train"]["precision"]
        print(f"{begun.parent} continues with its {epochs} epochs", file=sys.stderr)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = recipe.train.precision if has_fast_bf16(device) else "fp32"
        step = measure_step(load(RECIPE, [f"train.precision={precision}"]))
        epochs = choose_epochs(step, recipe.train.epochs)
        warmup = recipe.optim.warmup_epochs * epochs / recipe.train.epochs
        minutes = max(step * ENGINE * STEPS_PER_EPOCH * epochs / 60, 1)
        less = "" if epochs == recipe.train.epochs else f" instead of the recipe's {recipe.train.epochs}"
        print(
            f"a step takes about {step * ENGINE:.2f} s here in {precision}: {epochs} epochs{less}, about {minutes:.0f} "
            "minutes",
            file=sys.stderr,
        )
    overrides = []
    if (epochs, warmup) != (recipe.train.epochs, recipe.optim.warmup_epochs):
        overrides += [f"train.epochs={epochs}", f"optim.warmup_epochs={warmup:g}"]
    if precision != recipe.train.precision:
        overrides.append(f"train.precision={precision}")
    if overrides:
        print(*overrides)
    return 0


if __name__ == "__main__":
    sys.exit(main())
