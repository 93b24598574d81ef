"""Where to cut a picture. Pure functions; boxes are (left, top, right, bottom) in pixels of the undecoded picture."""

import math

import numpy as np

Box = tuple[float, float, float, float]


def flip_decision(rng: np.random.Generator, probability: float) -> bool:
    """Whether to mirror the picture left to right."""
    return rng.random() < probability


def random_resized_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    aspect: float = 1.0,
) -> Box:
    """torchvision's ``RandomResizedCrop.get_params``: ten tries, then the largest central crop of an allowed shape.

    Args:
        rng: drawn from by ``random()`` alone, whose stream NumPy is least likely to change.
        width, height: the picture's, in pixels.
        scale: share of the picture's area, lowest and highest.
        ratio: width / height of the crop relative to the target's, lowest and highest.
        aspect: width / height of the target, so that a crop is stretched by at most ``ratio`` for targets of any shape.
    """
    lowest, highest = ratio[0] * aspect, ratio[1] * aspect
    for _ in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        shape = math.exp(math.log(lowest) + (math.log(highest) - math.log(lowest)) * rng.random())
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.random() * (height - h + 1))
            left = int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    shape = min(max(width / height, lowest), highest)
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def center_crop(width: int, height: int, aspect: float = 1.0, fraction: float = 0.875) -> Box:
    """The central crop of evaluation: ``fraction`` of the largest centred box of the target's shape.

    0.875 is the usual "resize the short side to 256, cut 224", without the resize in between.
    """
    w = min(width, height * aspect) * fraction
    h = w / aspect
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h
