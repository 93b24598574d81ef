"""Bytes of an image file -> uint8 RGB pixels of its crops, decoding no more than needed.

Of a file with several pictures (animations, pages, MPO) the first is used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.bit_depth import has_16_bit_colors
from data.image_file import REDUCIBLE, bad_image, open_image, to_rgb
from data.transforms import Box

Margins = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right; in pixels of the target

CHANNELS = 3  # of every image: RGB


class Crop(NamedTuple):
    """Which part of an image is shown."""

    choose_box: Callable[[int, int], Box]
    """(width, height) of the image -> box in its pixels. The part of the box that lies outside the image is filled by
    reflection."""
    flip: bool = False
    """Mirror left to right."""


def decode(
    data: bytes,
    choose_box: Callable[[int, int], Box],
    size: tuple[int, int],
    flip: bool = False,
    border: int = 0,
) -> np.ndarray:
    """Decodes one crop, resized once (bicubic, antialiased).

    Without reduced JPEG decoding the pixels are those of torchvision's ``resized_crop`` on the whole image, except for
    the two source pixels next to an inner edge of the box, where the filter uses the true neighbors beyond the edge.
    EXIF orientation is ignored (but in TIFF files) and transparency dropped, as torchvision's ImageFolder does.

    Args:
        data: the file's bytes.
        choose_box, flip: as in `Crop`.
        size: (H, W) of the result.
        border: pixels on each side that do not belong to the image: cut off first, so that no filter reads them.

    Returns:
        uint8 (H, W, 3).

    Raises:
        BadImage: truncated, not an image, over 100 megapixels or a side under 8 pixels. No other exception, whatever
            the bytes.
    """
    return decode_crops(data, [Crop(choose_box, flip)], size, border)[0]


def decode_crops(data: bytes, crops: Sequence[Crop], size: tuple[int, int], border: int = 0) -> list[np.ndarray]:
    """Several crops of one image, each with exactly the pixels that ``decode`` gives.

    The header is read once and every box is chosen once, before the pixels are decoded. Crops share one decoding,
    unless libjpeg would decode them at different reductions: then there is one for each reduction, because a crop out
    of the other's would have other pixels.

    Args and errors are those of ``decode``.
    """
    image = open_image(data)
    if border:
        image = _cut(image, border)
    width, height = image.size
    boxes = [crop.choose_box(width, height) for crop in crops]
    decoded: dict[int, _Decoded] = {}  # by reduction
    pixels = []
    try:
        for crop, box in zip(crops, boxes, strict=True):
            inside, target, beyond = _inside(box, (width, height), size)
            reduction = _reduction(inside, target) if image.format in REDUCIBLE else 1
            if reduction not in decoded:
                decoded[reduction] = _decode(open_image(data) if decoded else image, reduction)
            pixels.append(_render(decoded[reduction], inside, target, beyond, crop.flip))
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise bad_image(error) from error
    return pixels


def _cut(image: Image.Image, border: int) -> Image.Image:
    try:
        return to_rgb(image).crop((border, border, image.width - border, image.height - border))
    except Exception as error:
        raise bad_image(error) from error


class _Decoded(NamedTuple):
    image: Image.Image  # RGB or L
    scale: float  # pixels of the file for one of `image`


def _decode(image: Image.Image, reduction: int) -> _Decoded:
    """All pixels of an opened image, at 1/reduction of its size if it is a JPEG; those of RGB and L only when used."""
    width, scale = image.width, 1.0
    if reduction > 1:
        drafted = image.draft(None, (width // reduction, image.height // reduction))
        if drafted is not None:  # libjpeg rounds the reduced size up, so the scale comes from its result
            scale = width / drafted[1][2]
    as_it_is = image.mode in ("RGB", "L") and not has_16_bit_colors(image)
    return _Decoded(image if as_it_is else to_rgb(image), scale)


def _reduction(inside: Box, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: libjpeg decodes a crop that is at least so many times its target for a fraction of the work."""
    left, top, right, bottom = inside
    times = min((right - left) / size[1], (bottom - top) / size[0])
    return next((reduction for reduction in (8, 4, 2) if times >= reduction), 1)


def _inside(box: Box, image_size: tuple[int, int], size: tuple[int, int]) -> tuple[Box, tuple[int, int], Margins]:
    """The part of a box inside a (width, height) image, its (H, W) in the result, and the rows and columns outside."""
    left, top, right, bottom = box
    inside = max(left, 0), max(top, 0), min(right, image_size[0]), min(bottom, image_size[1])
    rows, cols = size[0] / (bottom - top), size[1] / (right - left)
    above, below = round((inside[1] - top) * rows), round((bottom - inside[3]) * rows)
    before, after = round((inside[0] - left) * cols), round((right - inside[2]) * cols)
    return inside, (size[0] - above - below, size[1] - before - after), ((above, below), (before, after))


def _render(decoded: _Decoded, inside: Box, size: tuple[int, int], beyond: Margins, flip: bool) -> np.ndarray:
    scale, (width, height) = decoded.scale, decoded.image.size
    left, top, right, bottom = (side / scale for side in inside)
    box = left, top, min(right, width), min(bottom, height)
    pixels = decoded.image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    pixels = pixels if pixels.mode == "RGB" else pixels.convert("RGB")
    if any(map(any, beyond)):
        pixels = Image.fromarray(np.pad(np.asarray(pixels), (*beyond, (0, 0)), mode="reflect"))
    if flip:  # here and not on the array: NumPy is slow at reversing pixels of three bytes
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(pixels)
