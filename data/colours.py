"""Changes of colour: torchvision's colour jitter and DeiT III's three augmentations, drawn from a NumPy generator."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv

# torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1), as the authors of LUT use it.
_JITTER: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, float], ...] = (
    (tv.adjust_brightness, 0.6, 1.4),
    (tv.adjust_contrast, 0.6, 1.4),
    (tv.adjust_saturation, 0.8, 1.2),
    (tv.adjust_hue, -0.1, 0.1),
)
_BLUR_RADIUS = (0.1, 2.0)  # in pixels


def color_jitter(rng: np.random.Generator, pixels: np.ndarray, probability: float) -> np.ndarray:
    """Brightness, contrast, saturation and hue changed at random and in random order, or nothing: uint8 (H, W, 3)."""
    if rng.random() >= probability:
        return pixels
    image = Image.fromarray(pixels)
    for which in np.argsort(rng.random(len(_JITTER))):
        adjust, lowest, highest = _JITTER[which]
        image = adjust(image, lowest + (highest - lowest) * rng.random())
    return np.asarray(image)


def three_augment(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Grey, solarised or blurred, each as likely: uint8 (H, W, 3)."""
    image, which = Image.fromarray(pixels), int(rng.random() * 3)
    if which == 0:
        return np.asarray(image.convert("L").convert("RGB"))
    if which == 1:
        return np.asarray(ImageOps.solarize(image))
    lowest, highest = _BLUR_RADIUS
    return np.asarray(image.filter(ImageFilter.GaussianBlur(lowest + (highest - lowest) * rng.random())))
