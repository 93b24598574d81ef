"""Counts what mmdet does with the annotations of a file in COCO's format: used, clipped, ignored or skipped."""

import math
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass
class BoxCounts:
    """Numbers of annotations, and the ids (as text) of those that would stop a training.

    Attributes:
        used: boxes that are trained on or evaluated.
        images: ids of the images that have a used box.
        outside: outside their image, thinner than a pixel, or without area.
        clipped: used, but they extend more than a pixel beyond their image.
        rle: used, and their mask is run-length encoded.
        no_polygon: used, but all their polygons have fewer than three points.
        malformed, no_mask, other_size: ids.
    """

    used: int = 0
    crowd: int = 0
    outside: int = 0
    clipped: int = 0
    other_classes: int = 0
    no_image: int = 0
    rle: int = 0
    no_polygon: int = 0
    images: set[Any] = field(default_factory=set)
    malformed: list[str] = field(default_factory=list)
    no_mask: list[str] = field(default_factory=list)
    other_size: list[str] = field(default_factory=list)


def count_boxes(images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: set[int]) -> BoxCounts:
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
        elif not annotation.get("ignore"):
            _count(counts, annotation, *sizes[annotation["image_id"]])
    return counts


def _well_formed(annotation: dict[str, Any]) -> bool:
    box, area = annotation.get("bbox"), annotation.get("area")
    numbers = [*box, area] if isinstance(box, list) and len(box) == 4 else [None]
    return "category_id" in annotation and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)


def _count(counts: BoxCounts, annotation: dict[str, Any], height: int, width: int) -> None:
    x, y, w, h = annotation["bbox"]
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    if not inside or w < 1 or h < 1 or annotation["area"] <= 0:
        counts.outside += 1
        return
    mask = annotation.get("segmentation")
    if not mask:
        counts.no_mask.append(str(annotation["id"]))
    elif isinstance(mask, dict) and list(mask.get("size", ())) != [height, width]:
        counts.other_size.append(str(annotation["id"]))
    if annotation.get("iscrowd"):
        counts.crowd += 1
        return
    counts.used += 1
    counts.images.add(annotation["image_id"])
    counts.clipped += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
    counts.rle += isinstance(mask, dict)
    counts.no_polygon += isinstance(mask, list) and bool(mask) and not any(len(part) >= 6 for part in mask)
