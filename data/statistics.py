"""Mean and standard deviation of each channel, for `data.mean` and `data.std`: ``python -m data.statistics SHARDS``.

Every pixel of every image counts the same, as stored, uncropped. Images are measured one by one in float64, and the
results are added up exactly, so they do not depend on the number of workers.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.channels import read_pixels
from data.cores import available_cores
from data.image_file import BadImage, count_kinds
from data.image_folder import Samples, load_samples, reader_of
from data.parallel import report_errors, run_parallel
from data.pixel_format import PixelFormat, add_format, given_format

_IMAGES_OF_A_TASK = 32


class Statistics(NamedTuple):
    """Mean and standard deviation of C channels, as fractions of the format's white."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    pixels: int
    skipped: Counter[str]  # images that cannot be used, by kind of reason


class _Image(NamedTuple):
    pixels: int
    mean: tuple[float, ...]
    squares: tuple[float, ...]  # sums of the squared differences from the mean


@dataclass(frozen=True)
class _Task:
    path: str
    samples: tuple[int, ...]
    format: PixelFormat


def measure(path: str, format: PixelFormat, images: int | None = None, workers: int = 1) -> Statistics:
    """Measures the statistics of a data set.

    Args:
        path: shards, or a folder of images.
        format: required of the images; others are left out and counted.
        images: how many to read, evenly spaced in the order of the samples; default: all.
        workers: processes.

    Raises:
        ValueError: no image can be used, or the shards cannot be read.
    """
    format.check()
    count = len(_samples(path))
    if images is not None and images < 1:
        raise ValueError(f"--images {images} must be at least 1")
    wanted = min(images or count, count)
    chosen = [number * count // wanted for number in range(wanted)]
    tasks = [
        _Task(path, tuple(chosen[start : start + _IMAGES_OF_A_TASK]), format)
        for start in range(0, wanted, _IMAGES_OF_A_TASK)
    ]
    found: list[_Image] = []
    skipped = Counter[str]()
    for part, bad in run_parallel(_measure, tasks, workers, "measuring", "task"):
        found += part
        skipped += bad
    if not found:
        raise ValueError(f"{path}: none of {wanted} images can be used ({count_kinds(skipped.elements())})")
    return _merge(found, format, skipped)


def _merge(found: Sequence[_Image], format: PixelFormat, skipped: Counter[str]) -> Statistics:
    """Merges the results of images, in any order: `fsum` is the same for all orders."""
    pixels = sum(image.pixels for image in found)
    mean, std = [], []
    for channel in range(format.channels):
        center = math.fsum(image.pixels * image.mean[channel] for image in found) / pixels
        within = math.fsum(image.squares[channel] for image in found)
        between = math.fsum(image.pixels * (image.mean[channel] - center) ** 2 for image in found)
        mean.append(center / format.white)
        std.append(math.sqrt((within + between) / pixels) / format.white)
    return Statistics(tuple(mean), tuple(std), len(found), pixels, skipped)


@lru_cache(1)
def _samples(path: str) -> Samples:
    return load_samples(path)


def _measure(task: _Task) -> tuple[list[_Image], Counter[str]]:
    reader, found, skipped = reader_of(_samples(task.path)), [], Counter[str]()
    for sample in task.samples:
        try:
            values = read_pixels(reader.read(sample), task.format).reshape(-1, task.format.channels)
        except BadImage as error:
            skipped[error.kind] += 1
            continue
        columns = [values[:, channel].astype(np.float64) for channel in range(task.format.channels)]
        means = tuple(float(column.mean()) for column in columns)
        squares = tuple(float(np.square(column - mean).sum()) for column, mean in zip(columns, means, strict=True))
        found.append(_Image(len(values), means, squares))
    reader.close()
    return found, skipped


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.statistics", description=__doc__.split(":")[0])
    parser.add_argument(
        "shards", metavar="SHARDS", help="folder of *.tar, one tar, a brace pattern, or a folder of images"
    )
    add_format(parser)
    parser.add_argument("--images", type=int, metavar="N", help="read only N images, evenly spaced (default: all)")
    parser.add_argument("--num-workers", type=int, default=available_cores(), metavar="N")
    args = parser.parse_args(argv)

    def command() -> int:
        format = given_format(args)
        result = measure(args.shards, format, args.images, args.num_workers)
        mean, std = ([float(f"{value:.6g}") for value in values] for values in (result.mean, result.std))
        left_out = f"; left out: {count_kinds(result.skipped.elements())}" if result.skipped else ""
        print(f"{result.images} images, {result.pixels} pixels, {format}{left_out}")
        keys = {"channels": format.channels, "dtype": format.dtype, "mean": mean, "std": std}
        print(" ".join(f"data.{key}={value}".replace(", ", ",") for key, value in keys.items()))
        print(json.dumps({**result._asdict(), "channels": format.channels, "dtype": format.dtype}))
        return 0

    return report_errors(command)


if __name__ == "__main__":
    sys.exit(main())
