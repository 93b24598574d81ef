"""What stands in the masks of a data set, read as mmseg reads them: found before a training stumbles over it."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data.command import default_workers
from downstream.dense.checks import image_size

IGNORED = 255
Size = tuple[int, int]


@dataclass
class MaskCounts:
    """What was found in pairs of an image and its mask; of what stops a training, a line for each.

    Attributes:
        pixels: how many there are of each label, as it stands in the files.
        sizes: (height, width) of the images, in the order of the pairs.
        unlabelled: masks in which all is ignored.
        outside: names of masks with labels that are no class, and the labels that they have.
        other_size: masks that are not as large as their image, with both sizes.
        channels: masks that have more than one.
        unreadable: what is no image.
    """

    pixels: Counter[int] = field(default_factory=Counter)
    sizes: list[Size] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    outside: dict[str, list[int]] = field(default_factory=dict)
    other_size: list[str] = field(default_factory=list)
    channels: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def count_masks(key: str, pairs: Sequence[tuple[str, str]], classes: int, reduce_zero_label: bool) -> MaskCounts:
    """Reads all of these masks, and of the images their sizes.

    Args:
        key: of the data set, for messages.
        pairs: paths of images and of their masks.
        classes: labels are 0 to classes - 1, or one more where `reduce_zero_label`, whose 0 is none; 255 is none.
        reduce_zero_label: as mmseg's.
    """
    first = int(reduce_zero_label)
    nothing = {IGNORED, 0} if reduce_zero_label else {IGNORED}
    counts = MaskCounts()
    with ThreadPoolExecutor(default_workers()) as pool:
        read = pool.map(lambda pair: _read(key, *pair), pairs)
        bar = tqdm(read, "reading masks", len(pairs), unit=" masks", disable=None, delay=3, leave=False)
        for (_, mask), (size, labels, problem) in zip(pairs, bar, strict=True):
            if problem:
                getattr(counts, problem[0]).append(problem[1])
                continue
            counts.sizes.append(size)
            counts.pixels.update(labels)
            if beyond := [n for n in labels if n not in nothing and not first <= n < first + classes]:
                counts.outside[os.path.basename(mask)] = beyond
            if labels.keys() <= nothing:
                counts.unlabelled.append(mask)
    return counts


def _read(key: str, image: str, mask: str) -> tuple[Size, dict[int, int], tuple[str, str] | None]:
    """The image's size, and how many pixels have which label; or the list of `MaskCounts` that it belongs to."""
    try:
        size = image_size(key, image)
        with Image.open(mask) as file:
            labels = np.asarray(file)
    except (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        text = str(error) if str(error).startswith(key) else f"{key}: {mask} is no image that can be read: {error}"
        return (0, 0), {}, ("unreadable", text)
    if labels.ndim != 2:
        return (0, 0), {}, ("channels", f"{mask} has {labels.shape[2]} channels")
    if labels.shape != size:
        (rows, cols), (height, width) = labels.shape, size
        return (0, 0), {}, ("other_size", f"{mask} is {cols} x {rows} pixels, its image {width} x {height}")
    values, numbers = np.unique(labels, return_counts=True)
    return size, dict(zip(map(int, values), map(int, numbers), strict=True)), None
