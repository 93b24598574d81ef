"""Crop boxes: pure functions; boxes are (left, top, right, bottom) in pixels of the whole image."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.draw import uniform

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Augmentation:
    """How a view is made from a sample's image.

    Raises:
        ValueError: settings that cannot work.
    """

    crop: Literal["random", "simple"] = "random"
    scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area that a random crop takes, lowest and highest
    flip: float = 0.5  # probability of mirroring left to right
    color_jitter: float = 0.0  # probability of changing brightness, contrast, saturation and hue
    three_augment: bool = False  # one of grayscale, solarize and blur
    rand_augment: str = ""  # RandAugment in timm's notation: rand-m9-mstd0.5-inc1

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop_scale {self.scale} must satisfy 0 < lowest <= highest <= 1")
        for name in ("flip", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is a probability: set it between 0 and 1")
        if self.rand_augment and not re.fullmatch(r"rand(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?)+", self.rand_augment):
            raise ValueError(
                f"rand_augment {self.rand_augment!r} is not in timm's notation, as in rand-m9-mstd0.5-inc1"
            )

    def box(self, rng: np.random.Generator, width: int, height: int, size: tuple[int, int]) -> Box:
        """The crop box in an image of `width` x `height` pixels for a view of `size` (H, W)."""
        if self.crop == "simple":
            return simple_crop(rng, width, height, size)
        return random_resized_crop(rng, width, height, self.scale, aspect=size[1] / size[0])


def flip_decision(rng: np.random.Generator, probability: float) -> bool:
    """Whether to mirror the image left to right."""
    return uniform(rng) < probability


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
        rng: four to twenty-two words are drawn from it.
        width, height: of the image, in pixels.
        scale: share of the image's area, lowest and highest.
        ratio: width / height of the crop relative to the target's, lowest and highest.
        aspect: width / height of the target, so that crops are stretched by at most ``ratio`` for targets of any shape.
    """
    lowest, highest = ratio[0] * aspect, ratio[1] * aspect
    for _ in range(10):
        area = width * height * uniform(rng, *scale)
        shape = math.exp(uniform(rng, math.log(lowest), math.log(highest)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top = int(uniform(rng) * (height - h + 1))
            left = int(uniform(rng) * (width - w + 1))
            return left, top, left + w, top + h
    shape = min(max(width / height, lowest), highest)
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def simple_crop(rng: np.random.Generator, width: int, height: int, size: tuple[int, int], padding: int = 4) -> Box:
    """DeiT III's simple random crop: resizes the short side to the target and draws the offset along the long one.

    As there, the resized image is first padded by reflection, so the box may reach up to `padding` pixels of the target
    beyond the image.

    Args:
        rng: two words are drawn from it.
        width, height: of the image, in pixels.
        size: (H, W) of the target.
        padding: in pixels of the target.
    """
    H, W = size
    scale = min(width / W, height / H)  # pixels of the image per pixel of the target
    left, top = (
        int(uniform(rng) * (int(side / scale) - target + 2 * padding + 1)) - padding
        for side, target in ((width, W), (height, H))
    )
    return left * scale, top * scale, (left + W) * scale, (top + H) * scale


def center_crop(width: int, height: int, aspect: float = 1.0, fraction: float = 0.875) -> Box:
    """The center crop for evaluation: ``fraction`` of the largest centered box of the target's shape.

    0.875 corresponds to the usual "resize the short side to 256, crop 224", without the resize in between.
    """
    w = min(width, height * aspect) * fraction
    h = w / aspect
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of a size that may be given as the side of a square."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width
