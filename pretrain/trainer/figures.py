"""The figures of a run: its loss curve, and a grid of images."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a cluster
import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor


def draw_loss(records: list[dict[str, Any]], path: Path) -> None:
    """Loss and learning rate over epochs, from the records of a metrics.jsonl."""
    records = [record for record in records if record["loss"] is not None]
    epochs = [record["epoch"] for record in records]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(epochs, [record["loss"] for record in records], color="tab:blue", lw=1.5)
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss", color="tab:blue")
    axis.grid(alpha=0.3)
    right = axis.twinx()
    right.plot(epochs, [record["lr"] for record in records], color="tab:gray", lw=1, ls="--")
    right.set_ylabel("learning rate", color="tab:gray")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_image_grid(images: dict[str, Tensor], path: Path) -> None:
    """One row for each image of the batch, one column for each key.

    Args:
        images: column name -> (B, H, W, 3) uint8 on the CPU; sizes may differ from column to column.
        path: where the PNG goes.
    """
    rows = len(next(iter(images.values())))
    figure, axes = plt.subplots(
        rows, len(images), figsize=(2 * len(images), 2 * rows + 0.3), layout="constrained", squeeze=False
    )
    for column, (name, batch) in zip(np.moveaxis(axes, 1, 0), images.items(), strict=True):
        column[0].set_title(name)
        for axis, image in zip(column, batch, strict=True):
            axis.imshow(image.numpy())
            axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)
