"""What mmdet makes of each annotation of a file in COCO's format: used, clipped, ignored or skipped."""

import math
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass
class BoxCounts:
    """Numbers of annotations, and the ids of those that stop a training (as text).

    Attributes:
        used: boxes that are trained on, or looked for.
        images: ids of the images that have one.
        outside: not in the image at all, or thinner than a pixel, or of no area.
        reaching: used, but more than a pixel outside; clipped.
        rle: used, and their mask is in run lengths.
        no_polygon: used, but all their polygons have less than three points.
        malformed, no_mask, other_size: ids.
    """

    used: int = 0
    crowd: int = 0
    outside: int = 0
    reaching: int = 0
    other_classes: int = 0
    no_image: int = 0
    rle: int = 0
    no_polygon: int = 0
    images: set[Any] = field(default_factory=set)
    malformed: list[str] = field(default_factory=list)
    no_mask: list[str] = field(default_factory=list)
    other_size: list[str] = field(default_factory=list)


def count_boxes(images: list[dict[str, Any]], annotations: list[dict[str, Any]], wanted: set[int]) -> BoxCounts:
    """Args:
    images, annotations: of the file; images have `id`, `height` and `width`.
    wanted: ids of the categories that are classes.
    """
    counts = BoxCounts()
    sizes = {row["id"]: (row["height"], row["width"]) for row in images}
    for row in tqdm(annotations, desc="checking boxes", unit=" boxes", disable=None, delay=3, leave=False):
        if not _well_formed(row):
            counts.malformed.append(str(row["id"]))
        elif row.get("image_id") not in sizes:
            counts.no_image += 1
        elif row["category_id"] not in wanted:
            counts.other_classes += 1
        elif not row.get("ignore"):
            _count(counts, row, *sizes[row["image_id"]])
    return counts


def _well_formed(row: dict[str, Any]) -> bool:
    box, area = row.get("bbox"), row.get("area")
    numbers = [*box, area] if isinstance(box, list) and len(box) == 4 else [None]
    return "category_id" in row and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)


def _count(counts: BoxCounts, row: dict[str, Any], height: int, width: int) -> None:
    x, y, w, h = row["bbox"]
    inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
    if not inside or w < 1 or h < 1 or row["area"] <= 0:
        counts.outside += 1
        return
    mask = row.get("segmentation")
    if not mask:
        counts.no_mask.append(str(row["id"]))
    elif isinstance(mask, dict) and list(mask.get("size", ())) != [height, width]:
        counts.other_size.append(str(row["id"]))
    if row.get("iscrowd"):
        counts.crowd += 1
        return
    counts.used += 1
    counts.images.add(row["image_id"])
    counts.reaching += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1
    counts.rle += isinstance(mask, dict)
    counts.no_polygon += isinstance(mask, list) and bool(mask) and not any(len(part) >= 6 for part in mask)
