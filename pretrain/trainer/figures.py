"""The figures of a run: its loss curve, and a grid of images."""

import textwrap
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
    _save(figure, path)


def draw_image_grid(images: dict[str, Tensor], path: Path, heading: str = "", caption: str = "") -> None:
    """One row for each image of the batch, one column for each key.

    Args:
        images: title of the column -> (B, H, W, 3) uint8 on the CPU; sizes may differ from column to column.
        path: where the PNG goes; it is replaced atomically.
        heading, caption: above and below all images.
    """
    rows, columns = len(next(iter(images.values()))), len(images)
    width = 2.6 * columns
    lines = textwrap.wrap(caption, int(width * 13))
    height = 2.6 * rows + 0.8 + 0.2 * len(lines)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for column, (name, batch) in zip(np.moveaxis(axes, 1, 0), images.items(), strict=True):
        column[0].set_title(name, fontsize=13)
        for axis, image in zip(column, batch, strict=True):
            axis.imshow(image.numpy(), interpolation="nearest")
            axis.axis("off")
    figure.suptitle(heading, fontsize=13)
    figure.supxlabel("\n".join(lines), fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f"unfinished-{path.stem}.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)
