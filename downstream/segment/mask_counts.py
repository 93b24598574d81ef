"""Counts the values in a data set's masks, read as mmseg reads them, except for its cast to 8 bits."""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.cores import available_cores
from downstream.dense.data_checks import read_image_size

IGNORED = 255
Size = tuple[int, int]


@dataclass
class MaskCounts:
    """Counts over pairs of an image and its mask.

    Attributes:
        pixels: the number of pixels of each value in the files.
        sizes: (height, width) of the images, in the order of the pairs.
        unlabeled: masks in which every pixel is ignored.
        outside: names of masks with invalid values, and these values.
        broken: for each unusable pair, what is wrong with it.
    """

    pixels: Counter[int] = field(default_factory=Counter)
    sizes: list[Size] = field(default_factory=list)
    unlabeled: list[str] = field(default_factory=list)
    outside: dict[str, list[int]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


def count_masks(
    key: str, pairs: Sequence[tuple[str, str]], labels: Sequence[int], ignored: Collection[int], oriented: bool = True
) -> MaskCounts:
    """Reads all of these masks, and the sizes of the images.

    Args:
        key: of the data set, for messages.
        pairs: paths of images and their masks.
        labels: the value of each class.
        ignored: the values of pixels without a class.
        oriented: for the images, see `read_image_size`; masks are never rotated.
    """
    valid, ignored = {*labels, *ignored}, {*ignored}
    counts = MaskCounts()
    with ThreadPoolExecutor(available_cores()) as pool:
        read = pool.map(lambda pair: _read(key, pair[0], pair[1], oriented), pairs)
        bar = tqdm(read, "reading masks", len(pairs), unit=" masks", disable=None, delay=3, leave=False)
        for (_, mask), found in zip(pairs, bar, strict=True):
            if isinstance(found, str):
                counts.broken.append(found)
                continue
            size, pixels = found
            counts.sizes.append(size)
            counts.pixels.update(pixels)
            if outside := [value for value in pixels if value not in valid]:
                counts.outside[os.path.basename(mask)] = outside
            if pixels.keys() <= ignored:
                counts.unlabeled.append(mask)
    return counts


def _read(key: str, image: str, mask: str, oriented: bool) -> tuple[Size, dict[int, int]] | str:
    """The image's size and the pixel count of each value in its mask, or what is wrong."""
    try:
        size = read_image_size(key, image, oriented)
    except ValueError as error:
        return str(error)
    try:
        with Image.open(mask) as file:
            labels = np.asarray(file)
    except (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"{key}: {mask} cannot be read as an image: {error}"
    if labels.ndim != 2:
        return f"{key}: {mask} has {labels.shape[2]} channels: a mask has one, of class numbers or palette indices"
    if labels.shape != size:
        (rows, cols), (height, width) = labels.shape, size
        why = "it belongs to another version of the image"
        if labels.shape == size[::-1]:
            why = (
                "an EXIF orientation rotates the image but not its mask: give color_type=color_ignore_orientation to "
                "LoadImageFromFile in the pipelines, or rotate the image itself"
            )
        return f"{key}: {mask} is {cols} x {rows} pixels, its image is {width} x {height}: {why}"
    values, numbers = np.unique(labels, return_counts=True)
    return size, dict(zip(map(int, values), map(int, numbers), strict=True))
