"""A generated detection set in COCO's layout: JPEGs of discs and boxes, with polygons around them."""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "box")


def make_coco(
    root: Path, train: int = 8, val: int = 4, sizes: tuple[tuple[int, int], ...] = ((96, 128), (120, 90))
) -> Path:
    """Fill `root` with `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`.

    Args:
        train, val: numbers of images.
        sizes: (height, width) of the images, in turn.
    """
    (root / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train2017", train), ("val2017", val)):
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            name = f"{number:012d}.jpg"
            shapes = [_draw_shape(rng, height, width) for _ in range(1 + number % 3)]
            canvas = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
            for kind, polygon in shapes:
                ImageDraw.Draw(canvas).polygon(polygon, fill=((220, 40, 30), (30, 60, 220))[kind])
                annotations.append(_annotation(len(annotations) + 1, number, kind, polygon))
            canvas.save(root / split / name, quality=95)
            images.append({"id": number, "file_name": name, "height": height, "width": width})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1 + number, "name": name} for number, name in enumerate(CLASSES)],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _draw_shape(rng: np.random.Generator, height: int, width: int) -> tuple[int, list[tuple[float, float]]]:
    """Return the shape's class and its corners (x, y) in pixels."""
    kind, radius = int(rng.integers(2)), float(rng.uniform(10, min(height, width) / 3.5))
    x, y = float(rng.uniform(radius, width - radius)), float(rng.uniform(radius, height - radius))
    if kind == 1:
        return kind, [
            (x - radius, y - radius),
            (x + radius, y - radius),
            (x + radius, y + radius),
            (x - radius, y + radius),
        ]
    corners = [2 * math.pi * step / 16 for step in range(16)]
    return kind, [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in corners]


def _annotation(number: int, image: int, kind: int, polygon: list[tuple[float, float]]) -> dict:
    xs, ys = zip(*polygon, strict=True)
    area = abs(sum(x * y2 - x2 * y for (x, y), (x2, y2) in zip(polygon, polygon[1:] + polygon[:1], strict=True))) / 2
    return {
        "id": number,
        "image_id": image,
        "category_id": 1 + kind,
        "segmentation": [[value for corner in polygon for value in corner]],
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": area,
        "iscrowd": 0,
    }
