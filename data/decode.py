"""Bytes of an image file -> uint8 RGB pixels of its crops, decoding no more than needed.

Of a file with several pictures (animations, pages, MPO) the first is used.
"""

import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from data.transforms import Box

Margins = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right; in pixels of the target

MAX_PIXELS = 100_000_000
MIN_SIDE = 8
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000")  # by Pillow's names
REDUCIBLE = ("JPEG", "MPO")  # MPO: a JPEG with further images after the first
CHANNELS = 3  # of every image: RGB

_LIMIT = f"{MAX_PIXELS // 1_000_000} megapixels: make it smaller, or cut it into parts"
WHITE_16_BITS, WHITE_12_BITS = 65535, 4095
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 4
_TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1", b"avif", b"avis")  # ISO/IEC 23008-12
_ORIENTATION, _UPRIGHT = 274, 1  # EXIF 2.3, table 4
_WITHOUT_WHITE = {"F": "floating-point", "I": "signed or 32-bit", "LAB": "CIELAB"}  # by Pillow's modes

# Pillow warns of odd metadata, and from 89 megapixels on, once per worker. Metadata does not matter here, and our own
# limit refuses the image instead.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow refuses good PNGs for a megabyte of text or of color profile beside the pixels.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 100 * 2**20


class BadImage(Exception):  # noqa: N818  # a state of the data, not of the program
    """Bytes that are not a usable image; the text is the reason."""


class ImageFacts(NamedTuple):
    """What a file holds, by its content."""

    format: str
    """One of `FORMATS`."""
    used_bits: int | None
    """Bits that the largest value needs, of a picture with 16 bits a value; None for all others."""
    is_gray: bool
    has_more_pictures: bool
    """An animation, or pages; a photograph with previews (MPO) does not count."""
    is_turned: bool
    """EXIF says that it is to be shown turned or mirrored."""


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
    image = _open(data)
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
                decoded[reduction] = _decode(_open(data) if decoded else image, reduction)
            pixels.append(_render(decoded[reduction], inside, target, beyond, crop.flip))
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
        raise BadImage(_reason(error)) from error
    return pixels


def check_image(data: bytes) -> ImageFacts:
    """Decodes the whole image.

    Raises:
        BadImage: as ``decode``.
    """
    image = _open(data)
    stored_as = str(getattr(image, "tile", ""))  # Pillow reads 16-bit colors as their upper 8 bits
    try:
        has_more_pictures = image.format not in REDUCIBLE and bool(getattr(image, "is_animated", False))
        image.load()
        _to_rgb(image)
        return ImageFacts(
            format="JPEG" if image.format in REDUCIBLE else str(image.format),
            used_bits=_used_bits(image, stored_as),
            is_gray=image.mode.startswith("I;16"),
            has_more_pictures=has_more_pictures,
            is_turned=_is_turned(image),
        )
    except Exception as error:
        raise BadImage(_reason(error)) from error


def rewrite_16_bit_gray(data: bytes, bits: int) -> bytes:
    """A gray picture with 16 bits a value as a PNG of 8 bits, in which the largest number of `bits` bits is white.

    Raises:
        BadImage: values need more bits; or as ``decode``.
    """
    image = _open(data)
    white = min(2**bits - 1, _white(image))
    try:
        image.load()
        gray = np.asarray(image)
        if gray.max() > white:
            raise BadImage(f"values up to {gray.max()} are over {white}, the largest number of {bits} bits")
        file = BytesIO()
        _scaled(gray, white, _is_negative(image)).save(file, "PNG")
    except Exception as error:
        raise BadImage(_reason(error)) from error
    return file.getvalue()


def _open(data: bytes) -> Image.Image:
    """Reads the header only."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:  # Pillow's text has a memory address in it
        raise BadImage(_what_else(data)) from error
    except Exception as error:
        raise BadImage(_reason(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is over {_LIMIT}")
    if min(width, height) < MIN_SIDE:
        raise BadImage(f"{width} x {height} is under {MIN_SIDE} pixels a side")
    return image


def _cut(image: Image.Image, border: int) -> Image.Image:
    try:
        return _to_rgb(image).crop((border, border, image.width - border, image.height - border))
    except Exception as error:
        raise BadImage(_reason(error)) from error


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
    return _Decoded(image if image.mode in ("RGB", "L") else _to_rgb(image), scale)


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WITHOUT_WHITE:  # Pillow would clip what is not from 0 to 255
        raise BadImage(
            f"{_WITHOUT_WHITE[image.mode]} pixels, which do not say what is black and white: "
            "convert it to 8 bits, or to unsigned 16 bits"
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip everything above 255 to white
        return _scaled(np.asarray(image), _white(image), _is_negative(image)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")  # CMYK and YCCK included: Pillow already undid Adobe's inversion


def _scaled(gray: np.ndarray, white: int, negative: bool) -> Image.Image:
    """uint16 (H, W) -> 8 bits, rounded."""
    scaled = ((gray.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    return Image.fromarray(255 - scaled if negative else scaled)


def _white(image: Image.Image) -> int:
    """The largest value that a 16-bit gray image may have; TIFF has files that declare 12 bits."""
    declared = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
    return WHITE_12_BITS if declared == (12,) else WHITE_16_BITS


def _is_negative(image: Image.Image) -> bool:
    """Whether 0 is white, as some TIFF files of X-rays have it; Pillow undoes it for 8 bits alone."""
    return bool(getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def _is_turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT  # Pillow has done what a TIFF file says
    except Exception:  # damaged metadata raises anything, and does not make the pixels worse
        return False


def _used_bits(image: Image.Image, stored_as: str) -> int | None:
    if image.mode.startswith("I;16"):
        return int(np.asarray(image).max()).bit_length() if _white(image) == WHITE_16_BITS else None
    if ";16" not in stored_as:
        return None
    colors = [np.asarray(image.getchannel(band)) for band in image.getbands() if band != "A"]
    return 8 + int(np.max(colors)).bit_length()


def _what_else(data: bytes) -> str:
    if not data:
        return "an empty file"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the image: `git lfs pull` gets it"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "a HEIC or AVIF image: convert it to JPEG or PNG"
    if data[:4] in _TIFF_MARKS:
        return "a TIFF file that is damaged, or has other channels than gray, RGB or CMYK of up to 16 bits: convert it"
    return "not a JPEG, PNG, WebP, BMP, TIFF, GIF or JPEG 2000 image"


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"over {_LIMIT}"
    return f"{error}" or type(error).__name__
