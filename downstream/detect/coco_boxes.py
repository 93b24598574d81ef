"""Counts which annotations of a COCO-format file mmdet uses, clips, ignores or skips."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass
class BoxCounts:
    """Numbers of annotations, and the ids (as text) of those that would make a training fail.

    Attributes:
        used: boxes that are trained on or evaluated.
        images, categories: ids of those with a used box.
        annotated: ids of images with an annotation of a class, used or not.
        outside: boxes outside their image, thinner than a pixel, or without area.
        fractions: those of `outside` with all values from 0 to 1, which are probably fractions instead of pixels.
        clipped: used boxes that extend more than a pixel beyond their image.
        ignored: marked with `ignore`.
        rle: used boxes with a run-length encoded mask.
        no_polygon: used boxes that mmdet skips if it reads masks: all polygons have fewer than three points or an odd
            number of coordinates, or a run-length encoding lacks its counts or size.
        malformed, malformed_mask, no_mask, other_size: ids.
    """

    used: int = 0
    crowd: int = 0
    outside: int = 0
    fractions: int = 0
    clipped: int = 0
    ignored: int = 0
    other_classes: int = 0
    no_image: int = 0
    rle: int = 0
    no_polygon: int = 0
    images: set[Any] = field(default_factory=set)
    categories: set[Any] = field(default_factory=set)
    annotated: set[Any] = field(default_factory=set)
    malformed: list[str] = field(default_factory=list)
    malformed_mask: list[str] = field(default_factory=list)
    no_mask: list[str] = field(default_factory=list)
    other_size: list[str] = field(default_factory=list)


def count_boxes(images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: set[Any]) -> BoxCounts:
    """Counts the annotations of a file.

    Args:
        images, annotations: of the file; images have `id`, `height` and `width`.
        categories: ids of the categories that are classes.
    """
    counts = BoxCounts()
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    for annotation in tqdm(annotations, desc="checking boxes", unit=" boxes", disable=None, delay=3, leave=False):
        if not _well_formed(annotation):
            counts.malformed.append(str(annotation["id"]))
        elif annotation.get("image_id") not in sizes:
            counts.no_image += 1
        elif annotation["category_id"] not in categories:
            counts.other_classes += 1
        else:
            counts.annotated.add(annotation["image_id"])
            if annotation.get("ignore"):
                counts.ignored += 1
            else:
                _count(counts, annotation, *sizes[annotation["image_id"]])
    return counts


def _well_formed(annotation: dict[str, Any]) -> bool:
    box = annotation.get("bbox")
    return (
        isinstance(box, list)
        and len(box) == 4
        and is_finite([*box, annotation.get("area")])
        and all(isinstance(annotation.get(key), (int, str, type(None))) for key in ("category_id", "image_id"))
        and "category_id" in annotation
    )


def is_finite(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers."""
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _count(counts: BoxCounts, annotation: dict[str, Any], height: int, width: int) -> None:
    x, y, w, h = annotation["bbox"]
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    if not inside or w < 1 or h < 1 or annotation["area"] <= 0:
        counts.outside += 1
        counts.fractions += min(x, y) >= 0 and max(x + w, y + h) <= 1
        return
    mask = annotation.get("segmentation")
    if not mask:
        counts.no_mask.append(str(annotation["id"]))
    elif not _mask_well_formed(mask):
        counts.malformed_mask.append(str(annotation["id"]))
        mask = None
    elif isinstance(mask, dict) and _other_size(mask, height, width):
        counts.other_size.append(str(annotation["id"]))
    if annotation.get("iscrowd"):
        counts.crowd += 1
        return
    counts.used += 1
    counts.images.add(annotation["image_id"])
    counts.categories.add(annotation["category_id"])
    counts.clipped += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
    counts.rle += isinstance(mask, dict)
    counts.no_polygon += bool(mask) and not _usable(mask)


def _mask_well_formed(mask: Any) -> bool:
    """Whether it is a list of polygons, each a list of numbers, or a run-length encoding."""
    return isinstance(mask, dict) or (
        isinstance(mask, list) and all(isinstance(part, list) and is_finite(part) for part in mask)
    )


def _other_size(mask: dict[str, Any], height: int, width: int) -> bool:
    """Whether a run-length encoding that mmdet would read does not have the image's size."""
    counts, size = mask.get("counts"), mask.get("size")
    if counts is None or size is None:
        return False  # mmdet skips it
    runs = isinstance(counts, list)
    return list(size) != [height, width] or (runs and (not is_finite(counts) or sum(counts) != height * width))


def _usable(mask: Any) -> bool:
    """Whether mmdet reads the mask instead of skipping its box."""
    if isinstance(mask, dict):
        return isinstance(mask.get("counts"), (list, str)) and mask.get("size") is not None
    return any(len(part) >= 6 and len(part) % 2 == 0 for part in mask)
