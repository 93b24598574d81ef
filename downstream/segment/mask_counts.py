"""Counts the labels in the masks of a data set, read as mmseg reads them."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.parallel import default_workers
from downstream.dense.data_checks import read_image_size

IGNORED = 255
Size = tuple[int, int]


@dataclass
class MaskCounts:
    """Counts over pairs of an image and its mask.

    Attributes:
        pixels: the number of pixels of each label in the files.
        sizes: (height, width) of the images, in the order of the pairs.
        unlabeled: masks in which every pixel is ignored.
        outside: names of masks with labels that are not a class, and these labels.
        broken: what is wrong with a pair that cannot be used.
    """

    pixels: Counter[int] = field(default_factory=Counter)
    sizes: list[Size] = field(default_factory=list)
    unlabeled: list[str] = field(default_factory=list)
    outside: dict[str, list[int]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def count_masks(key: str, pairs: Sequence[tuple[str, str]], classes: int, reduce_zero_label: bool) -> MaskCounts:
    """Reads all of these masks, and the sizes of the images.

    Args:
        key: of the data set, for messages.
        pairs: paths of images and of their masks.
        classes: labels are 0 to classes - 1 and 255 for none, or with `reduce_zero_label` 1 to classes and 0 or 255.
        reduce_zero_label: as mmseg's.
    """
    first = int(reduce_zero_label)
    ignored = {IGNORED, 0} if reduce_zero_label else {IGNORED}
    counts = MaskCounts()
    with ThreadPoolExecutor(default_workers()) as pool:
        read = pool.map(lambda pair: _read(key, *pair), pairs)
        bar = tqdm(read, "reading masks", len(pairs), unit=" masks", disable=None, delay=3, leave=False)
        for (_, mask), found in zip(pairs, bar, strict=True):
            if isinstance(found, str):
                counts.broken.append(found)
                continue
            size, labels = found
            counts.sizes.append(size)
            counts.pixels.update(labels)
            if outside := [n for n in labels if n not in ignored and not first <= n < first + classes]:
                counts.outside[os.path.basename(mask)] = outside
            if labels.keys() <= ignored:
                counts.unlabeled.append(mask)
    return counts


def _read(key: str, image: str, mask: str) -> tuple[Size, dict[int, int]] | str:
    """The image's size and the number of pixels of each label, or what is wrong."""
    try:
        size = read_image_size(key, image)
    except ValueError as error:
        return str(error)
    try:
        with Image.open(mask) as file:
            labels = np.asarray(file)
    except (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"{key}: {mask} cannot be read as an image: {error}"
    if labels.ndim != 2:
        return f"{key}: {mask} has {labels.shape[2]} channels: a mask has one, with the number of a pixel's class"
    if labels.shape != size:
        (rows, cols), (height, width) = labels.shape, size
        return (
            f"{key}: {mask} is {cols} x {rows} pixels, its image {width} x {height}: it belongs to another version of "
            f"the image"
        )
    values, numbers = np.unique(labels, return_counts=True)
    return size, dict(zip(map(int, values), map(int, numbers), strict=True))
