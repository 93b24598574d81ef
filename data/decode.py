"""Bytes of a JPEG, PNG or WebP file -> uint8 RGB pixels of one crop, decoding no more than needed."""

import warnings
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.transforms import Box

MAX_PIXELS = 100_000_000
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "WEBP")
CHANNELS = 3  # of every image: RGB

# Pillow warns from 89 megapixels on, once per worker; our own limit refuses the image instead.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(Exception):  # noqa: N818  # a state of the data, not of the program
    """Bytes that are not a usable image; the text is the reason."""


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
    EXIF orientation is ignored and transparency dropped, as torchvision's ImageFolder does.

    Args:
        data: the file's bytes.
        choose_box: (width, height) of the image -> box in its pixels. Called once, before the pixels are decoded. The
            part of the box that lies outside the image is filled by reflection.
        size: (H, W) of the result.
        flip: mirror left to right.
        border: pixels on each side that do not belong to the image: cut off first, so that no filter reads them.

    Returns:
        uint8 (H, W, 3).

    Raises:
        BadImage: truncated, not an image, over 100 megapixels or a side under 8 pixels. No other exception, whatever
            the bytes.
    """
    image = _open(data)
    if border:
        image = _cut(image, border)
    box = choose_box(image.width, image.height)
    try:
        return _render(image, box, size, flip)
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise BadImage(_reason(error)) from error


def check_image(data: bytes) -> str:
    """Decodes the whole image and returns its format by content: 'JPEG', 'PNG' or 'WEBP'.

    Raises:
        BadImage: as ``decode``.
    """
    image = _open(data)
    try:
        image.load()
        _to_rgb(image)
    except Exception as error:
        raise BadImage(_reason(error)) from error
    name = image.format
    return "JPEG" if name == "MPO" else str(name)  # MPO: a JPEG with further images after the first


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise BadImage(_reason(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is over {MAX_PIXELS // 1_000_000} megapixels")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width} x {height} is under {MIN_SIDE} pixels a side")
    return image


def _cut(image: Image.Image, border: int) -> Image.Image:
    try:
        return image.crop((border, border, image.width - border, image.height - border))
    except Exception as error:
        raise BadImage(_reason(error)) from error


def _render(image: Image.Image, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
    inside, size, beyond = _inside(box, image.size, size)
    pixels = _resize(image, inside, size)
    if any(map(any, beyond)):
        pixels = Image.fromarray(np.pad(np.asarray(pixels), (*beyond, (0, 0)), mode="reflect"))
    if flip:  # here and not on the array: NumPy is slow at reversing pixels of three bytes
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(pixels)


def _inside(
    box: Box, image_size: tuple[int, int], size: tuple[int, int]
) -> tuple[Box, tuple[int, int], tuple[tuple[int, int], tuple[int, int]]]:
    """The part of a box inside a (width, height) image, its (H, W) in the result, and the rows and columns outside."""
    left, top, right, bottom = box
    inside = max(left, 0), max(top, 0), min(right, image_size[0]), min(bottom, image_size[1])
    rows, cols = size[0] / (bottom - top), size[1] / (right - left)
    above, below = round((inside[1] - top) * rows), round((bottom - inside[3]) * rows)
    before, after = round((inside[0] - left) * cols), round((right - inside[2]) * cols)
    return inside, (size[0] - above - below, size[1] - before - after), ((above, below), (before, after))


def _resize(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    height, width = size
    left, top, right, bottom = box
    full = image.size
    reduction = int(min((right - left) / width, (bottom - top) / height))
    if reduction >= 2:
        # A crop at least twice the target: libjpeg decodes at 1/2, 1/4 or 1/8 for a fraction of the work (JPEG only,
        # `draft` does nothing for other formats). It rounds the reduced size up, so the scale comes from its result.
        drafted = image.draft(None, (full[0] // reduction, full[1] // reduction))
        if drafted is not None:
            scale = full[0] / drafted[1][2]
            reduced = image.size
            left, top = left / scale, top / scale
            right, bottom = min(right / scale, reduced[0]), min(bottom / scale, reduced[1])
    pixels = image if image.mode in ("RGB", "L") else _to_rgb(image)
    pixels = pixels.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return pixels if pixels.mode == "RGB" else pixels.convert("RGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grayscale: Pillow's own conversion would clip everything above 255 to white.
        gray = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")  # CMYK and YCCK included: Pillow already undid Adobe's inversion


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"  # Pillow's own text has a memory address in it
    if isinstance(error, Image.DecompressionBombError):
        return f"over {MAX_PIXELS // 1_000_000} megapixels"
    return f"{error}" or type(error).__name__
