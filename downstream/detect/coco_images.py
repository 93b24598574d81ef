"""Compares an annotation file's images with the files in the folder: names, and sizes as mmcv will decode them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

from tqdm import tqdm

from data.cores import available_cores
from downstream.dense.data_checks import applies_orientation, check_exists, find_missing, first_names, read_image_size

OPENED_IMAGES = 5000


def check_images(key: str, dataset: Any, folder: str, file: str, images: Sequence[dict[str, Any]]) -> None:
    """Checks that all files exist, and the sizes of at most `OPENED_IMAGES` of them, evenly spaced.

    Args:
        key: of the data set, for messages.
        dataset: its configuration.
        folder: of the images.
        file: the annotation file, for messages.
        images: with `file_name`, `height` and `width`.

    Raises:
        ValueError: a file is missing, is not an image, or has another size.
    """
    check_exists(f"{key}.data_prefix.img", folder, "folder")
    missing = find_missing(folder, (image["file_name"] for image in images))
    if missing:
        raise ValueError(
            f"{key}: {len(missing)} of the {len(images)} images of {file} are not in {folder}: "
            f"{first_names(missing)}; {_explain_missing(folder, missing[0])}"
        )
    oriented = applies_orientation(dataset.pipeline)
    opened = images[:: -(-len(images) // OPENED_IMAGES)]
    paths = [os.path.join(folder, image["file_name"]) for image in opened]
    with ThreadPoolExecutor(available_cores()) as pool:
        sizes = pool.map(lambda path: read_image_size(key, path, oriented), paths)
        bar = tqdm(sizes, "reading sizes", len(paths), unit=" images", disable=None, delay=3, leave=False)
        wrong = [
            (image["file_name"], size, (image["height"], image["width"]))
            for image, size in zip(opened, bar, strict=True)
            if size != (image["height"], image["width"])
        ]
    if wrong:
        name, (height, width), (stated_height, stated_width) = wrong[0]
        more = f" (and {len(wrong) - 1} more of the {len(opened)} opened differ)" if len(wrong) > 1 else ""
        turned = all(size == stated[::-1] for _, size, stated in wrong)
        raise ValueError(
            f"{key}: {os.path.join(folder, name)} is {width} x {height} pixels, but {file} says {stated_width} x "
            f"{stated_height}{more}: {_explain_turned(key, dataset, oriented) if turned else _OTHER_VERSION}"
        )


_OTHER_VERSION = "its boxes belong to another version of the images"


def _explain_turned(key: str, dataset: Any, oriented: bool) -> str:
    """The reason why height and width are swapped, and what to do."""
    steps = [step.type for step in dataset.pipeline]
    number = next((n for n, kind in enumerate(steps) if kind.endswith("LoadImageFromFile")), 0)
    if oriented:
        return (
            f"its EXIF orientation rotates it, but the boxes were drawn without: give {key}.pipeline.{number}."
            f"color_type=color_ignore_orientation, or rotate the files themselves"
        )
    return f"the boxes were drawn on rotated images: leave out {key}.pipeline.{number}.color_type"


def _explain_missing(folder: str, name: str) -> str:
    """Where a missing file is, if it is elsewhere below the folder or has another suffix."""
    base = PurePosixPath(name.replace("\\", "/")).name
    stem = os.path.splitext(base)[0].lower()
    for parent, _, names in os.walk(folder, followlinks=True):
        for found in names:
            if found == base or os.path.splitext(found)[0].lower() == stem:
                path = os.path.relpath(os.path.join(parent, found), folder)
                return f"there is {path}: use this as file_name, or set data_prefix.img"
    return "is data_prefix.img right, and is everything unpacked?"
