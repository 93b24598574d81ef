"""A generated segmentation set in ADE20K's layout: JPEGs of discs and boxes, and masks with an unlabeled margin."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("ground", "disc", "box")
COLOURS = ((110, 110, 110), (220, 40, 30), (30, 60, 220))


def make_ade(
    root: Path, train: int = 8, val: int = 4, sizes: tuple[tuple[int, int], ...] = ((96, 128), (120, 70), (64, 150))
) -> Path:
    """Fill `root` with `images/` and `annotations/`, each with `training/` and `validation/`.

    Args:
        train, val: numbers of images.
        sizes: (height, width) of the images, in turn.
    """
    rng = np.random.default_rng(0)
    for split, count in (("training", train), ("validation", val)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            image = Image.fromarray(rng.integers(90, 130, (height, width, 3), dtype=np.uint8))
            mask = Image.new("L", (width, height), 0)
            for _ in range(2):
                _draw(rng, image, mask)
            ImageDraw.Draw(mask).rectangle((0, 0, width - 1, height - 1), outline=255, width=2)
            image.save(root / "images" / split / f"{number:08d}.jpg", quality=95)
            mask.save(root / "annotations" / split / f"{number:08d}.png")
    return root


def _draw(rng: np.random.Generator, image: Image.Image, mask: Image.Image) -> None:
    kind, radius = int(rng.integers(1, 3)), int(rng.integers(8, min(image.size) // 3))
    x, y = (int(rng.integers(radius, side - radius)) for side in image.size)
    for canvas, fill in ((image, COLOURS[kind]), (mask, kind)):
        pencil = ImageDraw.Draw(canvas)
        (pencil.ellipse if kind == 1 else pencil.rectangle)((x - radius, y - radius, x + radius, y + radius), fill=fill)
