"""Bytes of an image file -> pixels of its crops; photographs are decoded no further than needed.

If a file has several images (animations, pages, MPO), the first is used.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from data.bit_depth import has_16_bit_colors
from data.channels import is_npy, read_pixels
from data.image_file import REDUCIBLE, bad_image, open_image, to_rgb
from data.pixel_format import RGB, PixelFormat
from data.transforms import Box

Margins = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right; in pixels of the target

DECODER = "torchvision's, resized by torch"  # as runs record it: an older run would continue with other pixels
# Crops of whole pixels are drafted from this reduction on. At 2, Pillow's draft and resize take as long as torchvision
# and torch do for all pixels, and the error is ten times as large.
_WORTH_A_DRAFT = 4


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
    format: PixelFormat = RGB,
) -> np.ndarray:
    """Decodes one crop, resized once (bicubic, antialiased).

    A box of whole pixels inside the image is cut out and resized by torch. This gives the pixels of torchvision's
    ``resized_crop`` on Pillow's image, except for rounding between rows and columns (0.04 on average and 16 at most, of
    255). Other boxes, and those of JPEGs that are at least `_WORTH_A_DRAFT` times their target, are left to Pillow,
    which supports fractions of pixels and decodes JPEGs at 1/2, 1/4 or 1/8 of their size. Its filter also reads pixels
    beyond an inner edge. EXIF orientation is ignored (except in TIFF files) and transparency dropped, as in
    torchvision's ImageFolder.

    For formats other than `RGB`, and for .npy files, all pixels are decoded, and Pillow cuts out and resizes each
    channel: bytes like grays, wider values in fp32 and then rounded to the nearest value of their type.

    Args:
        data: the file's bytes.
        choose_box, flip: as in `Crop`.
        size: (H, W) of the result.
        border: pixels to cut off on each side first, so that no filter reads them.
        format: of the result.

    Returns:
        (H, W, C) in the format's dtype.

    Raises:
        BadImage: the file is truncated, not an image or in another format, has over 100 megapixels or a side under 8
            pixels. No other exception, whatever the bytes.
    """
    return decode_crops(data, [Crop(choose_box, flip)], size, border, format)[0]


def decode_crops(
    data: bytes, crops: Sequence[Crop], size: tuple[int, int], border: int = 0, format: PixelFormat = RGB
) -> list[np.ndarray]:
    """Decodes several crops of one image, each with exactly the pixels that ``decode`` gives.

    The header is read once and every box is chosen once, before the pixels are decoded. Crops share one decoding unless
    they need different reductions. Each reduction is decoded separately, because a crop from another one would have
    different pixels.

    Args and errors are those of ``decode``.
    """
    file: _File | _Planes
    if format != RGB or is_npy(data):
        file = _Planes(read_pixels(data, format), border)
        width, height = file.size
    else:
        image = open_image(data)
        if border:
            image = _cut(image, border)
        width, height = image.size
        file = _File(data, image)
    boxes = [crop.choose_box(width, height) for crop in crops]
    try:
        return [file.render(box, size, crop.flip) for crop, box in zip(crops, boxes, strict=True)]
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise bad_image(error) from error


def _cut(image: Image.Image, border: int) -> Image.Image:
    try:
        return to_rgb(image).crop((border, border, image.width - border, image.height - border))
    except Exception as error:
        raise bad_image(error) from error


class _File:
    """A file, decoded at most once in each way that its crops need."""

    def __init__(self, data: bytes, image: Image.Image) -> None:
        self._data, self._image, self._is_used = data, image, False
        self._size = image.size  # before a draft changes it
        self._whole: Tensor | None = None
        self._reduced: dict[int, _Decoded] = {}  # by reduction

    def render(self, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
        """The pixels of one crop."""
        inside, target, beyond = _inside(box, self._size, size)
        reduction = _reduction(inside, target) if self._image.format in REDUCIBLE else 1
        if reduction < _WORTH_A_DRAFT and tuple(map(int, inside)) == box:
            if self._whole is None:
                self._whole = _decode_whole(self._data, self._opened())
            return _resize(self._whole, inside, size, flip)
        if reduction not in self._reduced:
            self._reduced[reduction] = _decode(self._opened(), reduction)
        return _render(self._reduced[reduction], inside, target, beyond, flip)

    def _opened(self) -> Image.Image:
        # A loaded image cannot be drafted, or read with 16 bits per value, again; a cut one no longer has a file.
        if self._is_used and self._image.format is not None:
            return open_image(self._data)
        self._is_used = True
        return self._image


class _Planes:
    """All pixels of a file, one plane per channel."""

    def __init__(self, pixels: np.ndarray, border: int) -> None:
        rows, cols = (slice(border, side - border) for side in pixels.shape[:2])
        self._dtype, pixels = pixels.dtype, pixels[rows, cols]
        wide = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)
        self._planes = [Image.fromarray(np.ascontiguousarray(wide[..., c])) for c in range(wide.shape[2])]
        self.size = self._planes[0].size

    def render(self, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
        """The pixels of one crop."""
        inside: Box | None
        inside, target, beyond = _inside(box, self.size, size)
        planes = self._planes
        if tuple(map(int, inside)) == box:
            planes, inside = [plane.crop(box) for plane in planes], None
        resized = [plane.resize(target[::-1], Image.Resampling.BICUBIC, box=inside) for plane in planes]
        pixels = np.stack([np.asarray(plane) for plane in resized], axis=2)
        if self._dtype == np.uint16:  # the filter overshoots at edges
            pixels = np.rint(pixels).clip(0, 65535).astype(np.uint16)
        if any(map(any, beyond)):
            pixels = np.pad(pixels, (*beyond, (0, 0)), mode="reflect")
        return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def _decode_whole(data: bytes, image: Image.Image) -> Tensor:
    """Decodes all pixels, uint8 (3, H, W), with the channels of a pixel adjacent in memory.

    torchvision decodes JPEGs of colors or grays. Pillow converts CMYK as its authors meant it, and decodes PNGs:
    torchvision is 13 % faster at them, but prints a line for each with a color profile that libpng does not like.
    """
    if image.format in REDUCIBLE and image.mode in ("RGB", "L"):
        try:
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        except RuntimeError:  # Pillow reports what is wrong, or reads the file, such as one without an end mark
            pixels = torch.empty(0)
        if pixels.shape[1:] == (image.height, image.width):  # all limits apply to the size that Pillow found
            return pixels
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def _resize(pixels: Tensor, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
    left, top, right, bottom = map(int, box)
    crop = pixels[None, :, top:bottom, left:right]
    resized = F.interpolate(crop, size, mode="bicubic", antialias=True)
    return (resized.flip(-1) if flip else resized)[0].permute(1, 2, 0).numpy()


class _Decoded(NamedTuple):
    image: Image.Image  # RGB or L
    scale: float  # pixels of the file per pixel of `image`


def _decode(image: Image.Image, reduction: int) -> _Decoded:
    """Decodes an opened image, at 1/reduction of its size if it is a JPEG; RGB and L are decoded only when used."""
    width, scale = image.width, 1.0
    if reduction > 1:
        drafted = image.draft(None, (width // reduction, image.height // reduction))
        if drafted is not None:  # libjpeg rounds the reduced size up, so the scale comes from its result
            scale = width / drafted[1][2]
    as_it_is = image.mode in ("RGB", "L") and not has_16_bit_colors(image)
    return _Decoded(image if as_it_is else to_rgb(image), scale)


def _reduction(inside: Box, size: tuple[int, int]) -> int:
    """1, 2, 4 or 8: libjpeg decodes a crop at least that many times its target's size for a fraction of the work."""
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
