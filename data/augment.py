"""Augmentations of a crop, drawn from a NumPy generator: color jitter, DeiT III's 3-Augment, RandAugment."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv

from data.draw import integer, permutation, uniform

# torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1), as the authors of LUT use it.
_JITTER: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, float], ...] = (
    (tv.adjust_brightness, 0.6, 1.4),
    (tv.adjust_contrast, 0.6, 1.4),
    (tv.adjust_saturation, 0.8, 1.2),
    (tv.adjust_hue, -0.1, 0.1),
)
_BLUR_RADIUS = (0.1, 2.0)  # in pixels


def color_jitter(rng: np.random.Generator, pixels: np.ndarray, probability: float) -> np.ndarray:
    """Jitters brightness, contrast, saturation and hue in random order, with `probability`: uint8 (H, W, 3)."""
    if uniform(rng) >= probability:
        return pixels
    image = Image.fromarray(pixels)
    for which in permutation(rng, len(_JITTER)):
        adjust, lowest, highest = _JITTER[which]
        image = adjust(image, uniform(rng, lowest, highest))
    return np.asarray(image)


def three_augment(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Applies grayscale, solarize or blur with equal probability: uint8 (H, W, 3)."""
    image, which = Image.fromarray(pixels), integer(rng, 3)
    if which == 0:
        return np.asarray(image.convert("L").convert("RGB"))
    if which == 1:
        return np.asarray(ImageOps.solarize(image))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(uniform(rng, *_BLUR_RADIUS))))


def rand_augment(rng: np.random.Generator, pixels: np.ndarray, policy: str) -> np.ndarray:
    """timm's RandAugment: uint8 (H, W, 3).

    Args:
        policy: as timm writes it, such as `rand-m9-mstd0.5-inc1`.
    """
    augment = _rand_augment(policy, min(pixels.shape[:2]))
    with _seeded(integer(rng, 2**32)):
        return np.asarray(augment(Image.fromarray(pixels)))


@lru_cache
def _rand_augment(policy: str, side: int) -> Callable[[Image.Image], Image.Image]:
    """Uses the settings of timm's own `create_transform` for images of `side` pixels."""
    from timm.data import IMAGENET_DEFAULT_MEAN, rand_augment_transform  # takes a second, and few runs need it

    gray = tuple(round(255 * channel) for channel in IMAGENET_DEFAULT_MEAN)
    settings = {"translate_const": int(side * 0.45), "img_mean": gray, "interpolation": Image.Resampling.BICUBIC}
    augment: Any = rand_augment_transform(policy, settings)
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = partial(_posterize, operation.aug_fn)
    return augment


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: object) -> Image.Image:
    """Returns black for 0 bits, which timm asks for at the highest magnitude and Pillow refuses since version 13."""
    return posterize(image, bits, **options) if bits else Image.new("RGB", image.size)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, which timm draws from, and restores their state afterwards.

    Their streams are frozen, unlike `Generator`'s.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
